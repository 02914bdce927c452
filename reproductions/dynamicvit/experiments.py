"""What keeping fewer tokens saves: the printed counts recounted, and the time it takes here.

replivit run dynamicvit/keep_ratio                   # about eight minutes on one CPU thread
replivit run dynamicvit/keep_ratio --scale paper     # every DeiT and LV-ViT, every ratio
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import harness
from harness import Conditions, ExperimentResult, Finding, ReplivitError
from harness.measurement.latency import Timing
from harness.measurement.macs import count_macs
from harness.measurement.macs_fvcore import count_macs_fvcore
from harness.measurement.side_by_side import time_models
from harness.measurement.yardstick import seeded_images
from harness.settings import of_scale
from reproductions.dynamicvit.recount import Model, Recount, recount_printed, unpruned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = "dynamicvit"


#: The dense parent that each base is timed against: timm's fused one where timm has it.
PARENTS = {
    "deit_ti": Model("deit_ti"),
    "deit_s": Model("deit_s"),
    "deit_b": Model("deit_b"),
    "lvvit_s": unpruned("lvvit_s"),
    "lvvit_m": unpruned("lvvit_m"),
}


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        timed: (base, batch sizes, keep ratios), each a group that is timed together.
        seconds: budget of a group.
        recount: whether the printed counts are counted again.
    """

    timed: tuple[tuple[str, tuple[int, ...], tuple[float, ...]], ...]
    seconds: float
    recount: bool = True


RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
SETTINGS = {
    "tiny": Setting((("deit_ti", (1,), (0.7,)),), 0.5, recount=False),
    "small": Setting(
        (("deit_ti", (1, 8, 32), (0.9, 0.7, 0.5)), ("deit_s", (1, 8, 32), RATIOS)), 20.0
    ),
    "paper": Setting(tuple((base, (1, 8, 32), RATIOS) for base in PARENTS), 120.0),
}


def keep_ratio(
    scale: str = "small",
    *,
    bases: str | Sequence[str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    ratios: Sequence[float] | None = None,
    deployed: bool = False,
    seconds: float | None = None,
    recount: bool | None = None,
    threads: int = 1,
    device: str = "cpu",
) -> ExperimentResult:
    """Table 1, 2 and 5 as counts, and the speed of every keep ratio against the dense parent.

    A model and its parent are timed in alternation on the same images; the parent's attention is
    fused. With `recount`, every printed number of parameters and MACs gets a finding.

    Args:
        scale: `small` (DeiT-Ti and DeiT-S), `paper` (all DeiT and LV-ViT), `tiny` (does it run?).
        bases, batch_sizes, ratios: time these instead (bases: deit_ti, deit_s, deit_b, lvvit_s,
            lvvit_m).
        deployed: both sides in deployment form.
        seconds: of timing per base and batch size.

    Raises:
        ReplivitError: unknown scale or base.
    """
    setting = of_scale(SETTINGS, scale)
    groups = [
        (base, tuple(batch_sizes or own_batches), tuple(ratios or own_ratios))
        for base, own_batches, own_ratios in _groups(setting, bases)
    ]
    budget = setting.seconds if seconds is None else seconds
    rows = [
        row
        for base, batches, shares in groups
        for row in _time_base(base, batches, shares, budget, deployed, threads, device)
    ]
    recount = setting.recount if recount is None else recount
    counted = recount_printed() if recount else []
    return ExperimentResult(
        rows,
        [*_speed_findings(rows), *(one.finding for one in counted)],
        published=_published_speed(),
        figures={"keep_ratio": _draw(rows, counted)},
        notes=(
            "Speed-up is the time of the fused dense parent over that of the pruned model, timed "
            "in alternation, with a 95 % interval; on one CPU thread CPU time is read. MACs are "
            "multiply-adds of convolutions and matrix products; 'by the paper' is fvcore's total, "
            "which adds five per element of a layer norm. Weights are random: which tokens stay "
            "changes nothing about the cost. The paper's throughputs are of an RTX 3090 at batch "
            "32, against a parent without fused attention."
        ),
        conditions=Conditions(
            device=device, threads=threads, image_size=224, seed=0,
            backend="deploy" if deployed else "eager",
        ),
    )  # fmt: skip


def _groups(setting: Setting, bases: str | Sequence[str] | None) -> list[tuple]:
    if bases is None:
        return list(setting.timed)
    bases = [bases] if isinstance(bases, str) else bases
    known = {group[0]: group for group in SETTINGS["paper"].timed}
    for base in bases:
        if base not in known:
            raise ReplivitError(f"no base {base!r}; known: {', '.join(known)}")
    own = {group[0]: group for group in setting.timed}
    return [own.get(base, known[base]) for base in bases]


# measured time


def _time_base(
    base: str,
    batch_sizes: Sequence[int],
    ratios: Sequence[float],
    seconds: float,
    deployed: bool,
    threads: int,
    device: str,
) -> list[dict[str, Any]]:
    """One row per batch size and ratio; the dense parent's row first."""
    pruned = Model(f"dynamicvit_{base}_k07")
    models = {"dense": PARENTS[base].build()}
    for ratio in ratios:
        models[f"{ratio:g}"] = replace(pruned, options={"keep_ratio": ratio}).build()
    macs = {name: count_macs(model, 224).total for name, model in models.items()}
    paper = {name: count_macs_fvcore(model, 224).total for name, model in models.items()}
    if deployed:
        models = {name: harness.deploy(model, 224) for name, model in models.items()}
    rows = []
    for batch in batch_sizes:
        timings = time_models(
            models, seeded_images(batch, 224, count=2), device=device, threads=threads,
            budget_s=seconds, min_rounds=5, palindromes=1, half_width=0.01,
            warm_up_s=min(0.2, seconds), warm_up_limit_s=min(2.0, seconds),
        )  # fmt: skip
        rows += [
            _row(base, name, batch, macs["dense"] / macs[name], macs[name], paper[name], timing)
            for name, timing in timings.items()
        ]
    return rows


def _row(
    base: str, name: str, batch: int, ratio: float, macs: int, paper: int, timing: Timing
) -> dict[str, Any]:
    low, high = timing.ratio_interval
    return {
        "base": base,
        "keep": name,
        "batch": batch,
        "MACs (G)": round(macs / 1e9, 3),
        "by the paper (G)": round(paper / 1e9, 3),
        "MACs ratio": round(ratio, 3),
        "time (ms)": round(1e3 * timing.median, 2),
        "speed-up": round(1 / timing.ratio, 3),
        "low": round(1 / high, 3),
        "high": round(1 / low, 3),
        "timing": timing.ratio_status,
    }


def _speed_findings(rows: Sequence[dict[str, Any]]) -> list[Finding]:
    """The paper's two statements on speed, for every base and batch size."""
    findings = []
    for row in rows:
        seen = (
            f"{row['speed-up']:.2f} times [{row['low']:.2f}, {row['high']:.2f}] at a MACs ratio "
            f"of {row['MACs ratio']:.2f}" + ("" if row["timing"] == "ok" else f"; {row['timing']}")
        )
        where = f"{row['base']}, batch {row['batch']}"
        if row["keep"] == "0.7":
            claim = f"Keeping 0.7 makes the dense parent 43 to 54 % faster ({where})"
            held = row["low"] >= 1.43
        elif row["keep"] == "0.9":
            claim = f"Keeping 0.9 is faster than the dense parent ({where})"
            held = row["low"] > 1
        else:
            continue
        findings.append(Finding(claim, "reproduced" if held else "deviates", seen))
    return findings


def _published_speed() -> list[dict[str, Any]]:
    """The paper's Table 1: throughput, and what it is relative to the dense parent's."""
    facts = harness.get_paper(PAPER).facts.published
    rows = [row for row in facts if row.metric == "throughput"]
    macs = {row.variant: row.value for row in facts if row.metric == "macs_g"}
    dense = {row.variant: row.value for row in rows if "/" not in row.variant}
    table = []
    for row in rows:
        parent = row.variant.removeprefix("DynamicViT-").partition("/")[0]
        table.append({
            "model": row.variant, "MACs (G)": macs.get(row.variant), "images/s": row.value,
            "speed-up": round(row.value / dense[parent], 3) if parent in dense else None,
            "source": row.source,
        })  # fmt: skip
    return table


# the picture


def _draw(rows: Sequence[dict[str, Any]], counted: Sequence[Recount]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    macs = [one for one in counted if one.metric == "macs_g" and "issue" not in one.source]
    macs.sort(key=lambda one: one.relative)
    panels = 2 if macs else 1
    height = max(4.4, 0.19 * len(macs) + 1.2)
    figure = Figure(figsize=(5.6 * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _draw_speed(axes[0], rows)
    if macs:
        palette = {"reproduced": "#4c72b0", "deviates": "#c44e52"}
        colours = [palette[one.finding.outcome] for one in macs]
        axes[1].barh(range(len(macs)), [100 * one.relative for one in macs], color=colours)
        labels = [f"{one.name}: {one.printed:g} G" for one in macs]
        axes[1].set_yticks(range(len(macs)), labels, fontsize=7)
        axes[1].axvline(0, color="black", linewidth=0.8)
        axes[1].set(
            xlabel="counted by the paper's rule, % above the printed number",
            title="Printed MACs, counted again",
        )
        axes[1].spines[["top", "right"]].set_visible(False)
        handles = [Patch(color=colour, label=name) for name, colour in palette.items()]
        axes[1].legend(handles=handles, frameon=False, fontsize=9, loc="lower right")
    return figure


def _draw_speed(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Measured against counted saving; on the line, time follows the MACs."""
    pruned = [row for row in rows if row["keep"] != "dense"]
    groups = list(dict.fromkeys((row["base"], row["batch"]) for row in pruned))
    for number, (base, batch) in enumerate(groups):
        own = sorted(
            (row for row in pruned if (row["base"], row["batch"]) == (base, batch)),
            key=lambda row: row["MACs ratio"],
        )
        values = [row["speed-up"] for row in own]
        reach = [[row["speed-up"] - row["low"] for row in own],
                 [row["high"] - row["speed-up"] for row in own]]  # fmt: skip
        axes.errorbar(
            [row["MACs ratio"] for row in own], values, reach, capsize=2, markersize=5,
            marker="os^Dv*"[number % 6], label=f"{base}, batch {batch}", linewidth=1,
        )  # fmt: skip
    top = max([row["MACs ratio"] for row in pruned] + [row["high"] for row in pruned]) * 1.05
    axes.plot([1, top], [1, top], color="0.7", linewidth=0.8, linestyle="--", zorder=0)
    axes.set(
        xlabel="MACs of the dense parent / MACs", ylabel="time of the dense parent / time",
        title="Measured speed against counted work",
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
