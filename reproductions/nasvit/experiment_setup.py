"""What the experiments run on: their scales, their images, their supernets.

All three experiments look at the same trainings: a run is found again by what it is, whichever
experiment made it first.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import Conditions
from harness.data import SearchImages, batches_of
from harness.settings import choose
from harness.training import Recipe, TrainedModel, read_recipe, train
from reproductions.nasvit.conflict import ConflictWatch
from reproductions.nasvit.fitness import SubnetAccuracy
from reproductions.nasvit.space import get_space
from reproductions.nasvit.supernet import Supernet
from reproductions.nasvit.training import ConflictAware

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Setting:
    """The size of an experiment; every field is an option of it.

    Attributes:
        space, cnn_space: with attention, and without.
        epochs: of every supernet.
        seeds: of the trainings.
        search_images: training images that no supernet sees; they steer a search.
        train_images, test_images: only so many; default all the others.
        batch_size: of the training.
        calibration_batches: of 64 training images, before a network is judged.
        random_networks: how many random networks the techniques are judged by.
        conflict_batches: batches over which gradients are compared.
        population, mutations, crossovers, iterations: of the evolution.
        recipe, strong_recipe: files or names; the simplified recipe and the one it replaces.
        workers: processes that score candidates; 0 for none besides this one.
    """

    space: str = "micro"
    cnn_space: str = "micro_cnn"
    track: str = "fashion_mini"
    image_size: int = 32
    epochs: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)
    search_images: int = 1000
    train_images: int | None = 3000
    test_images: int | None = None
    batch_size: int = 64
    calibration_batches: int = 8
    random_networks: int = 4
    conflict_batches: int = 4
    population: int = 24
    mutations: int = 8
    crossovers: int = 8
    iterations: int = 3
    recipe: str = "simplified"
    strong_recipe: str = "strong"
    workers: int = 0
    device: str = "cpu"
    root: str | None = None
    quiet: bool = False


SCALES = {
    "tiny": Setting(
        epochs=1, seeds=(0,), search_images=60, train_images=64, test_images=100,
        batch_size=32, calibration_batches=1, random_networks=1, conflict_batches=1,
        population=3, mutations=1, crossovers=1, iterations=1, quiet=True,
    ),
    "small": Setting(),
    # as released, as far as it was; needs ImageNet and GPUs. There is no CNN space of that size.
    "paper": Setting(
        space="nasvit", track="imagenet", image_size=224, epochs=400, seeds=(0,),
        search_images=5000, train_images=None, batch_size=64, calibration_batches=64,
        random_networks=20, conflict_batches=20, population=512, mutations=128, crossovers=128,
        iterations=20, recipe="imagenet", device="cuda",
    ),
}  # fmt: skip

#: Options that are numbers, and the least that makes sense.
LEAST = {
    "epochs": 1, "search_images": 1, "train_images": 1, "test_images": 1, "batch_size": 2,
    "calibration_batches": 1, "random_networks": 1, "conflict_batches": 1, "population": 1,
    "mutations": 0, "crossovers": 0, "iterations": 0, "workers": 0, "image_size": 8,
}  # fmt: skip


def choose_setting(scale: str, options: Mapping[str, Any]) -> Setting:
    """The setting of a scale with some values changed.

    Raises:
        ReplivitError: an unknown scale or option, or a value that cannot be.
    """
    setting = choose(SCALES, scale, options, LEAST)
    get_space(setting.space), get_space(setting.cnn_space)
    return setting


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to train a supernet.

    Attributes:
        objective: keyword arguments of `ConflictAware` that differ from the default.
        switched: whether layer scales are switched.
        strong: whether the recipe is the strong one.
        convolutional: whether the space is the one without attention.
    """

    name: str
    objective: Mapping[str, Any] = field(default_factory=dict)
    switched: bool = True
    strong: bool = False
    convolutional: bool = False


ALL = Arm("all techniques")
NO_PROJECTION = Arm("without projection", {"projection": False})
CNN = Arm("convolutions", convolutional=True)
CNN_NO_PROJECTION = Arm(
    "convolutions, without projection", {"projection": False}, convolutional=True
)


class Bench(SearchImages):
    """The images of an experiment, and the trainings on them."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(
            setting.track, setting.image_size, search_images=setting.search_images,
            train_images=setting.train_images, test_images=setting.test_images, root=setting.root,
        )  # fmt: skip
        self.setting = setting

    def recipe(self, strong: bool = False) -> Recipe:
        """How supernets are trained."""
        setting = self.setting
        name = setting.strong_recipe if strong else setting.recipe
        path = RECIPES / f"{name}.yaml"
        return read_recipe(path if path.is_file() else name).changed(
            epochs=setting.epochs, batch_size=setting.batch_size
        )

    def supernet(self, arm: Arm, seed: int) -> tuple[Supernet, TrainedModel]:
        """The trained supernet of this arm and seed; found again if it was trained before."""
        setting = self.setting
        torch.manual_seed(seed)
        space = get_space(setting.cnn_space if arm.convolutional else setting.space)
        net = Supernet(space, self.num_classes, setting.image_size, arm.switched)
        watch = ConflictWatch(self.watched_batch(), seed)
        trained = train(
            net, setting.track, self.recipe(arm.strong), seed,
            objective=ConflictAware(**arm.objective), callbacks=(watch,),
            hold_out=self.held_out, device=setting.device, root=setting.root,
            image_size=setting.image_size, name=f"nasvit_{space.name}", evaluate=False,
            # scales that are not switched have the same weights at first: only this tells the runs
            options={} if arm.switched else {"switched": False}, quiet=setting.quiet,
        )  # fmt: skip
        return net, trained

    def conflict_batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Batches on which gradients are compared, twice as large as in training."""
        return self.training_batches(count, 2 * self.setting.batch_size)

    def training_batches(self, count: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Some batches of the images that supernets train on, augmented as in training."""
        found = batches_of(
            self.parts[0], self.setting.image_size, recipe=self.recipe(),
            limit=count * batch_size, batch_size=batch_size,
        )  # fmt: skip
        return list(found)

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one bench per experiment)
    def watched_batch(self) -> tuple[Tensor, Tensor]:
        """The batch on which gradients are compared while a supernet trains."""
        return self.conflict_batches(1)[0]

    def judge(self, supernet: Supernet, searching: bool = False) -> SubnetAccuracy:
        """Judges networks by the test split; while `searching`, by held-out training images."""
        batches = self.search_batches() if searching else self.test_batches()
        calibration = [
            images for images, _ in self.training_batches(self.setting.calibration_batches, 64)
        ]
        return SubnetAccuracy(supernet, calibration, batches)

    def conditions(self) -> Conditions:
        setting = self.setting
        return Conditions(
            device=setting.device, threads=torch.get_num_threads(), track=setting.track,
            image_size=setting.image_size, batch_size=setting.batch_size,
            data_fingerprint=self.test_split.fingerprint,
            seed=setting.seeds[0] if len(setting.seeds) == 1 else None,
            options={"seeds": list(setting.seeds), "epochs": setting.epochs},
        )  # fmt: skip

    def protocol(self) -> str:
        """How the supernets were trained, in words."""
        setting = self.setting
        limits = "".join(
            f" Only {count} {what} images were used."
            for what, count in (("training", setting.train_images), ("test", setting.test_images))
            if count is not None
        )
        return (
            f"Supernets of the space {setting.space} train {setting.epochs} epochs on "
            f"{setting.track} at {setting.image_size} pixels by the recipe {setting.recipe}, from "
            f"labels, with seeds {', '.join(map(str, setting.seeds))}; every network is extracted, "
            f"calibrated on {setting.calibration_batches} batches of training images, and judged "
            f"without further training.{limits}"
        )
