"""Images in batches outside of training: what a search is steered and judged by."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from harness.data.augmentation import AugmentedDataset
from harness.data.images import ImageDataset
from harness.data.parts import Part, hold_out
from harness.data.sources import load_split
from harness.data.transforms import create_transform

if TYPE_CHECKING:
    from harness.training import Recipe

#: Images up to this side are transformed once and kept.
KEPT_SIZE = 64

#: Images `(B, C, H, W)` and their classes `(B,)`; iterable as often as one likes.
Batches = Iterable[tuple[Tensor, Tensor]]


def batches_of(
    dataset: ImageDataset,
    image_size: int,
    *,
    recipe: Recipe | None = None,
    limit: int | None = None,
    batch_size: int = 250,
    workers: int = 0,
) -> Batches:
    """A data set's images in their order, in batches.

    Args:
        recipe: how training images are augmented; None for evaluation.
        limit: only so many images, spread evenly.
        workers: processes that load images, where these are too large to be kept.
    """
    transform = create_transform(
        dataset.track.input, image_size, train=recipe is not None, recipe=recipe
    )
    images: Dataset = AugmentedDataset(dataset, transform, seed=0)
    if limit is not None and limit < len(dataset):
        images = Subset(images, np.linspace(0, len(dataset) - 1, limit).astype(int).tolist())
    if image_size <= KEPT_SIZE:
        return list(DataLoader(images, batch_size))
    return DataLoader(images, batch_size, num_workers=workers)


@functools.lru_cache(maxsize=4)
def _split(track: str | Path, split: str, root: str | Path | None) -> ImageDataset:
    """A split; kept, since experiments in a row look at the same images."""
    return load_split(track, split, root)


class SearchImages:
    """The images of a search: some train, others steer it, and the test split judges what it found.

    Those that steer are held out of the training split.

    Args:
        search_images: how many steer.
        train_images, test_images: only so many; default all the others.
        workers: see `batches_of`.
    """

    def __init__(
        self,
        track: str | Path,
        image_size: int,
        *,
        search_images: int,
        train_images: int | None = None,
        test_images: int | None = None,
        root: str | Path | None = None,
        workers: int = 0,
    ) -> None:
        self.train_split = _split(track, "train", root)
        self.test_split = _split(track, "test", root)
        self.num_classes = len(self.test_split.classes)
        self._form = {"image_size": image_size, "workers": workers}
        self.search_images = search_images
        self.train_images, self.test_images = train_images, test_images

    @property
    def held_out(self) -> int:
        """How many training images do not train."""
        left = 0 if self.train_images is None else len(self.train_split) - self.train_images
        return max(self.search_images, left)

    @property
    def parts(self) -> tuple[Part, Part]:
        """What trains, and what does not."""
        return hold_out(self.train_split, self.held_out)

    def search_batches(self) -> Batches:
        """Held-out training images, as many as steer a search."""
        return batches_of(self.parts[1], limit=self.search_images, **self._form)

    def test_batches(self) -> Batches:
        return batches_of(self.test_split, limit=self.test_images, **self._form)
