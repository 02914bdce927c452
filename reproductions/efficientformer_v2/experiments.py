"""What the stride in front of attention saves (rows 7 and 8 of the design ladder, as costs)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness import Conditions, ExperimentResult, Finding, get_paper
from harness.measurement.latency import Effort, Timing
from harness.measurement.paper_counters import snap_profile
from harness.measurement.side_by_side import time_calls
from harness.meta import on_meta
from harness.settings import of_scale
from reproductions.efficientformer_v2.attention import Attention4D
from reproductions.efficientformer_v2.model import efficientformer_v2

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "efficientformer_v2"
SIZES = ("s0", "s1", "s2", "l")
NAMES = {"s0": "S0", "s1": "S1", "s2": "S2", "l": "L"}
#: scale -> (image sizes, networks to time, batch sizes, seconds per timed pair)
SCALES = {
    "small": ((224, 320, 448, 640), ("s0",), (1,), 3.0),
    "paper": ((224, 288, 384, 512, 640), SIZES, (1, 8), 20.0),
}


def published_rows(prefix: str) -> list[dict[str, Any]]:
    """The paper's printed numbers of all variants whose name starts with `prefix`."""
    rows = get_paper(PAPER).facts.published
    keep = ("variant", "metric", "value", "unit", "source")
    return [
        {key: getattr(row, key) for key in keep} for row in rows if row.variant.startswith(prefix)
    ]


def stride_attention(
    scale: str = "small",
    sizes: Sequence[int] | None = None,
    networks: Sequence[str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    seconds: float | None = None,
    device: str = "cpu",
) -> ExperimentResult:
    """Attention of stage 3 with and without the stride: the mixer alone, and whole networks.

    MACs are counted for all four networks. Latency is timed interleaved, on one thread.

    Args:
        scale: `small` (about a minute and a half on a CPU) or `paper` (all networks).
        sizes: image sides in pixels; the mixer's map is a sixteenth of them.
        networks: which whole networks to time (`s0`, `s1`, `s2`, `l`).
        batch_sizes: images per call.
        seconds: timing budget of one pair.
    """
    chosen = of_scale(SCALES, scale)
    sizes = sizes or chosen[0]
    networks, batch_sizes = networks or chosen[1], batch_sizes or chosen[2]
    seconds = seconds or chosen[3]
    effort = Effort(
        budget_s=seconds, half_width=0.03, min_rounds=5, palindromes=1,
        warm_up_s=min(0.1, seconds), warm_up_limit_s=min(1.0, seconds),
    )  # fmt: skip
    rows = []
    for side in sizes:
        for batch in batch_sizes:
            rows.append(_pair(f"mixer, {batch}", _mixer, side, batch, device, effort))
        for size in SIZES:
            network = partial(_network, size)
            for batch in batch_sizes if size in networks else (None,):
                rows.append(_pair(NAMES[size], network, side, batch, device, effort))
    return ExperimentResult(
        rows=rows,
        findings=[
            *_mixer_findings(rows),
            *_network_findings(rows),
            Finding(
                "The stride costs 0.2 points of top-1 (81.7 to 81.5 %); the survey says none",
                "not measured",
                "needs ImageNet and trainings that were not released",
            ),
        ],
        published=[
            row for row in published_rows("ladder")
            if row["variant"].startswith(("ladder row7", "ladder row8"))
        ],
        figures={"stride_attention": _stride_figure(rows)},
        notes=(
            "Ratios are strided over full resolution, with 95 % intervals. The mixer is that of S0 "
            "(96 channels). Batch norms are not folded. On a CPU the clock is the CPU time of one "
            "thread. MACs are those of the authors' counter."
        ),
        conditions=Conditions(
            device=device, threads=1 if device == "cpu" else None,
            options={"sizes": list(sizes), "batch_sizes": list(batch_sizes)},
        ),
    )  # fmt: skip


def _mixer(side: int, strided: bool) -> tuple[nn.Module, tuple[int, int, int]]:
    resolution = side // 16
    mixer = Attention4D(96, resolution, stride=2 if strided else 1)
    return mixer, (96, resolution, resolution)


def _network(size: str, side: int, strided: bool) -> tuple[nn.Module, tuple[int, int, int]]:
    model = efficientformer_v2(size=size, image_size=side, stride_attention=strided)
    return model, (3, side, side)


def _pair(
    name: str, make: Callable, side: int, batch: int | None, device: str, effort: Effort
) -> dict[str, Any]:
    """One row: costs of the strided and the full form; `batch=None` counts without timing."""
    macs, calls = {}, {}
    for strided in (False, True):
        with on_meta():
            module, shape = make(side, strided)
        macs[strided] = _macs(module, shape)
        if batch is not None:
            module, shape = make(side, strided)
            images = torch.randn(batch, *shape, device=device)
            if device == "cpu":  # as inside the network
                images = images.contiguous(memory_format=torch.channels_last)
            calls["strided" if strided else "full"] = partial(
                module.to(device).eval().requires_grad_(False), images
            )
    timings = time_calls(calls, device=device, effort=effort) if calls else {}
    row = {
        "what": name.split(",")[0], "image_size": side, "batch": batch,
        "macs_full": macs[False], "macs_strided": macs[True],
        "macs_ratio": macs[True] / macs[False],
    }  # fmt: skip
    return row | _latency_columns(timings)


def _latency_columns(timings: dict[str, Timing]) -> dict[str, Any]:
    keys = ("ms_full", "ms_strided", "latency_ratio", "ratio_low", "ratio_high", "status")
    if not timings:
        return dict.fromkeys(keys)
    strided = timings["strided"]
    values = (
        1e3 * timings["full"].median, 1e3 * strided.median, strided.ratio,
        *strided.ratio_interval, strided.ratio_status,
    )  # fmt: skip
    return dict(zip(keys, values, strict=True))


def _macs(module: nn.Module, shape: tuple[int, int, int]) -> int:
    """The authors' counter; a mixer is counted on its map."""
    if isinstance(module, Attention4D):
        wrapped = nn.Sequential(nn.Conv2d(3, shape[0], 1), module).to("meta")
        return snap_profile(wrapped, shape[1])[1] - 3 * shape[0] * shape[1] * shape[2]
    return snap_profile(module, shape[1])[1]


def _timed(rows: list[dict[str, Any]], mixer: bool) -> list[dict[str, Any]]:
    return [
        row for row in rows
        if row["latency_ratio"] is not None and (row["what"] == "mixer") == mixer
    ]  # fmt: skip


def _setting(row: dict[str, Any]) -> str:
    """The batch of a timed row, and how the timing went if not well."""
    return f"batch {row['batch']}" + (f", {row['status']}" if row["status"] != "ok" else "")


def _mixer_findings(rows: list[dict[str, Any]]) -> list[Finding]:
    timed = _timed(rows, mixer=True)
    faster = all(row["ratio_high"] < 1 for row in timed)
    text = ", ".join(
        f"{row['latency_ratio']:.2f} at {row['image_size']} px ({_setting(row)})" for row in timed
    )
    findings = [
        Finding(
            "Attention on a strided map is faster than at full resolution",
            "reproduced" if faster else "deviates",
            f"time of the mixer, strided over full: {text}",
        )
    ]
    first = [row for row in timed if row["batch"] == timed[0]["batch"]]
    if len(first) > 1:
        grows = first[-1]["ratio_high"] < first[0]["ratio_low"]
        findings.append(
            Finding(
                "The gain grows with the map, as attention is quadratic in its pixels",
                "reproduced" if grows else "deviates",
                f"ratio {first[0]['latency_ratio']:.2f} at {first[0]['image_size']} px and "
                f"{first[-1]['latency_ratio']:.2f} at {first[-1]['image_size']} px",
            )
        )
    return findings


def _network_findings(rows: list[dict[str, Any]]) -> list[Finding]:
    smallest = min(row["image_size"] for row in rows)
    counted = {
        row["what"]: row["macs_ratio"]
        for row in rows
        if row["what"] != "mixer" and row["image_size"] == smallest
    }
    findings = [
        Finding(
            "The stride lowers the MACs of the whole network (1.48 to 1.31 G in the ladder)",
            "reproduced" if all(ratio < 1 for ratio in counted.values()) else "deviates",
            f"released sizes at {smallest} px, strided over full: "
            + ", ".join(f"{name} {ratio:.2f}" for name, ratio in counted.items()),
        )
    ]
    timed = [row for row in _timed(rows, mixer=False) if row["image_size"] == smallest]
    if timed:
        faster = all(row["ratio_high"] < 1 for row in timed)
        findings.append(
            Finding(
                "The stride makes the whole network faster (3.5 to 1.5 ms on the phone, 0.43)",
                "reproduced" if faster else "deviates",
                f"time at {smallest} px, strided over full: "
                + ", ".join(
                    f"{row['what']} {row['latency_ratio']:.2f} "
                    f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}] ({_setting(row)})"
                    for row in timed
                ),
            )
        )
    return findings


def _stride_figure(rows: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    mixer = _timed(rows, mixer=True)
    mixer = [row for row in mixer if row["batch"] == mixer[0]["batch"]]
    sides = [row["image_size"] for row in mixer]
    for key, label, style in (
        ("ms_full", "full resolution", "o-"), ("ms_strided", "stride 2", "s--")
    ):  # fmt: skip
        left.plot(sides, [row[key] for row in mixer], style, label=label)
    left.set(
        yscale="log", xlabel="image side in pixels", ylabel="ms per call",
        title=f"The attention of stage 3 alone, batch {mixer[0]['batch']}",
    )  # fmt: skip
    left.legend(frameon=False)
    for size in NAMES.values():
        line = {row["image_size"]: row["macs_ratio"] for row in rows if row["what"] == size}
        right.plot(list(line), list(line.values()), ".-", label=f"MACs {size}")
    for row in _timed(rows, mixer=False):
        gap = [
            [row["latency_ratio"] - row["ratio_low"]],
            [row["ratio_high"] - row["latency_ratio"]],
        ]
        label = f"time {row['what']}, batch {row['batch']}"
        known = right.get_legend_handles_labels()[1]
        marker = "k" + "osD^"[batch_rank(rows, row["batch"])]
        right.errorbar(
            row["image_size"], row["latency_ratio"], gap, fmt=marker, capsize=3,
            mfc="white", label="_" if label in known else label,
        )  # fmt: skip
    right.axhline(1, color="0.7", linewidth=0.8)
    right.set(
        xlabel="image side in pixels", ylabel="strided / full resolution", ylim=(0, 1.15),
        title="The whole network",
    )  # fmt: skip
    right.legend(frameon=False, ncols=2, fontsize=8, loc="lower left")
    for axes in (left, right):
        axes.set_xticks(sides)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def batch_rank(rows: list[dict[str, Any]], batch: int) -> int:
    """The place of a batch size among those that were timed, for its marker."""
    return sorted({row["batch"] for row in rows if row["batch"] is not None}).index(batch)
