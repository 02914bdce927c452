"""`reformer/reversible`: memory of a training step against depth, and equal gradients."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from harness import Conditions, ExperimentResult, Finding
from harness.errors import ReplivitError
from harness.settings import choose
from reproductions.reformer.attention import FullAttention, LSHAttention
from reproductions.reformer.layers import FeedForward, PreNormAttention
from reproductions.reformer.peaks import peak_bytes
from reproductions.reformer.reversible import ReversibleBlock, ReversibleStack


@dataclass(frozen=True)
class Setting:
    """Size of the measurement; every field is an option.

    Attributes:
        depths: numbers of layers.
        batch, length, dim, num_heads: of the tokens.
        rounds, chunk: of LSH attention; rounds 0 is full attention.
        ff_chunk: positions that the feed-forward takes at a time, 0 for all.
        dropout: everywhere, while gradients are compared.
    """

    depths: tuple[int, ...] = (1, 2, 4, 8, 16)
    batch: int = 4
    length: int = 1024
    dim: int = 128
    num_heads: int = 4
    rounds: int = 2
    chunk: int = 64
    ff_chunk: int = 0
    dropout: float = 0.1


SETTINGS = {
    "tiny": Setting(depths=(1, 2, 4), batch=2, length=256, dim=32, chunk=32),
    "small": Setting(),
    "paper": Setting(depths=(1, 3, 6, 12, 20), batch=1, length=16384, dim=256, rounds=4),
}


def reversible(scale: str = "small", **changes: Any) -> ExperimentResult:
    """Measure the peak memory of training steps of reversible and of ordinary stacks.

    Each point is a process of its own; weights and their gradients are there before and are not
    counted. Then the gradients of both are compared, with dropout, from the same random state.

    Args:
        scale: "tiny" (seconds), "small" (about two minutes), "paper" (longer and deeper).
        changes: fields of `Setting`.

    Raises:
        ReplivitError: an unknown scale or option, or fewer than three depths.
    """
    counts = ("batch", "length", "dim", "num_heads", "chunk")
    least = {**dict.fromkeys(counts, 1), "rounds": 0, "ff_chunk": 0, "dropout": 0}
    setting = choose(SETTINGS, scale, changes, least)
    if len(set(setting.depths)) < 3 or min(setting.depths) < 1:
        raise ReplivitError("a slope needs at least three depths of one layer or more")
    size = asdict(setting)
    del size["depths"], size["dropout"]
    jobs = [
        {"depth": depth, "reversible": kind, **size}
        for kind in (True, False)
        for depth in setting.depths
    ]
    found = np.array(peak_bytes(prepare, jobs)) / 1e6
    peaks = dict(zip((True, False), found.reshape(2, -1).tolist(), strict=True))
    seconds = dict(zip((True, False), np.reshape(_cpu_seconds(jobs), (2, -1)), strict=True))
    rows = [
        {
            "layers": depth,
            "reversible, MB": round(peaks[True][index], 1),
            "ordinary, MB": round(peaks[False][index], 1),
            "reversible, CPU s": round(float(seconds[True][index]), 2),
            "ordinary, CPU s": round(float(seconds[False][index]), 2),
        }
        for index, depth in enumerate(setting.depths)
    ]
    slopes = {kind: _slope(setting.depths, peaks[kind]) for kind in peaks}
    gaps = gradient_gap(setting)
    return ExperimentResult(
        rows=rows,
        findings=_findings(scale, setting, slopes, gaps, seconds),
        figures={"reversible": _figure(setting, peaks, slopes)},
        notes=(
            f"{setting.batch} sequences of {setting.length} tokens, {setting.dim} wide, "
            f"{setting.num_heads} heads, "
            + (f"LSH with {setting.rounds} rounds" if setting.rounds else "full attention")
            + "; forward and backward, peak above weights and gradients. Times are single ones."
        ),
        conditions=Conditions(threads=1, options=asdict(setting)),
        detail={"slopes_mb": {"reversible": slopes[True], "ordinary": slopes[False]}, "gaps": gaps},
    )


def build(depth: int, reversible: bool, setting: Setting, dropout: float = 0.0) -> ReversibleStack:
    """A stack of that depth."""

    def attention(index: int) -> nn.Module:
        if not setting.rounds:
            return FullAttention(setting.dim, setting.num_heads, attn_drop=dropout)
        return LSHAttention(
            setting.dim, setting.num_heads, rounds=setting.rounds, chunk=setting.chunk,
            attn_drop=dropout, rotation_seed=index,
        )  # fmt: skip

    return ReversibleStack(
        (
            ReversibleBlock(
                PreNormAttention(setting.dim, attention(index), nn.Dropout(dropout)),
                FeedForward(
                    setting.dim, 4 * setting.dim, chunk_size=setting.ff_chunk, drop_rate=dropout
                ),
            )
            for index in range(depth)
        ),
        reversible,
    )


def prepare(depth: int, reversible: bool, **size: Any) -> Callable[[], object]:
    """A training step of a stack; weights and gradients exist before it."""
    setting = Setting(**size)
    torch.manual_seed(0)
    stack = build(depth, reversible, setting).train()
    for one in stack.parameters():
        one.grad = torch.zeros_like(one)
    x = torch.randn(setting.batch, setting.length, setting.dim)

    def work() -> None:
        first, second = stack(x, x)
        (first.square().mean() + second.square().mean()).backward()

    return work


def _cpu_seconds(jobs: list[dict[str, Any]]) -> list[float]:
    """CPU time of each training step on one thread."""
    threads, found = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        for job in jobs:
            work = prepare(**job)
            start = time.process_time()
            work()
            found.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return found


def gradient_gap(setting: Setting, depth: int = 4) -> dict[str, float]:
    """Relative difference of outputs and gradients, reversible against ordinary, with dropout."""
    found = []
    for kind in (True, False):
        torch.manual_seed(0)
        stack = build(depth, kind, setting, setting.dropout).train()
        x = torch.randn(1, setting.length, setting.dim, requires_grad=True)
        torch.manual_seed(1)
        first, second = stack(x, x)
        (first * torch.linspace(-1, 1, setting.dim) + second).square().mean().backward()
        weights = torch.cat([one.grad.flatten() for one in stack.parameters()])
        found.append((torch.cat([first, second]).detach(), x.grad, weights))
    names = ("outputs", "input gradient", "weight gradients")
    return {
        name: float((ours - plain).norm() / plain.norm())
        for name, ours, plain in zip(names, *found, strict=True)
    }


def _slope(depths: tuple[int, ...], peaks: list[float]) -> list[float]:
    """MB per layer with a 95 % interval."""
    fit = stats.linregress(depths, peaks)
    reach = stats.t.ppf(0.975, len(depths) - 2) * fit.stderr
    return [float(fit.slope), float(fit.slope - reach), float(fit.slope + reach)]


def _findings(scale, setting, slopes, gaps, seconds) -> list[Finding]:
    def finding(claim: str, holds: bool, evidence: str) -> Finding:
        outcome = "reproduced" if holds else "deviates"
        return Finding(claim, "not measured" if scale == "tiny" else outcome, evidence)

    share = slopes[True][0] / slopes[False][0]
    slower = np.array(seconds[True]) / np.array(seconds[False])
    words = {kind: f"{a:.2f} MB a layer [{b:.2f}, {c:.2f}]" for kind, (a, b, c) in slopes.items()}
    return [
        finding(
            "Memory does not grow with depth: at most 2 % of an ordinary layer is kept per layer.",
            share <= 0.02,
            f"reversible {words[True]}, ordinary {words[False]}: {100 * share:.2f} %",
        ),
        finding(
            "Results do not change: outputs and gradients are equal, dropout included.",
            max(gaps.values()) < 1e-4,
            f"at dropout {setting.dropout}, relative: "
            + ", ".join(f"{name} {value:.0e}" for name, value in gaps.items()),
        ),
        finding(
            "What it costs: each layer is computed once more, which takes less than another step.",
            1 < float(np.median(slower)) < 2,
            "time of a step over the ordinary one: "
            + ", ".join(f"{d} layers {r:.2f}" for d, r in zip(setting.depths, slower, strict=True)),
        ),
    ]


def _figure(setting, peaks, slopes):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.subplots()
    for kind, name, colour in ((False, "ordinary", "0.3"), (True, "reversible", "C0")):
        label = f"{name}: {slopes[kind][0]:.1f} MB a layer"
        axes.plot(setting.depths, peaks[kind], "o-", color=colour, label=label)
    axes.set_xticks(setting.depths)
    axes.set_xlabel("layers")
    axes.set_ylabel("peak memory of a training step, MB")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
    return figure
