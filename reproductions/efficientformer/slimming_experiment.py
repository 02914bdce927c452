"""The search from end to end: supernet, latency table, slimming, training from scratch, rivals.

    replivit run efficientformer/slimming                  # minutes on a CPU, fashion_mini
    replivit run efficientformer/slimming --scale paper    # ImageNet, widths and depths of L7

Training runs live in `training/` and are found again: an experiment that was stopped goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import harness
from harness import Conditions, ExperimentResult, Finding, ReplivitError
from harness.data import create_transform, get_track, hold_out, load_split
from harness.evaluation import bits_of
from harness.measurement.macs import count_macs
from harness.meta import on_meta
from harness.settings import as_seeds, choose
from harness.statistics import mcnemar, mean_std, paired_means
from harness.training import Recipe, TrainedModel, read_recipe

from .latency_table import EFFORT, LatencyTable, measure_networks, measure_table
from .model import EfficientFormer
from .slimming import Step, accuracy, recalibrate, scale_uniformly, slim
from .supernet import AnnealTemperature, Architecture, SuperNet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Setting:
    """Sizes of a search.

    Attributes:
        supernet: keyword arguments of `SuperNet`: depths, widths and what all its networks share.
        recipe: changes of the track's recipe.
        table_s: seconds of timing for the latency table.
        score_images: images held out of the supernet's training, on which the accuracy drop is
            measured.
        recalibration_images: others held out, for batch norm statistics.
    """

    track: str
    image_size: int
    supernet: dict[str, Any]
    supernet_epochs: int
    epochs: int
    recipe: str | None = None
    table_s: float = 20.0
    score_images: int = 1000
    recalibration_images: int = 250

    @property
    def held_out(self) -> int:
        """Images that the supernet's training leaves out."""
        return self.score_images + self.recalibration_images


SMALL = dict(strides=(2, 1), key_dim=16, num_heads=4, attn_ratio=2)
SETTINGS = {
    "tiny": Setting(
        "fashion_mini", 32, dict(depths=(1, 2, 2), widths=(16, 32, 48), **SMALL), 1, 1,
        table_s=1.0, score_images=200, recalibration_images=100,
    ),
    "small": Setting(
        "fashion_mini", 32, dict(depths=(3, 3, 3), widths=(32, 64, 96), **SMALL), 4, 4
    ),
    "paper": Setting(
        "imagenet", 224, dict(depths=(6, 6, 18, 8), widths=(96, 192, 384, 768)), 100, 300,
        recipe="imagenet", table_s=600.0, score_images=5000, recalibration_images=1000,
    ),
}  # fmt: skip


def held_out_images(setting: Setting, root: str | Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """(images and labels to score on, images to recalibrate with), unaugmented, disjoint."""
    _, held = hold_out(load_split(setting.track, "train", root=root), setting.held_out)
    transform = create_transform(get_track(setting.track).input, setting.image_size)
    order = np.random.default_rng(0).permutation(len(held)).tolist()
    pairs = [held[index] for index in order]
    images = torch.stack([transform(image) for image, _ in pairs])
    labels = torch.tensor([label for _, label in pairs])
    split = setting.score_images
    return images[:split], labels[:split], images[split:]


class Scorer:
    """Accuracy in percent of a network with the supernet's weights; every network once."""

    def __init__(self, supernet: SuperNet, images: Tensor, labels: Tensor, recalibration: Tensor):
        self.supernet, self.images, self.labels = supernet, images, labels
        self.recalibration = recalibration
        self.known: dict[Architecture, float] = {}

    def __call__(self, architecture: Architecture) -> float:
        if architecture not in self.known:
            network = self.supernet.inherit(architecture)
            recalibrate(network, self.recalibration)
            self.known[architecture] = accuracy(network, self.images, self.labels)
        return self.known[architecture]


def slimming(
    scale: str = "small",
    *,
    target: float = 0.5,
    seeds: tuple[int, ...] | int = (0,),
    noise: str = "uniform",
    batch_size: int = 8,
    threads: int = 1,
    device: str = "cpu",
    root: str | Path | None = None,
    **changes: Any,
) -> ExperimentResult:
    """Slim a supernet to a share of its latency; train the result and two rivals from scratch.

    Rivals at the same table latency: the full depth with one 3D block at the end (as L1 has it)
    and all widths scaled by one factor; and slimming whose actions are drawn at random.

    Args:
        scale: tiny, small or paper (ImageNet).
        target: share of the largest network's table latency to reach.
        seeds: of the trainings from scratch.
        noise: of the MetaPaths: uniform (as printed), gumbel or none.
        batch_size, threads, device: of the latencies. A batch of 8 by default: at 32 pixels a
            single image costs mostly the calls themselves, whatever the width.
        changes: fields of `Setting`, as `epochs=12` or `track="cifar10"`.

    Raises:
        ReplivitError: unknown scale or option, a target that cannot be reached.
    """
    seeds = as_seeds(seeds)
    setting = choose(SETTINGS, scale, changes)
    if not 0 < target < 1:
        raise ReplivitError(f"target {target} must be a share of the latency between 0 and 1")
    supernet = _train_supernet(setting, noise, device, root)
    effort = replace(EFFORT, budget_s=setting.table_s)
    table = measure_table(supernet, batch_size, threads, device, effort)
    goal = target * table.latency(supernet.largest)
    images, labels, recalibration = (
        one.to(supernet.norm.weight.device) for one in held_out_images(setting, root)
    )
    score, importance = Scorer(supernet, images, labels, recalibration), supernet.importance()
    walks = {
        "greedy": slim(supernet.largest, goal, table, score, importance),
        "random actions": slim(
            supernet.largest, goal, table, score, importance, np.random.default_rng(0)
        ),
    }
    chosen = {name: steps[-1].architecture for name, steps in walks.items()}
    by_hand = Architecture.by_hand(supernet.widths, supernet.depths)
    chosen["uniform width"] = scale_uniformly(by_hand, goal, table)

    trained = {
        name: [_train(one, supernet, setting, seed, device, root) for seed in seeds]
        for name, one in chosen.items()
    }
    everything = {"largest": supernet.largest, **chosen}
    measured = measure_networks(
        list(everything.values()), supernet, batch_size, threads, device, setting.table_s
    )
    rows = [
        _row(name, one, supernet, table, seconds, score(one), trained.get(name, []))
        for (name, one), seconds in zip(everything.items(), measured, strict=True)
    ]
    return ExperimentResult(
        rows,
        [
            _better("greedy", "uniform width", trained),
            _better("greedy", "random actions", trained),
            _table_is_true(rows),
        ],
        figures={"slimming": _draw(walks, rows, goal)},
        notes=_notes(setting, table, seeds, noise, walks["greedy"]),
        conditions=Conditions(
            device=device, threads=threads, batch_size=batch_size, image_size=setting.image_size,
            track=setting.track, seed=seeds[0] if len(seeds) == 1 else None,
            backend="deploy", options={"target": target, "noise": noise},
        ),
    )  # fmt: skip


def _recipe(setting: Setting) -> Recipe | None:
    """The setting's recipe, without a teacher: what is compared is the networks."""
    if setting.recipe is None:
        return None
    own = Path(__file__).parent / "recipes" / f"{setting.recipe}.yaml"
    return read_recipe(own if own.is_file() else setting.recipe).changed(distillation="none")


def _train_supernet(setting: Setting, noise: str, device: str, root: str | Path | None) -> SuperNet:
    torch.manual_seed(0)
    classes = get_track(setting.track).num_classes
    supernet = SuperNet(
        num_classes=classes, image_size=setting.image_size, noise=noise, **setting.supernet
    )
    # no weight shows the noise: only this tells the runs
    options = {} if noise == "uniform" else {"noise": noise}
    harness.train(
        supernet, setting.track, _recipe(setting), 0, callbacks=[AnnealTemperature()],
        hold_out=setting.held_out, epochs=setting.supernet_epochs, device=device, root=root,
        image_size=setting.image_size, name="efficientformer_supernet", options=options,
        evaluate=False,
    )  # fmt: skip
    return supernet.eval()


def _train(
    architecture: Architecture,
    supernet: SuperNet,
    setting: Setting,
    seed: int,
    device: str,
    root: str | Path | None,
) -> TrainedModel:
    """Train from scratch, as the paper does with what the search found."""
    torch.manual_seed(seed)
    network: EfficientFormer = architecture.build(**supernet.build_options)
    return harness.train(
        network, setting.track, _recipe(setting), seed, epochs=setting.epochs, device=device,
        root=root, image_size=setting.image_size, name="efficientformer_slimmed",
    )  # fmt: skip


def _row(
    name: str,
    architecture: Architecture,
    supernet: SuperNet,
    table: LatencyTable,
    seconds: tuple[float, tuple[float, float]],
    inherited: float,
    runs: list[TrainedModel],
) -> dict[str, Any]:
    with on_meta():
        network = architecture.build(**supernet.build_options)
    tops = [run.value("top1") for run in runs]
    summary = mean_std(tops) if tops else None
    low, high = seconds[1]
    return {
        "network": name,
        "widths x depths": str(architecture),
        "params (M)": round(sum(one.numel() for one in network.parameters()) / 1e6, 3),
        "MACs (M)": round(
            count_macs(architecture.build(**supernet.build_options), supernet.image_size).total
            / 1e6, 2
        ),
        "table (ms)": round(table.latency(architecture) * 1e3, 3),
        "measured (ms)": round(seconds[0] * 1e3, 3),
        "interval (ms)": f"{low * 1e3:.3f} to {high * 1e3:.3f}",
        "inherited top-1 (%)": round(inherited, 2),
        "top-1 from scratch (%)": round(summary.mean, 2) if summary else None,
        "std": round(summary.std, 2) if summary and summary.std is not None else None,
        "seeds": len(tops),
    }  # fmt: skip


def _better(name: str, rival: str, trained: dict[str, list[TrainedModel]]) -> Finding:
    """Whether the slimmed network beats a rival: over seeds if there are three, else by images."""
    tops = {one: [run.value("top1") for run in trained[one]] for one in (name, rival)}
    if len(tops[name]) >= 3:
        test = paired_means(tops[name], tops[rival])
        gap, interval, unit = test.difference, test.interval, f"{test.n} seeds"
    else:
        bits = [
            bits_of(next(record for record in trained[one][0].records if record.metric == "top1"))
            for one in (name, rival)
        ]
        test = mcnemar(*bits)
        gap, unit = 100 * test.difference, f"{test.n} test images, one seed"
        interval = tuple(100 * end for end in test.interval)
    unseen = interval[0] <= 0 <= interval[1]
    return Finding(
        f"At equal latency, {name} slimming gives a more accurate network than {rival}",
        "reproduced" if interval[0] > 0 else "deviates",
        f"{gap:+.2f} points [{interval[0]:+.2f}, {interval[1]:+.2f}] over {unit}"
        + ("; no difference detected" if unseen else ""),
    )


def _table_is_true(rows: list[dict[str, Any]], tolerance: float = 0.1) -> Finding:
    errors = {row["network"]: row["table (ms)"] / row["measured (ms)"] - 1 for row in rows}
    worst = max(errors, key=lambda name: abs(errors[name]))
    return Finding(
        f"The sum of a network's parts is its latency (here: within {tolerance:.0%})",
        "reproduced" if abs(errors[worst]) <= tolerance else "deviates",
        f"the table is off by {errors[worst]:+.1%} at most ({worst})",
    )


def _notes(
    setting: Setting, table: LatencyTable, seeds: tuple[int, ...], noise: str, steps: list[Step]
) -> str:
    path = ", ".join(step.action for step in steps[1:])
    return (
        f"Supernet: {setting.supernet_epochs} epochs on {setting.track}, {noise} noise; networks: "
        f"{setting.epochs} epochs from scratch, {len(seeds)} seed(s). The accuracy drop is "
        f"measured on {setting.score_images} images held out of the supernet's training, with "
        f"inherited weights and batch norm statistics of {setting.recalibration_images} others; "
        f"test images are used for the last column alone. Table: {len(table.seconds)} parts, "
        f"{table.conditions.get('rounds')} rounds, {table.conditions.get('noisy')} of them "
        "noisier than 2 %. The uniform rival has the full depth and one 3D block. "
        f"Greedy actions: {path}."
    )


def _draw(walks: dict[str, list[Step]], rows: list[dict[str, Any]], goal_s: float) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = {"greedy": "#c44e52", "random actions": "#8c8c8c", "uniform width": "#4c72b0"}
    for name, steps in walks.items():
        left.plot(
            [step.latency_s * 1e3 for step in steps], [step.accuracy for step in steps],
            marker="o", markersize=3, label=name, color=colours[name],
        )  # fmt: skip
    left.axvline(goal_s * 1e3, color="black", linewidth=0.8, linestyle=":", label="target")
    left.invert_xaxis()
    left.set(xlabel="latency by table (ms)", ylabel="accuracy, inherited weights (%)")
    left.set_title("slimming, step by step", fontsize=10)
    left.legend(fontsize=8)
    for row in rows:
        if row["top-1 from scratch (%)"] is not None:
            right.errorbar(
                row["measured (ms)"], row["top-1 from scratch (%)"], yerr=row["std"],
                marker="o", linestyle="none", capsize=3,
                color=colours[row["network"]], label=row["network"],
            )  # fmt: skip
    right.margins(0.3)
    right.set(xlabel="measured latency (ms)", ylabel="top-1, trained from scratch (%)")
    right.set_title("at the target", fontsize=10)
    right.legend(fontsize=8)
    return figure
