"""The training's techniques, each switched off: what the small, the middle and the large lose."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import ExperimentResult, Finding
from harness.statistics import mean_std
from reproductions.nasvit.counting import macs_of
from reproductions.nasvit.experiment_setup import ALL, NO_PROJECTION, Arm, Bench, choose_setting
from reproductions.nasvit.judging import BLUE, GREEN, ORANGE, judge
from reproductions.nasvit.space import get_space

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAIVE = Arm(
    "none of them", {"projection": False, "distillation": "none"}, switched=False, strong=True
)
ARMS = (
    ALL,
    NO_PROJECTION,
    Arm("one shared layer scale", switched=False),
    Arm("strong augmentation", strong=True),
    Arm("no distillation", {"distillation": "none"}),
    NAIVE,
)
KINDS = ("smallest", "random", "largest")

Accuracies = Mapping[str, Mapping[str, list[float]]]  # arm -> kind -> per seed, in %


def techniques(scale: str = "small", **options: Any) -> ExperimentResult:
    """Supernets with one technique less, judged by their smallest, random and largest networks.

    The paper names three techniques: projection, switched layer scales, and the simplified recipe.
    Distillation by the adaptive alpha-divergence is older, and beside them.

    Args:
        scale: `small` (fashion_mini, on a CPU), `tiny` (does it run?) or `paper` (ImageNet).
        options: fields of `Setting`.
    """
    setting = choose_setting(scale, options)
    bench = Bench(setting)
    space = get_space(setting.space)
    rng = random.Random(0)  # the same random networks for every arm and seed
    randoms = [space.sample(rng) for _ in range(setting.random_networks)]
    configs = {"smallest": [space.smallest()], "random": randoms, "largest": [space.largest()]}
    found: dict[str, dict[str, list[float]]] = {}
    rows = []
    for arm in ARMS:
        found[arm.name] = {kind: [] for kind in KINDS}
        for seed in setting.seeds:
            supernet, trained = bench.supernet(arm, seed)
            accuracy = bench.judge(supernet)
            for kind, networks in configs.items():
                values = [accuracy(one) for one in networks]
                found[arm.name][kind].append(float(np.mean(values)))
            row = {"trained": arm.name, "seed": seed}
            row |= {f"{kind}_top1": round(found[arm.name][kind][-1], 2) for kind in KINDS}
            rows.append({**row, "seconds": round(trained.value("train_time"), 1)})
    macs = {
        kind: np.mean([macs_of(space, one, bench.num_classes) for one in networks]) / 1e6
        for kind, networks in configs.items()
    }
    return ExperimentResult(
        rows=rows,
        findings=_findings(found),
        figures={"techniques": _figure(found, macs)},
        notes=(
            f"`random` is the mean of {len(randoms)} networks, the same for all. "
            f"{bench.protocol()} The strong recipe is {setting.strong_recipe}."
        ),
        conditions=bench.conditions(),
    )


def _findings(found: Accuracies) -> list[Finding]:
    whole = found[ALL.name]
    claims = {
        NO_PROJECTION.name: "Gradient projection helps the smallest network",
        "one shared layer scale": "Switched layer scales help",
        "strong augmentation": "The simplified recipe helps",
        "no distillation": "Learning from the largest network helps the smallest one",
        NAIVE.name: "All techniques together beat plain supernet training",
    }
    judged = []
    for name, claim in claims.items():
        kinds = ("smallest",) if "smallest" in claim else KINDS
        better, than = (
            np.mean([arm[kind] for kind in kinds], axis=0).tolist() for arm in (whole, found[name])
        )
        of = "of the smallest network" if len(kinds) == 1 else "of smallest, random and largest"
        judged.append(judge(claim, better, than, f"points {of}"))
    return judged


def _figure(found: Accuracies, macs: Mapping[str, float]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4), layout="constrained")
    axes = figure.subplots()
    for offset, (kind, color) in enumerate(zip(KINDS, (GREEN, BLUE, ORANGE), strict=True)):
        for place, arm in enumerate(found.values()):
            summary = mean_std(arm[kind])
            axes.errorbar(
                summary.mean, place + 0.22 * (offset - 1), xerr=summary.std or 0, fmt="o",
                color=color, capsize=3,
                label=f"{kind}, {macs[kind]:.1f} M multiply-adds" if place == 0 else None,
            )  # fmt: skip
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("top-1 on the test split (%), mean and deviation over seeds")
    axes.legend(frameon=False, fontsize=9)
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
