"""What a method does to accuracy and cost on real images, beside a control.

Every arm starts from the same trained parent and trains for the same number of extra epochs by the
same recipe; the *dense control* is the parent itself, trained on for as long. Several seeds give
several parents. Every run is an ordinary `harness.train` run: it is found again when it is
finished and goes on when it was stopped, and papers that share a parent or a control share the run.
Seeds may be trained side by side by commands of their own (`--set seeds=0`, `--set seeds=1`); the
one that asks for all of them then only reads.

    arms = [
        Arm("learned", "dynamicvit_micro", {"keep_ratio": 0.7}, objective=DynamicViTObjective,
            new=("score_predictor.*",)),
        Arm("random", "dynamicvit_micro", {"keep_ratio": 0.7, "scorer": "random"}),
    ]
    result = effect(arms, scale="small", claims=[Claim("Scores pay", "learned", "random")])
"""

from __future__ import annotations

import copy
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from harness import registry
from harness.checkpoints import coverage, load_model, load_weights
from harness.data import TRACKS, ImageDataset, get_track, load_split
from harness.errors import ReplivitError
from harness.evaluation import evaluate
from harness.experiment import ExperimentResult
from harness.meta import on_meta
from harness.record import Conditions, Record
from harness.settings import choose
from harness.training import Callback, Objective, Recipe, TrainedModel, train
from harness.training.recipe import resolve_recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTROL, PARENT = "dense control", "parent"

State = dict[str, Tensor]


@dataclass(frozen=True)
class Arm:
    """One way to spend the same extra epochs.

    Attributes:
        name: what rows, claims and pictures call it.
        variant, options: what is built.
        objective: makes the objective of a run, given the dense parent of its seed (a copy, in
            evaluation mode: a teacher). Default: the variant's own, else cross-entropy.
        callbacks: makes the callbacks of a run.
        recipe: fields of the recipe in which this arm differs from the others.
        new: patterns (fnmatch) of weights that the parent does not have; all others must come
            from it.
        train: False for the parent's weights as they are.
        start: "parent"; or "scratch", from random weights for the parent's epochs and the extra
            ones, by the parent's recipe.
        adapt: the parent's state dict under the names of this arm's variant, if they differ.
    """

    name: str
    variant: str
    options: Mapping[str, Any] = field(default_factory=dict)
    objective: Callable[[nn.Module], Objective] | None = None
    callbacks: Callable[[], Sequence[Callback]] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    new: tuple[str, ...] = ()
    train: bool = True
    start: Literal["parent", "scratch"] = "parent"
    adapt: Callable[[State], State] | None = None


@dataclass(frozen=True)
class Claim:
    """What the comparison of two arms shall decide.

    Attributes:
        text: the claim, as a paper or a reader would say it.
        better, than: names of arms (also `CONTROL` and `PARENT`).
        within: if given, the claim is that `better` loses at most so many points against `than`.
    """

    text: str
    better: str
    than: str
    within: float | None = None


@dataclass(frozen=True)
class Setting:
    """The size of a comparison; every field is an option of the experiment.

    Attributes:
        parent_weights: a file of weights that is the parent of all seeds; default: a parent is
            trained for each seed, by the track's protocol.
        parent_epochs: default the protocol's.
        epochs: the extra epochs of every arm.
        recipe: what the extra epochs change of the parent's recipe.
        train_images, test_images: only so many, for a look at whether it runs; default all.
        cost_images: test images over which a cost that depends on the image is averaged.
        batch_size, seconds, threads: of the timing; 0 seconds for none.
    """

    track: str = "fashion_mini"
    parent: str = "vit_micro"
    parent_weights: str | Path | None = None
    parent_epochs: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 3
    recipe: Mapping[str, Any] = field(
        default_factory=lambda: {"lr": 5e-4, "warmup_epochs": 0, "min_lr": 1e-5}
    )
    train_images: int | None = None
    test_images: int | None = None
    cost_images: int = 64
    batch_size: int = 32
    seconds: float = 15.0
    threads: int = 1
    device: str = "cpu"
    root: str | Path | None = None
    quiet: bool = False


SCALES: dict[str, Setting] = {
    "tiny": Setting(
        seeds=(0,), parent_epochs=1, epochs=1, train_images=256, test_images=200, cost_images=4,
        batch_size=4, seconds=0.3, quiet=True,
    ),
    "small": Setting(),
    "paper": Setting(
        track="imagenet", parent="deit_s", seeds=(0,), epochs=30,
        recipe={"lr": 1e-5, "lr_reference_batch": None, "warmup_epochs": 5, "min_lr": 1e-6},
    ),
}  # fmt: skip

#: Options that are numbers, and the least that makes sense.
LEAST = {
    "epochs": 1, "parent_epochs": 1, "train_images": 1, "test_images": 1, "cost_images": 1,
    "batch_size": 1, "seconds": 0, "threads": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        top1: the record, with one bit per test image.
        seconds, images: what the arm's training took, the parent's not included.
        model: in evaluation mode.
    """

    seed: int
    top1: Record
    seconds: float
    images: int
    model: nn.Module


#: Arm's name -> its runs, in the order of the setting's seeds.
Runs = Mapping[str, Sequence[Run]]


def choose_setting(scale: str, changes: Mapping[str, Any]) -> Setting:
    """The setting of a scale with single fields changed.

    Raises:
        ReplivitError: unknown scale or field, no seed, or no epoch.
    """
    return choose(SCALES, scale, changes, LEAST)


def effect(
    arms: Sequence[Arm],
    *,
    scale: str = "small",
    claims: Sequence[Claim] = (),
    published: Sequence[Mapping[str, Any]] = (),
    notes: str = "",
    pictures: Callable[[Runs, Setting], dict[str, Figure]] | None = None,
    **changes: Any,
) -> ExperimentResult:
    """Train (or find again) every arm with every seed, and compare them.

    Args:
        arms: beside the dense control and the untrained parent, which are always there.
        scale: `tiny` (one seed, a few hundred images: does it run?), `small` (the protocol of the
            small tracks) or `paper` (ImageNet).
        claims: answered in the findings.
        published: the paper's rows of the same question.
        notes: put before the notes on the protocol.
        pictures: makes further figures of the trained arms.
        changes: fields of `Setting`.

    Raises:
        ReplivitError: an unknown scale, option or arm; weights of the parent that do not fit.
    """
    from harness.effect_report import report

    setting = choose_setting(scale, changes)
    arms = [Arm(CONTROL, setting.parent), *arms]
    names = [PARENT, *(arm.name for arm in arms)]
    if len(set(names)) < len(names):
        raise ReplivitError(f"arms need names of their own: {', '.join(names)}")
    for claim in claims:
        for name in (claim.better, claim.than):
            if name not in names:
                raise ReplivitError(f"no arm {name!r}; there are {', '.join(names)}")
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for seed in setting.seeds:
        parent = trained_parent(setting, seed)
        runs[PARENT].append(parent)
        for arm in arms:
            runs[arm.name].append(train_arm(arm, parent, setting))
    found = report(arms, runs, claims, setting)
    if pictures is not None:
        found["figures"] |= pictures(runs, setting)
    return ExperimentResult(
        **found,
        published=[dict(row) for row in published],
        notes=" ".join(filter(None, (notes, _protocol(setting)))),
        conditions=Conditions(
            device=setting.device, threads=torch.get_num_threads(), track=str(setting.track),
            data_fingerprint=runs[CONTROL][0].top1.conditions.data_fingerprint,
            seed=setting.seeds[0] if len(setting.seeds) == 1 else None,
            options={
                "seeds": list(setting.seeds), "epochs": setting.epochs, "parent": setting.parent,
                "recipe": dict(setting.recipe),
            },
        ),
    )  # fmt: skip


# one run


def trained_parent(setting: Setting, seed: int) -> Run:
    """The dense parent of a seed: given, trained now, or found trained."""
    if setting.parent_weights is not None:
        model = load_model(setting.parent, setting.parent_weights, _num_classes(setting))
        return Run(seed, top1_of(model, setting), 0.0, 0, model)
    options = {"epochs": setting.parent_epochs}
    trained = _train(setting, setting.parent, parent_recipe(setting), seed, **options)
    return _finished(trained, seed, setting)


def train_arm(arm: Arm, parent: Run, setting: Setting) -> Run:
    """An arm from (or beside) the parent of a seed."""
    objective = arm.objective(copy.deepcopy(parent.model)) if arm.objective else None
    options = {
        "options": dict(arm.options),
        "objective": objective,
        "callbacks": arm.callbacks() if arm.callbacks else (),
    }
    recipe = arm_recipe(arm, setting)
    if arm.start == "scratch":
        return _finished(
            _train(setting, arm.variant, recipe, parent.seed, **options), parent.seed, setting
        )
    state = {key: value.detach().cpu() for key, value in parent.model.state_dict().items()}
    state = arm.adapt(state) if arm.adapt else state
    _check_start(arm, state, _num_classes(setting))
    if not arm.train:
        torch.manual_seed(parent.seed)  # new weights, if there are any
        model = registry.build(arm.variant, _num_classes(setting), **arm.options)
        load_weights(model, state, strict=False)
        return Run(parent.seed, top1_of(model.eval(), setting), 0.0, 0, model)
    trained = _train(setting, arm.variant, recipe, parent.seed, init=state, **options)
    return _finished(trained, parent.seed, setting)


def parent_recipe(setting: Setting) -> Recipe:
    """The recipe of the parent on the setting's track, on which those of all arms build."""
    protocol = get_track(setting.track).protocol if setting.track in TRACKS else {}
    variant = registry.get_variant(setting.parent)
    return resolve_recipe(None, variant, str(setting.track), protocol)


def arm_recipe(arm: Arm, setting: Setting) -> Recipe:
    """How an arm trains: the parent's recipe, the setting's changes, the arm's own."""
    recipe = parent_recipe(setting)
    if arm.start == "scratch":
        epochs = (setting.parent_epochs or recipe.epochs) + setting.epochs
        return recipe.changed(**{**arm.recipe, "epochs": epochs})
    return recipe.changed(**{**setting.recipe, **arm.recipe, "epochs": setting.epochs})


def _train(
    setting: Setting, variant: str, recipe: Recipe, seed: int, **options: Any
) -> TrainedModel:
    hold_out = 0
    if setting.train_images is not None:
        count = len(load_split(setting.track, "train", setting.root))
        hold_out = max(0, count - setting.train_images)
    return train(
        variant, setting.track, recipe, seed, hold_out=hold_out, device=setting.device,
        root=setting.root, quiet=setting.quiet, evaluate=setting.test_images is None, **options,
    )  # fmt: skip


def _finished(trained: TrainedModel, seed: int, setting: Setting) -> Run:
    scored = [record for record in trained.records if record.metric == "top1"]
    if setting.test_images is not None or not scored:
        scored = [top1_of(trained.model, setting)]
    return Run(
        seed, scored[0], trained.value("train_time"), trained.value("images_seen"), trained.model
    )  # fmt: skip


def top1_of(model: nn.Module, setting: Setting) -> Record:
    """Top-1 on the setting's test images, with its bits."""
    records = evaluate(model, test_split(setting), device=setting.device, limit=setting.test_images)
    return next(record for record in records if record.metric == "top1")


def test_split(setting: Setting) -> ImageDataset:
    """The setting's test images; small ones are decoded once for all arms."""
    return _load_test(setting.track, setting.root)


@functools.lru_cache(maxsize=1)
def _load_test(track: str | Path, root: str | Path | None) -> ImageDataset:
    return load_split(track, "test", root)


def _num_classes(setting: Setting) -> int:
    return len(test_split(setting).classes)


def _check_start(arm: Arm, state: State, num_classes: int) -> None:
    """All weights of an arm come from the parent, but for those it says are new.

    Raises:
        ReplivitError: what is missing, left over or of another shape.
    """
    with on_meta():
        found = coverage(registry.build(arm.variant, num_classes, **arm.options), state)
    missing = [
        key for key in found.missing if not any(fnmatch.fnmatch(key, one) for one in arm.new)
    ]
    if missing or found.unexpected or found.mismatched:
        raise ReplivitError(
            f"arm {arm.name}: the parent's weights do not make a {arm.variant}: {found.problems()}"
        )


def _protocol(setting: Setting) -> str:
    """How the arms were trained, in words."""
    parents = "one parent for all seeds" if setting.parent_weights else "a parent per seed"
    limits = "".join(
        f" Only {count} {what} images were used: no number here means anything."
        for what, count in (("training", setting.train_images), ("test", setting.test_images))
        if count is not None
    )
    changes = ", ".join(f"{key} {value}" for key, value in setting.recipe.items())
    return (
        f"{setting.parent} on {setting.track}, {parents}, seeds "
        f"{', '.join(map(str, setting.seeds))}; each arm starts from the parent of its seed and "
        f"trains for {setting.epochs} extra epochs (the parent's recipe with {changes}), as the "
        "dense control does; an arm from scratch trains as long as parent and control together. "
        "Intervals are 95 %: t over seeds; differences are paired by seed. "
        "McNemar's test pools the images of all seeds and is corrected for the number of arms "
        "(Benjamini-Hochberg)." + limits
    )
