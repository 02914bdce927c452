"""Accuracy of a supernet's networks: extracted, calibrated on training images, then judged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from harness.data import AugmentedDataset, ImageDataset, create_transform
from harness.training import Recipe
from reproductions.nasvit.calibration import calibrate
from reproductions.nasvit.space import Config
from reproductions.nasvit.subnet import Subnet
from reproductions.nasvit.supernet import Supernet

#: Images up to this size are transformed once and kept.
KEPT_SIZE = 64

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
    """A data set's images in batches, which can be gone through as often as one likes.

    Args:
        recipe: how training images are augmented; None for evaluation.
        limit: only so many images, spread evenly.
    """
    transform = create_transform(
        dataset.track.input, image_size, train=recipe is not None, recipe=recipe
    )
    images: Dataset = AugmentedDataset(dataset, transform, seed=0)
    if limit is not None and limit < len(dataset):
        images = Subset(images, np.linspace(0, len(dataset) - 1, limit).astype(int).tolist())
    loader = DataLoader(images, batch_size, num_workers=workers)
    return list(loader) if image_size <= KEPT_SIZE else loader


class SubnetAccuracy:
    """Top-1 of networks of a supernet: `accuracy(config)` in %.

    Args:
        calibration: batches of training images for the batch norms' statistics.
        batches: images and labels that judge.
    """

    def __init__(self, supernet: Supernet, calibration: Sequence[Tensor], batches: Batches) -> None:
        self.supernet = supernet.eval()
        self.calibration, self.batches = calibration, batches

    def network(self, config: Config) -> Subnet:
        """The calibrated network, in evaluation mode."""
        return calibrate(self.supernet.extract(config), self.calibration)

    @torch.inference_mode()
    def bits(self, config: Config) -> np.ndarray:
        """One bool per image, `(N,)`: was the right class first."""
        with torch.inference_mode(False):
            network = self.network(config)
        device = next(network.parameters()).device
        hits = [
            network(images.to(device)).argmax(dim=1).cpu() == labels
            for images, labels in self.batches
        ]
        return torch.cat(hits).numpy()

    def __call__(self, config: Config) -> float:
        return 100 * float(self.bits(config).mean())
