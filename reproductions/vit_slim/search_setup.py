"""What the search experiment runs on: its sizes, its networks, its trainings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

import harness
from harness import ReplivitError
from harness.data import load_split
from harness.effect import Run, parent_recipe, test_split
from harness.settings import choose
from harness.training import Recipe, TrainedModel, read_recipe, train
from reproductions.vit_slim.masks import learned_scores
from reproductions.vit_slim.method import SparsitySearch
from reproductions.vit_slim.selection import Scores, random_scores
from reproductions.vit_slim.slimming import magnitude_scores

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Setting:
    """The size of the experiment; every field is an option of it.

    Attributes:
        parent, variant: what is trained first, and the same with masks.
        parent_epochs: default the protocol's.
        search_epochs, epochs: of the search and of each retraining; default the recipes'. The dense
            control trains for both together.
        search_recipe, recipe: recipes of this paper, or files.
        budgets: shares that are kept of head dimensions and MLP channels alike.
        attention, mlp, tokens: weights of the penalty.
        train_images, test_images: only so many, for a look at whether it runs; default all.
    """

    track: str = "fashion_mini"
    parent: str = "vit_micro"
    variant: str = "vit_slim_micro_search"
    seeds: tuple[int, ...] = (0, 1, 2)
    parent_epochs: int | None = None
    search_epochs: int | None = None
    epochs: int | None = None
    search_recipe: str = "search_small"
    recipe: str = "retrain_small"
    budgets: tuple[float, ...] = (0.8, 0.7, 0.6, 0.5, 0.4)
    attention: float = 2e-3
    mlp: float = 5e-4
    tokens: float = 1e-3
    train_images: int | None = None
    test_images: int | None = None
    device: str = "cpu"
    root: str | Path | None = None
    quiet: bool = False


SCALES: dict[str, Setting] = {
    "tiny": Setting(
        seeds=(0,), parent_epochs=1, search_epochs=1, epochs=1, budgets=(0.5,),
        train_images=128, test_images=100, quiet=True,
    ),
    # some 150 steps instead of sixty thousand: ten times the paper's penalty
    "small": Setting(),
    "paper": Setting(
        track="imagenet", parent="deit_s", variant="vit_slim_deit_s", seeds=(0,),
        search_recipe="search", recipe="retrain", attention=5e-5, mlp=1.25e-5, tokens=2.5e-5,
        device="cuda",
    ),
}  # fmt: skip


def choose_setting(scale: str, changes: Mapping[str, Any]) -> Setting:
    """The setting of a scale with single fields changed.

    Raises:
        ReplivitError: unknown scale, field or recipe, no seed or budget, a budget outside (0, 1], a
            negative weight of the penalty. All before anything is trained.
    """
    counts = ("parent_epochs", "search_epochs", "epochs", "train_images", "test_images")
    setting = choose(SCALES, scale, changes, least=dict.fromkeys(counts, 1))
    if not setting.budgets or any(not 0 < one <= 1 for one in setting.budgets):
        raise ReplivitError(f"budgets must lie in (0, 1], not {setting.budgets!r}")
    penalty = (setting.attention, setting.mlp, setting.tokens)
    if not min(penalty) >= 0:
        raise ReplivitError(f"the weights of the penalty must be 0 or more, not {penalty}")
    for recipe in (search_recipe, retraining_recipe):
        recipe(setting)
    return replace(setting, budgets=tuple(sorted(set(setting.budgets), reverse=True)))


def recipe_of(name: str, epochs: int | None) -> Recipe:
    """One of this paper's recipes, or a file, for so many epochs."""
    own = RECIPES / f"{name}.yaml"
    recipe = read_recipe(own if own.is_file() else name)
    return recipe if epochs is None else recipe.changed(epochs=epochs)


def search_recipe(setting: Setting) -> Recipe:
    return recipe_of(setting.search_recipe, setting.search_epochs)


def retraining_recipe(setting: Setting) -> Recipe:
    return recipe_of(setting.recipe, setting.epochs)


def train_parent(setting: Setting, seed: int) -> TrainedModel:
    """The dense network of a seed; other experiments that start from it share the run."""
    options = {"epochs": setting.parent_epochs}
    return _train(setting, setting.parent, parent_recipe(setting), seed, **options)


def train_control(setting: Setting, parent: TrainedModel, seed: int) -> TrainedModel:
    """The parent, trained on for as long as a search and a retraining take together."""
    recipe = retraining_recipe(setting)
    recipe = recipe.changed(epochs=recipe.epochs + search_recipe(setting).epochs)
    return _train(setting, setting.parent, recipe, seed, init=parent.model.state_dict())


def run_search(setting: Setting, parent: TrainedModel | nn.Module, seed: int) -> TrainedModel:
    """Weights and soft masks, trained together from the parent's weights."""
    model = parent.model if isinstance(parent, TrainedModel) else parent
    objective = SparsitySearch(setting.attention, setting.mlp, setting.tokens)
    return _train(
        setting, setting.variant, search_recipe(setting), seed, init=model.state_dict(),
        objective=objective,
    )  # fmt: skip


def retrain(setting: Setting, model: nn.Module, seed: int, name: str) -> TrainedModel:
    """A slimmed network, in place."""
    return _train(setting, model, retraining_recipe(setting), seed, name=name)


def rankings(searched: nn.Module, seed: int) -> dict[str, Scores]:
    """The three ways to choose, on the same weights."""
    learned = learned_scores(searched)
    return {
        "searched": learned,
        "magnitude": magnitude_scores(searched),
        "random": random_scores(learned, seed),
    }


def scored(setting: Setting, model: nn.Module, seed: int, name: str) -> Run:
    """A network as it stands, on the test images."""
    records = harness.evaluate(
        model, test_split(setting), device=setting.device, limit=setting.test_images, name=name
    )
    return Run(seed, next(one for one in records if one.metric == "top1"), 0.0, 0, model)


def finished(setting: Setting, trained: TrainedModel, seed: int, name: str) -> Run:
    """A training as a run with its record."""
    found = [one for one in trained.records if one.metric == "top1"]
    if setting.test_images is None and found:
        top1 = found[0]
    else:
        top1 = scored(setting, trained.model, seed, name).top1
    return Run(
        seed, top1, trained.value("train_time"), trained.value("images_seen"), trained.model
    )  # fmt: skip


def _train(
    setting: Setting, what: str | nn.Module, recipe: Recipe, seed: int, **options: Any
) -> TrainedModel:
    hold_out = 0
    if setting.train_images is not None:
        count = len(load_split(setting.track, "train", setting.root))
        hold_out = max(0, count - setting.train_images)
    return train(
        what, setting.track, recipe, seed, hold_out=hold_out, device=setting.device,
        root=setting.root, quiet=setting.quiet, evaluate=setting.test_images is None, **options,
    )  # fmt: skip
