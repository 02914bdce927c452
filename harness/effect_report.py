"""The table, findings and picture of `harness.effect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import registry
from harness.effect import CONTROL, PARENT, Arm, Claim, Run, Runs, Setting, test_split
from harness.evaluation import bits_of
from harness.experiment import Finding
from harness.measurement.latency import Timing
from harness.measurement.macs import MacsDistribution, count_macs_distribution
from harness.measurement.side_by_side import time_models
from harness.statistics import Interval, adjust_p_values, mcnemar, mean_std, paired_means
from harness.tokens import sample_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Below it, a difference between two arms is called one.
SIGNIFICANT = 0.05
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")
MARKERS = "osD^vP*X<>"


@dataclass(frozen=True)
class Difference:
    """Top-1 of one arm minus that of another, in points.

    Attributes:
        interval: t interval over seeds, paired; of a single seed, over its test images.
        p_value: McNemar's test with the images of all seeds put together.
    """

    points: float
    interval: Interval
    p_value: float
    seeds: int

    @classmethod
    def of(cls, a: Sequence[Run], b: Sequence[Run]) -> Difference:
        """`a` minus `b`; entry s of both has the same seed and the same test images."""
        pooled = mcnemar(*(np.concatenate([bits_of(run.top1) for run in one]) for one in (a, b)))
        if len(a) == 1:
            low, high = pooled.interval
            return cls(100 * pooled.difference, (100 * low, 100 * high), pooled.p_value, 1)
        seeds = paired_means(*([run.top1.value for run in one] for one in (a, b)))
        return cls(seeds.difference, seeds.interval, pooled.p_value, seeds.n)

    @property
    def short(self) -> str:
        """Value and interval."""
        value, low, high = (round(one, 2) + 0.0 for one in (self.points, *self.interval))  # no -0
        return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"

    def __str__(self) -> str:
        over = f"{self.seeds} seeds" if self.seeds > 1 else "the images of one seed"
        return self.short.replace(" ", " points ", 1) + f" over {over}"


@dataclass(frozen=True)
class Cost:
    """What one arm costs; `timing` is relative to the dense control."""

    params: int
    macs: MacsDistribution
    timing: Timing | None


def report(
    arms: Sequence[Arm],
    runs: Runs,
    claims: Sequence[Claim],
    setting: Setting,
) -> dict[str, Any]:
    """Rows, findings and figures of an `ExperimentResult`.

    Costs are those of the first seed's models.
    """
    costs = _costs(arms, runs, setting)
    gaps = {name: Difference.of(one, runs[CONTROL]) for name, one in runs.items()}
    rivals = [name for name in runs if name != CONTROL]
    adjusted = adjust_p_values([gaps[name].p_value for name in rivals])
    p_values = dict(zip(rivals, map(float, adjusted), strict=True))
    trained = {arm.name: _training(arm, setting) for arm in arms} | {PARENT: "parent"}
    rows = [
        _row(name, trained[name], one, gaps[name], p_values.get(name), costs[name])
        for name, one in runs.items()
    ]
    if setting.seconds == 0:  # nothing was timed
        for row in rows:
            del row["time (ms)"], row["speed-up"]
    return {
        "rows": rows,
        "findings": judge(claims, runs),
        "figures": {"effect": draw(runs, costs)},
    }


def judge(claims: Sequence[Claim], runs: Runs) -> list[Finding]:
    """Which arm beats which, in words.

    An arm beats another if the interval over seeds lies above zero and McNemar's test, corrected
    for the number of claims, agrees. It "holds" if the interval lies above `-within`.
    """
    gaps = [Difference.of(runs[claim.better], runs[claim.than]) for claim in claims]
    adjusted = adjust_p_values([gap.p_value for gap in gaps])
    return [
        _finding(claim, gap, float(p_value))
        for claim, gap, p_value in zip(claims, gaps, adjusted, strict=True)
    ]


def _finding(claim: Claim, gap: Difference, p_value: float) -> Finding:
    low, high = gap.interval
    evidence = f"{gap}; McNemar p = {p_value:.2g}"
    if claim.within is not None:
        held = low > -claim.within
        word = "loses at most" if held else "is not shown to lose at most"
        return Finding(
            claim.text, "reproduced" if held else "deviates",
            f"{claim.better} {word} {claim.within:g} points against {claim.than}: {evidence}",
        )  # fmt: skip
    sure = p_value < SIGNIFICANT
    if low > 0 and sure:
        return Finding(claim.text, "reproduced", f"{claim.better} beats {claim.than}: {evidence}")
    if high < 0 and sure:
        said = f"{claim.better} loses to {claim.than}: {evidence}"
    else:
        said = f"{claim.better} does not beat {claim.than}, no difference detected: {evidence}"
    return Finding(claim.text, "deviates", said)


def _costs(arms: Sequence[Arm], runs: Runs, setting: Setting) -> dict[str, Cost]:
    """Cost of every arm's first model; the parent costs what the control does."""
    models = {arm.name: runs[arm.name][0].model.to(setting.device) for arm in arms}
    count = max(setting.cost_images, setting.batch_size)
    sample = sample_images(models[CONTROL], test_split(setting), count)
    timings: dict[str, Timing] = {}
    if setting.seconds > 0:
        batches = [one for one in sample.inputs.split(setting.batch_size)
                   if len(one) == setting.batch_size]  # fmt: skip
        timings = time_models(
            models, batches, device=setting.device, threads=setting.threads,
            budget_s=setting.seconds, warm_up_s=min(0.2, setting.seconds / 10),
            warm_up_limit_s=min(2.0, setting.seconds / 5), half_width=0.01, palindromes=1,
        )  # fmt: skip
    costs = {}
    for arm in arms:
        model = models[arm.name]
        dynamic = registry.get_variant(arm.variant).spec.dynamic
        macs = count_macs_distribution(
            model, sample.inputs[: setting.cost_images if dynamic else 1]
        )
        params = sum(one.numel() for one in model.parameters())
        costs[arm.name] = Cost(params, macs, timings.get(arm.name))
    return costs | {PARENT: costs[CONTROL]}


def _training(arm: Arm, setting: Setting) -> str:
    if arm.start == "scratch":
        return "from scratch"
    return f"+{setting.epochs} epochs" if arm.train else "none"


def _row(
    name: str,
    trained: str,
    runs: Sequence[Run],
    gap: Difference,
    p_value: float | None,
    cost: Cost,
) -> dict[str, Any]:
    top1 = mean_std([run.top1.value for run in runs])
    timing = cost.timing if name != PARENT else None
    compared = name != CONTROL
    return {
        "arm": name,
        "training": trained,
        "top-1 (%)": round(top1.mean, 2),
        "±": round(top1.mean - top1.interval[0], 2) if top1.interval else None,
        "against control (points)": gap.short if compared else "",
        "p": float(f"{p_value:.2g}") if compared else None,
        "params": cost.params,
        "MACs (M)": round(cost.macs.mean / 1e6, 2),
        "p5 to p95": f"{cost.macs.p5 / 1e6:.2f} to {cost.macs.p95 / 1e6:.2f}",
        "time (ms)": round(1e3 * timing.median, 2) if timing else None,
        "speed-up": _speed_up(timing) if timing else "",
        "images seen": round(float(np.mean([run.images for run in runs]))),
        "training (s)": round(float(np.mean([run.seconds for run in runs])), 1),
    }


def _speed_up(timing: Timing) -> str:
    """How many times as fast as the dense control, with its interval."""
    low, high = timing.ratio_interval
    state = "" if timing.ratio_status == "ok" else f", {timing.ratio_status}"
    return f"{1 / timing.ratio:.2f} [{1 / high:.2f}, {1 / low:.2f}]{state}"


# the picture


def draw(runs: Runs, costs: Mapping[str, Cost]) -> Figure:
    """Accuracy against MACs and against measured time: one point per arm, bars over seeds.

    Arms that all cost the same stand in rows instead.
    """
    from matplotlib.figure import Figure

    names = [name for name in runs if name != PARENT]
    timed = all(costs[name].timing for name in names)
    if not timed and len({costs[name].macs.mean for name in names}) == 1:
        return draw_arms({name: runs[name] for name in names}, CONTROL)
    figure = Figure(figsize=(10 if timed else 6.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
    for number, name in enumerate(names):
        style = {
            "color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)],
            "label": name, "capsize": 3, "linestyle": "none", "markersize": 7,
        }  # fmt: skip
        top1 = mean_std([run.top1.value for run in runs[name]])
        ends = top1.interval or runs[name][0].top1.interval
        reach = [[top1.mean - ends[0]], [ends[1] - top1.mean]]
        cost = costs[name]
        panels[0].errorbar(cost.macs.mean / 1e6, top1.mean, reach, **style)
        if timed:
            panels[1].errorbar(1e3 * cost.timing.median, top1.mean, reach, **style)
    _finish(panels[0], "multiply-adds per image (M)", runs)
    if timed:
        _finish(panels[1], "measured time per batch (ms)", runs)
        panels[1].set_ylabel("")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def draw_arms(runs: Runs, reference: str) -> Figure:
    """Top-1 of every arm: a dot per seed, a bar for the mean's interval; a line at a reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 * len(runs) + 1.4), layout="constrained")
    axes = figure.subplots()
    for place, (name, one) in enumerate(reversed(runs.items())):
        values = [run.top1.value for run in one]
        summary = mean_std(values)
        colour = "C3" if name == reference else "C0"
        low, high = summary.interval or one[0].top1.interval
        axes.plot([low, high], [place, place], color=colour, linewidth=5, alpha=0.25)
        axes.plot(values, [place] * len(values), "o", color=colour, markersize=4)
        axes.plot(summary.mean, place, "|", color=colour, markersize=16)
    axes.axvline(mean_std([run.top1.value for run in runs[reference]]).mean, color="0.85", zorder=0)
    axes.set_yticks(range(len(runs)), labels=list(reversed(runs)))
    axes.set(xlabel="top-1, % (dots: seeds; band: 95 % of the mean)", ylim=(-0.6, len(runs) - 0.4))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _finish(axes: Axes, label: str, runs: Runs) -> None:
    seeds = len(runs[CONTROL])
    control = mean_std([run.top1.value for run in runs[CONTROL]]).mean
    axes.axhline(control, color="0.8", linewidth=0.8, zorder=0)
    over = f"mean of {seeds} seeds" if seeds > 1 else "one seed"
    axes.set(xlabel=label, ylabel=f"top-1, % ({over}, 95 %)")
    axes.spines[["top", "right"]].set_visible(False)
