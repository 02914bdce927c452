"""`reformer/scaling`: time and memory against length at a constant number of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from harness import Conditions, ExperimentResult, Finding
from harness.errors import ReplivitError
from harness.settings import choose
from harness.statistics import bootstrap_interval
from reproductions.reformer.attention import LSHAttention
from reproductions.reformer.chunked import chunked_attention
from reproductions.reformer.peaks import peak_bytes

FULL = "full, fused"


@dataclass(frozen=True)
class Setting:
    """Size of the measurement; every field is an option.

    Attributes:
        tokens: in all: length times batch.
        lengths: of sequences; each divides `tokens`.
        rounds: of LSH attention, one curve each.
        head_dim, chunk: of one head.
        repeats: interleaved rounds of timing.
        training: forward and backward instead of forward alone.
        memory: whether peak memory is measured, each point in a process of its own.
    """

    tokens: int = 65536
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    rounds: tuple[int, ...] = (1, 2, 4, 8)
    head_dim: int = 64
    chunk: int = 64
    repeats: int = 3
    training: bool = False
    memory: bool = True
    device: str = "cpu"


SETTINGS = {
    "tiny": Setting(tokens=2048, lengths=(256, 512, 1024), rounds=(1, 2), head_dim=16, repeats=2),
    "small": Setting(),
    "paper": Setting(repeats=7),
}


def scaling(scale: str = "small", **changes: Any) -> ExperimentResult:
    """Time full and LSH attention for lengths from 1k to 64k, always on as many tokens.

    One head, not causal, attention alone (no projections). Full attention is torch's fused kernel;
    LSH attention hashes, sorts, attends to the own chunk and the one before, and merges rounds.
    On a CPU one thread is used and CPU time is read.

    Args:
        scale: "tiny" (seconds), "small" (about five CPU minutes), "paper" (more repeats).
        changes: fields of `Setting`.

    Raises:
        ReplivitError: an unknown scale or option, or a length that does not divide the tokens.
    """
    setting = _setting(scale, changes)
    names = {FULL: None, **{f"LSH-{n}": n for n in setting.rounds}}
    samples = {name: np.empty((setting.repeats, len(setting.lengths))) for name in names}
    for column, length in enumerate(setting.lengths):
        calls = {name: prepare(length, rounds, **_shape(setting)) for name, rounds in names.items()}
        for name, seconds in _interleaved(calls, setting).items():
            samples[name][:, column] = seconds
        del calls
    peaks = _peaks(setting, names)
    rows = [
        {
            "attention": name,
            "length": length,
            "batch": setting.tokens // length,
            "ms": round(1e3 * float(np.median(samples[name][:, column])), 2),
            "peak MB": None if peaks[name][column] is None else round(peaks[name][column] / 1e6, 1),
        }
        for name in names
        for column, length in enumerate(setting.lengths)
    ]
    fits = {name: exponent(setting.lengths, samples[name]) for name in names}
    crossings = {
        name: crossing(setting.lengths, samples[FULL], samples[name])
        for name in names
        if name != FULL
    }
    return ExperimentResult(
        rows=rows,
        findings=_findings(setting, scale, fits, crossings, samples, peaks),
        figures={"scaling": _figure(setting, samples, peaks, fits)},
        notes=(
            f"{setting.tokens} tokens in all, one head {setting.head_dim} wide, chunks of "
            f"{setting.chunk}, {'forward and backward' if setting.training else 'forward'}, "
            f"{setting.repeats} interleaved repeats; exponents are of time over the longer half of "
            "the lengths, intervals from the residuals of the fit."
        ),
        conditions=Conditions(
            device=setting.device,
            threads=1 if setting.device == "cpu" else torch.get_num_threads(),
            options={"tokens": setting.tokens, "training": setting.training},
        ),
        detail={
            "seconds": {name: one.tolist() for name, one in samples.items()},
            "exponents": {
                name: {"slope": slope, "interval": [low, high]}
                for name, (slope, low, high) in fits.items()
            },
            "crossings": {
                name: None if one is None else {"length": one[0], "interval": one[1]}
                for name, one in crossings.items()
            },
        },
    )  # fmt: skip


def _setting(scale: str, changes: dict[str, Any]) -> Setting:
    least = {"tokens": 1, "head_dim": 1, "chunk": 1, "repeats": 2}
    setting = choose(SETTINGS, scale, changes, least)
    lengths, rounds = (tuple(sorted(set(one))) for one in (setting.lengths, setting.rounds))
    setting = replace(setting, lengths=lengths, rounds=rounds)
    if min(rounds, default=0) < 1 or min(lengths, default=0) < 1:
        raise ReplivitError("lengths and rounds must be from 1 on")
    if len(setting.lengths) < 3:
        raise ReplivitError("a fit needs at least three lengths")
    for length in setting.lengths:
        if setting.tokens % length or length % (2 * setting.chunk):
            raise ReplivitError(
                f"length {length} must divide {setting.tokens} tokens into sequences and itself "
                f"into pairs of chunks of {setting.chunk}"
            )
    return setting


def _peaks(setting: Setting, names: dict[str, int | None]) -> dict[str, list[float | None]]:
    """Bytes by name and length; None where memory is not measured."""
    if not setting.memory or setting.device != "cpu":
        return {name: [None] * len(setting.lengths) for name in names}
    jobs = [
        {"length": length, "rounds": rounds, **_shape(setting)}
        for rounds in names.values()
        for length in setting.lengths
    ]
    found = np.array(peak_bytes(prepare, jobs), dtype=float).reshape(len(names), -1)
    return dict(zip(names, found.tolist(), strict=True))


def _shape(setting: Setting) -> dict[str, Any]:
    return {
        "tokens": setting.tokens, "head_dim": setting.head_dim, "chunk": setting.chunk,
        "training": setting.training, "device": setting.device,
    }  # fmt: skip


def prepare(
    length: int, rounds: int | None, tokens: int, head_dim: int, chunk: int, training: bool,
    device: str,
) -> Callable[[], object]:  # fmt: skip
    """A pass over `tokens` in sequences of `length`; rounds None is full attention."""
    torch.manual_seed(0)
    query, value = (
        torch.randn(tokens // length, 1, length, head_dim, device=device, requires_grad=training)
        for _ in range(2)
    )
    layer = LSHAttention(head_dim, 1, rounds=rounds or 1, chunk=chunk).eval().to(device)
    layer.prepare(length)

    def attend() -> Tensor:
        key = layer.rules.keys(query)
        if rounds is None:
            return F.scaled_dot_product_attention(query, key, value, scale=1.0)
        windows = layer.windows(layer.hash(query))
        rows = (one.flatten(0, 1) for one in (query, key, value))
        return chunked_attention(*rows, windows)

    def work() -> None:
        with torch.set_grad_enabled(training):
            out = attend()
        if training:
            torch.autograd.grad(out.sum(), (query, value))

    return work


def _interleaved(calls: dict[str, Callable], setting: Setting) -> dict[str, list[float]]:
    """Seconds of each call, in turns; the order turns round from repeat to repeat."""
    cpu = setting.device == "cpu"
    clock = time.process_time if cpu else time.perf_counter
    threads = torch.get_num_threads()
    found: dict[str, list[float]] = {name: [] for name in calls}
    try:
        torch.set_num_threads(1 if cpu else threads)
        for name, call in calls.items():
            if name != FULL:
                call()  # warm; the long dense call needs none
        for repeat in range(setting.repeats):
            for name in list(calls) if repeat % 2 == 0 else list(calls)[::-1]:
                start = clock()
                calls[name]()
                if not cpu:
                    torch.cuda.synchronize()
                found[name].append(clock() - start)
    finally:
        torch.set_num_threads(threads)
    return found


def exponent(lengths: Sequence[int], samples: np.ndarray) -> tuple[float, float, float]:
    """Slope of log time over log length on the longer half of the lengths, with a 95 % interval.

    Args:
        samples: seconds `(repeats, lengths)`.
    """
    half = max(3, len(lengths) // 2 + 1)
    x = np.tile(np.log(lengths[-half:]), len(samples))
    fit = stats.linregress(x, np.log(samples[:, -half:]).ravel())
    reach = stats.t.ppf(0.975, len(x) - 2) * fit.stderr
    return float(fit.slope), float(fit.slope - reach), float(fit.slope + reach)


def crossing(
    lengths: Sequence[int], full: np.ndarray, hashed: np.ndarray
) -> tuple[float, list[float]] | None:
    """The length from which on `hashed` is faster, with an interval over repeats; None if never.

    Between two measured lengths, straight lines on log axes.
    """

    def of(ratio: np.ndarray) -> float:
        above = np.flatnonzero(ratio >= 0)  # log of full over hashed
        if len(above) == 0 or ratio[-1] < 0:
            return np.nan
        below = np.flatnonzero(ratio < 0)
        if len(below) == 0:
            return float(lengths[0])
        left = below[-1]
        part = -ratio[left] / (ratio[left + 1] - ratio[left])
        x = np.log(lengths)
        return float(np.exp(x[left] + part * (x[left + 1] - x[left])))

    each = np.log(full / hashed)
    value = of(np.median(each, axis=0))
    singles = np.array([of(one) for one in each])
    if np.isnan(value):
        return None
    singles = singles[~np.isnan(singles)]
    interval = bootstrap_interval(singles) if len(singles) > 1 else (value, value)
    return value, list(interval)


def _findings(setting, scale, fits, crossings, samples, peaks) -> list[Finding]:
    def finding(claim: str, holds: bool, evidence: str) -> Finding:
        outcome = "reproduced" if holds else "deviates"
        return Finding(claim, "not measured" if scale == "tiny" else outcome, evidence)

    hashed = [name for name in samples if name != FULL]
    listed = ", ".join(f"{name} {a:+.2f} [{b:+.2f}, {c:+.2f}]" for name, (a, b, c) in fits.items())
    findings = [
        finding(
            "At a constant number of tokens, full attention slows down with length, LSH does not.",
            fits[FULL][1] > 0.8 and all(fits[name][0] < 0.2 for name in hashed),
            f"exponents of time: {listed}; 1 and 0 are expected, plus a logarithm for the sort",
        )
    ]  # fmt: skip
    where = ", ".join(
        f"{name} never up to {setting.lengths[-1]}" if one is None
        else f"{name} from {one[0]:.0f} [{one[1][0]:.0f}, {one[1][1]:.0f}]"
        for name, one in crossings.items()
    )  # fmt: skip
    findings.append(
        finding(
            "On long sequences LSH attention is faster.",
            all(one is not None for one in crossings.values()),
            f"faster than the fused kernel: {where}",
        )
    )
    last = {name: float(np.median(samples[name][:, -1])) for name in samples}
    per_round = [last[f"LSH-{n}"] / last[f"LSH-{setting.rounds[0]}"] for n in setting.rounds]
    findings.append(
        finding(
            "Time is proportional to the rounds.",
            abs(per_round[-1] / (setting.rounds[-1] / setting.rounds[0]) - 1) < 0.35,
            f"at {setting.lengths[-1]}, relative to the first: "
            + ", ".join(
                f"{n} rounds {r:.2f}" for n, r in zip(setting.rounds, per_round, strict=True)
            ),
        )
    )
    if peaks[FULL][-1] is not None:
        growth = {name: peaks[name][-1] / max(peaks[name][0], 1) for name in samples}
        findings.append(
            finding(
                "Memory does not grow with length at a constant number of tokens.",
                all(growth[name] < 1.5 for name in hashed),
                f"peak at {setting.lengths[-1]} over that at {setting.lengths[0]}: "
                + ", ".join(f"{name} {value:.2f}" for name, value in growth.items())
                + "; the fused kernel keeps no scores either, the quadratic memory of Table 1 is "
                "that of an attention that does",
            )
        )
    return findings


def _figure(setting, samples, peaks, fits):
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    with_memory = peaks[FULL][-1] is not None
    figure = Figure(figsize=(8.4 if with_memory else 4.6, 3.6), layout="constrained")
    cells = figure.subplots(1, 2 if with_memory else 1, squeeze=False)[0]
    for index, name in enumerate(samples):
        colour = "0.2" if name == FULL else f"C{index - 1}"
        seconds = samples[name]
        label = f"{name}: exponent {fits[name][0]:.2f}"
        cells[0].plot(setting.lengths, np.median(seconds, 0), "o-", color=colour, label=label, ms=4)
        cells[0].fill_between(
            setting.lengths, seconds.min(0), seconds.max(0), color=colour, alpha=0.2
        )
        if with_memory:
            cells[1].plot(setting.lengths, np.array(peaks[name]) / 1e6, "o-", color=colour, ms=4)
    cells[0].set_ylabel("seconds")
    cells[0].set_title(f"time of {setting.tokens} tokens", fontsize=10)
    cells[0].legend(fontsize=8)
    if with_memory:
        cells[1].set_ylabel("peak memory, MB")
        cells[1].set_title("memory", fontsize=10)
    for one in cells:
        one.set_xscale("log", base=2)
        one.set_yscale("log")
        one.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.yaxis.set_major_formatter("{x:g}")
        one.yaxis.set_minor_formatter("")
        one.set_xlabel("length of a sequence, tokens")
        one.set_xticks(setting.lengths, [_short(length) for length in setting.lengths])
        one.grid(alpha=0.3, which="both", linewidth=0.5)
    return figure


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
