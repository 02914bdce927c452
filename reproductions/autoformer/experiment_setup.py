"""What the experiments run on: their scales, their images, their supernets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import Conditions, ReplivitError, evaluate, get_variant, train
from harness.data import SearchImages
from harness.record import Record, read_records
from harness.settings import choose
from harness.training import Objective, TrainedModel
from reproductions.autoformer.evolution import PAPER, RELEASED, Settings
from reproductions.autoformer.sharing import ClassicalSupernet
from reproductions.autoformer.space import Config, Space, get_space
from reproductions.autoformer.supernet import Supernet
from reproductions.autoformer.training import OneSubnetPerStep

RECIPES = Path(__file__).parent / "recipes"
RULES = {"released": RELEASED, "paper": PAPER}


@dataclass(frozen=True)
class Setting:
    """The size of an experiment; every field is an option of it.

    Attributes:
        space: t, s, b, b8 or micro.
        epochs: of the supernets, and of each network that is trained alone.
        seeds: of the trainings.
        search_images: training images that the supernets do not see, which steer a search.
        train_images, test_images: only so many, for a look at whether it runs; default all.
        generations, population, parents, mutations, crossovers, rule: of the evolution; the rule
            (released or paper) says how likely genes are redrawn.
        searches: how often both searches are repeated, with seeds 0, 1, ...
        min_params, max_params: the window, in millions.
        faithful_to_release: search as released, with what looks unintended there.
        plain: the variant that the subnet found is compared with.
        subnets: sampled subnets whose inherited accuracy is compared.
        retrained: how many of these are also trained alone.
        workers: processes that score candidates; 0 for none besides this one.
        recipe: of all trainings; default the track's protocol.
    """

    space: str = "micro"
    track: str = "fashion_mini"
    image_size: int = 32
    epochs: int = 12
    seeds: tuple[int, ...] = (0, 1, 2)
    search_images: int = 1000
    train_images: int | None = None
    test_images: int | None = None
    generations: int = 6
    population: int = 16
    parents: int = 5
    mutations: int = 8
    crossovers: int = 6
    searches: int = 3
    rule: str = "released"
    min_params: float = 0.235
    max_params: float = 0.2586
    faithful_to_release: bool = False
    plain: str = "vit_micro"
    subnets: int = 12
    retrained: int = 4
    workers: int = 0
    recipe: str | None = None
    device: str = "cpu"
    root: str | None = None

    @property
    def search_space(self) -> Space:
        return get_space(self.space)

    @property
    def evolution(self) -> Settings:
        """The search's settings.

        Raises:
            ValueError: impossible sizes, or an empty window.
        """
        return replace(
            RULES[self.rule], generations=self.generations, population=self.population,
            parents=self.parents, mutations=self.mutations, crossovers=self.crossovers,
            min_params=self.min_params, max_params=self.max_params,
            faithful_to_release=self.faithful_to_release,
        )  # fmt: skip


_TINY = {
    "epochs": 1, "seeds": (0,), "train_images": 256, "test_images": 250, "search_images": 100,
    "generations": 2, "population": 4, "parents": 2, "mutations": 2, "crossovers": 1,
    "searches": 1, "subnets": 3, "retrained": 1,
}  # fmt: skip
SCALES = {
    "tiny": Setting(**_TINY),
    "small": Setting(),
    # as released, for the small space; needs ImageNet and GPUs
    "paper": Setting(
        space="s", track="imagenet", image_size=224, epochs=500, seeds=(0,), search_images=100_000,
        generations=20, population=50, parents=10, mutations=25, crossovers=25, searches=1,
        min_params=18.0, max_params=23.0, plain="deit_s", subnets=1000, retrained=1,
        recipe=str(RECIPES / "imagenet.yaml"), device="cuda",
    ),
}  # fmt: skip


def choose_setting(scale: str, options: dict[str, Any]) -> Setting:
    """The setting of a scale with some values changed.

    Raises:
        ReplivitError: an unknown scale or option, or a value that cannot be.
    """
    setting = choose(SCALES, scale, options)
    if setting.rule not in RULES:
        raise ReplivitError(f"no rule {setting.rule!r}; there are {', '.join(RULES)}")
    get_space(setting.space), setting.evolution  # whose checks speak before hours of training
    return setting


class Bench(SearchImages):
    """The images of an experiment, and the trainings on them."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(
            setting.track, setting.image_size, search_images=setting.search_images,
            train_images=setting.train_images, test_images=setting.test_images, root=setting.root,
        )  # fmt: skip
        self.setting = setting

    def entangled(self, seed: int) -> tuple[Supernet, TrainedModel]:
        """The trained supernet of this seed; the run is found again if it was made before."""
        torch.manual_seed(seed)
        net = Supernet(self.setting.search_space, self.num_classes, self.setting.image_size)
        return net, self._train(net, "autoformer_entangled", seed, OneSubnetPerStep())

    def classical(self, seed: int) -> tuple[ClassicalSupernet, TrainedModel]:
        """The same number of updates with weights of their own for all candidates."""
        torch.manual_seed(seed)
        net = ClassicalSupernet(
            self.setting.search_space, self.num_classes, self.setting.image_size
        )
        return net, self._train(net, "autoformer_classical", seed, OneSubnetPerStep())

    def _train(self, net: nn.Module, name: str, seed: int, objective: Objective) -> TrainedModel:
        setting = self.setting
        # b8's supernet has the weights of b's and draws otherwise: only this tells the runs
        options = {"space": "b8"} if setting.space == "b8" else {}
        return train(
            net, setting.track, setting.recipe, seed, objective=objective, epochs=setting.epochs,
            hold_out=self.held_out, device=setting.device, root=setting.root,
            image_size=setting.image_size, name=name, options=options, evaluate=False,
        )  # fmt: skip

    def alone(self, config: Config, seed: int, whole: bool = True) -> Record:
        """Top-1 of a subnet trained from scratch.

        Args:
            whole: on all training images, like every row of the track; else on those that the
                supernets saw.
        """
        setting = self.setting
        hidden = 0 if whole and setting.train_images is None else self.held_out
        variant = f"autoformer_{setting.space.removesuffix('8')}"
        return self._alone(
            variant, seed, hidden, {"space": setting.space, "config": config.as_dict()}
        )

    def plain(self, seed: int) -> Record:
        """Top-1 of the plain ViT by the same protocol: the shipped record if there is one."""
        setting = self.setting
        variant = get_variant(setting.plain)
        weights = variant.weights_file(setting.track)
        records = weights.with_suffix(".records.jsonl") if weights else Path("-")
        if setting.train_images is None and records.exists():
            for record in read_records(records):
                if record.metric != "top1" or record.detail.get("shipped"):
                    continue
                epochs = record.detail["training"]["recipe"]["epochs"]
                if (record.conditions.seed, epochs) == (seed, setting.epochs):
                    return record
        return self._alone(
            setting.plain, seed, 0 if setting.train_images is None else self.held_out
        )

    def _alone(
        self, variant: str, seed: int, hidden: int, options: dict[str, Any] | None = None
    ) -> Record:
        setting, limit = self.setting, self.setting.test_images
        trained = train(
            variant, setting.track, setting.recipe, seed, epochs=setting.epochs, hold_out=hidden,
            device=setting.device, root=setting.root, options=options, evaluate=limit is None,
        )  # fmt: skip
        records = trained.records
        if limit is not None:
            records = evaluate(trained.model, setting.track, root=setting.root, limit=limit,
                               device=setting.device, image_size=setting.image_size)  # fmt: skip
        return next(one for one in records if one.metric == "top1")

    def conditions(self) -> Conditions:
        setting = self.setting
        return Conditions(
            device=setting.device, threads=torch.get_num_threads(), track=setting.track,
            image_size=setting.image_size, data_fingerprint=self.test_split.fingerprint,
            seed=setting.seeds[0],
        )  # fmt: skip
