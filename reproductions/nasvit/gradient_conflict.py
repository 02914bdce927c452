"""The paper's observation, measured: do small networks pull against the large one?

A space with attention and one of equal size without are trained, each with and without projection.
On batches of training images the subnets' gradient is then compared with the largest network's,
parameter tensor by parameter tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import ExperimentResult, Finding
from reproductions.nasvit.conflict import Conflict, measure_conflict
from reproductions.nasvit.counting import macs_of, params_of
from reproductions.nasvit.experiment_setup import (
    ALL,
    CNN,
    CNN_NO_PROJECTION,
    NO_PROJECTION,
    Arm,
    Bench,
    choose_setting,
)
from reproductions.nasvit.judging import BLUE, GREY, ORANGE, judge
from reproductions.nasvit.space import Space, get_space

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    ALL: "attention, projection", NO_PROJECTION: "attention, plain sum",
    CNN: "convolutions, projection", CNN_NO_PROJECTION: "convolutions, plain sum",
}  # fmt: skip

Found = Mapping[Arm, list[list[Conflict]]]  # per seed, per batch


def gradient_conflict(scale: str = "small", **options: Any) -> ExperimentResult:
    """Cosines between the gradients of subnets and supernet, in two spaces, two ways to train.

    Args:
        scale: `small` (fashion_mini, on a CPU), `tiny` (does it run?) or `paper` (ImageNet).
        options: fields of `Setting`.
    """
    setting = choose_setting(scale, options)
    bench = Bench(setting)
    batches = bench.conflict_batches(setting.conflict_batches)
    found: dict[Arm, list[list[Conflict]]] = {arm: [] for arm in NAMES}
    curves: dict[Arm, list[list[float]]] = {arm: [] for arm in NAMES}
    for seed in setting.seeds:
        for arm in NAMES:
            supernet, trained = bench.supernet(arm, seed)
            device = next(supernet.parameters()).device
            found[arm].append(
                [
                    measure_conflict(supernet, images.to(device), labels.to(device), number)
                    for number, (images, labels) in enumerate(batches)
                ]
            )
            curves[arm].append([100 * row["conflict"] for row in trained.history])
    rows = [
        _row(arm, seed, conflicts)
        for arm, runs in found.items()
        for seed, conflicts in zip(setting.seeds, runs, strict=True)
    ]
    return ExperimentResult(
        rows=rows,
        findings=_findings(found),
        figures={"histogram": draw_histograms(found), "curve": _draw_curves(curves)},
        notes=f"{_sizes(setting.space, setting.cnn_space, bench.num_classes)} {bench.protocol()}",
        conditions=bench.conditions(),
        detail={"curves": {NAMES[arm]: runs for arm, runs in curves.items()}},
    )


def _joined(conflicts: list[Conflict], field: str) -> np.ndarray:
    return np.concatenate([getattr(one, field) for one in conflicts])


def _row(arm: Arm, seed: int, conflicts: list[Conflict]) -> dict[str, Any]:
    attention, before = _joined(conflicts, "attention"), _joined(conflicts, "before")

    def share(values: np.ndarray) -> float | None:
        return round(100 * float((values < 0).mean()), 2) if len(values) else None

    return {
        "trained": NAMES[arm],
        "seed": seed,
        "tensors": len(conflicts[0].names),
        "conflict_percent": share(before),
        "in_attention_percent": share(before[attention]),
        "elsewhere_percent": share(before[~attention]),
        "median_cosine": round(float(np.median(before)), 4),
        "whole_cosine": round(float(np.mean([one.whole for one in conflicts])), 4),
        "against_subnets_plain_percent": share(_joined(conflicts, "plain")),
        "against_subnets_projected_percent": share(_joined(conflicts, "projected")),
        "exempt_percent": round(100 * float(_joined(conflicts, "exempt").mean()), 2),
    }


def _per_seed(runs: list[list[Conflict]], field: str = "before") -> list[float]:
    """The share of tensors in conflict, in %, for every seed."""
    return [100 * float((_joined(one, field) < 0).mean()) for one in runs]


def _findings(found: Found) -> list[Finding]:
    plain, projected = (
        np.concatenate([_joined(one, field) for runs in found.values() for one in runs])
        for field in ("plain", "projected")
    )
    exempt = np.concatenate([_joined(one, "exempt") for runs in found.values() for one in runs])
    left = int(((projected < -1e-6) & ~exempt).sum())
    return [
        judge(
            "Subnets and supernet disagree more with attention than with convolutions",
            _per_seed(found[NO_PROJECTION]), _per_seed(found[CNN_NO_PROJECTION]),
            "points of tensors in conflict",
        ),
        judge(
            "Training with projection leaves less disagreement",
            _per_seed(found[NO_PROJECTION]), _per_seed(found[ALL]),
            "points of tensors in conflict",
        ),
        Finding(
            "Projection keeps the step from working against the subnets",
            "deviates" if left else "reproduced",
            f"the plain sum points against the subnets in {100 * (plain < 0).mean():.2f} % of "
            f"{plain.size} tensors, the projected one in {100 * (projected < 0).mean():.2f} %, "
            f"{left} of them in the {100 * (~exempt).mean():.0f} % where nothing limits the "
            "projection: neither its bound nor what is added to the squared norm",
        ),
    ]  # fmt: skip


def _sizes(space: str, cnn_space: str, num_classes: int) -> str:
    """How equal the two spaces are."""

    def told(one: Space) -> str:
        low, high = one.smallest(), one.largest()
        macs = [macs_of(one, config, num_classes) / 1e6 for config in (low, high)]
        params = [params_of(one, config, num_classes) / 1e3 for config in (low, high)]
        return (
            f"{one.name} spans {macs[0]:.1f} to {macs[1]:.1f} M multiply-adds and {params[0]:.0f} "
            f"to {params[1]:.0f} k parameters"
        )

    return f"{told(get_space(space))}; {told(get_space(cnn_space))}."


def draw_histograms(found: Found) -> Figure:
    """Cosines before, and of the gradient that is used; one panel per space."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, arm in zip(figure.subplots(1, 2, sharey=True), (ALL, CNN), strict=True):
        conflicts = [one for run in found[arm] for one in run]
        _histogram(axes, conflicts)
        axes.set_title("with attention" if arm is ALL else "convolutions only", fontsize=11)
    figure.axes[0].set_ylabel("part of the tensors")
    return figure


def _histogram(axes: Axes, conflicts: list[Conflict]) -> None:
    edges = np.linspace(-1, 1, 41)
    before, after = _joined(conflicts, "before"), _joined(conflicts, "projected")
    share = np.full(len(before), 1 / len(before))
    axes.hist(before, edges, weights=share, color=ORANGE, alpha=0.75,
              label=f"subnets and largest: {100 * (before < 0).mean():.0f} % below 0")  # fmt: skip
    axes.hist(after, edges, weights=share, histtype="step", color=BLUE, linewidth=1.8,
              label=f"subnets and the step taken: {100 * (after < 0).mean():.0f} %")  # fmt: skip
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("cosine of two gradients of one tensor")
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curves(curves: Mapping[Arm, list[list[float]]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for arm, runs in curves.items():
        mean = np.mean(runs, axis=0)
        axes.plot(
            range(1, len(mean) + 1), mean, marker="o", label=NAMES[arm],
            color=ORANGE if arm.convolutional else BLUE,
            linestyle="-" if arm.objective.get("projection", True) else "--",
        )  # fmt: skip
    axes.set_xlabel("epoch")
    axes.set_ylabel("tensors in conflict (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
