"""Which images come when: a pure function of (seed, epoch, step), on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import DataLoader

from harness.data import AugmentedDataset, create_transform
from harness.errors import ReplivitError
from harness.paper import InputSpec
from harness.training.context import derive_seed
from harness.training.recipe import Recipe

if TYPE_CHECKING:
    from harness.data import ImageDataset


class Order:
    """The order of images: one shuffle per epoch, split over processes and passes.

    With repeated augmentation every image comes `repeats` times in a row, and an epoch ends after
    as many images as without (so it shows 1 / `repeats` of them). An image's place is
    `copy * length + index`. Images that fill no whole batch wait for the next epoch's shuffle.

    Raises:
        ReplivitError: the batch does not fit the data or the processes.
    """

    def __init__(
        self, length: int, recipe: Recipe, seed: int, process: int = 0, processes: int = 1
    ):
        pieces = processes * recipe.accumulation
        if recipe.batch_size % pieces:
            raise ReplivitError(
                f"a batch of {recipe.batch_size} images cannot be split over {processes} processes "
                f"and {recipe.accumulation} passes"
            )
        if recipe.batch_size > length:
            raise ReplivitError(
                f"a batch of {recipe.batch_size} is more than the {length} images there are"
            )
        self.piece = recipe.batch_size // pieces
        if recipe.mixes and self.piece % 2:
            raise ReplivitError(f"mixup pairs images, but a pass has {self.piece} of them")
        self.length, self.recipe, self.seed = length, recipe, seed
        self.process, self.processes = process, processes
        self.steps = length // recipe.batch_size

    def epoch(self, epoch: int) -> Tensor:
        """The places `(steps, batch_size)` of an epoch, over all processes."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.length, generator=generator)
        repeats, used = self.recipe.repeats, self.steps * self.recipe.batch_size
        if repeats > 1:
            order = order[: -(-used // repeats), None] + self.length * torch.arange(repeats)
        return order.flatten()[:used].view(self.steps, -1)

    def passes(self, epoch: int, first_step: int = 0) -> Tensor:
        """This process's places `(passes, piece)` of an epoch from `first_step` on.

        Copies of an image go to different processes, as in the official `RASampler`.
        """
        mine = self.epoch(epoch)[first_step:, self.process :: self.processes]
        return mine.reshape(-1, self.piece)

    def images(self, epoch: int, step: int) -> list[int]:
        """The indices of one batch, for a message."""
        return (self.epoch(epoch)[step] % self.length).tolist()


class Batches:
    """The augmented batches of a data set: iterate `batches(epoch, first_step)`."""

    def __init__(
        self,
        dataset: ImageDataset,
        order: Order,
        spec: InputSpec,
        image_size: tuple[int, int],
        device: torch.device,
    ) -> None:
        transform = create_transform(spec, image_size, train=True, recipe=order.recipe)
        self.dataset = AugmentedDataset(dataset, transform, seed=order.seed)
        self.order, self.device = order, device

    def __call__(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Passes: images `(B, 3, H, W)` and labels `(B,)`, on the device."""
        self.dataset.set_epoch(epoch)
        samples = (
            [(place % self.order.length, place // self.order.length) for place in one.tolist()]
            for one in self.order.passes(epoch, first_step)
        )
        loader = DataLoader(
            self.dataset,
            batch_sampler=samples,
            num_workers=self.order.recipe.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or the loader would draw from the global one
        )
        for images, labels in loader:
            yield (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )


def create_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    """timm's mixup / cutmix, drawing from NumPy's global generator; None if the recipe has none."""
    if not recipe.mixes:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.switch_prob,
        label_smoothing=recipe.label_smoothing,
        num_classes=num_classes,
    )
