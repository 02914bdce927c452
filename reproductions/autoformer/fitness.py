"""Accuracy of subnets with the weights they inherit, for many configurations at once."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from harness.data import AugmentedDataset, ImageDataset, create_transform
from reproductions.autoformer.space import Config

#: Images up to this size are transformed once and kept.
KEPT_SIZE = 64


def evaluation_batches(
    dataset: ImageDataset,
    image_size: int,
    batch_size: int = 250,
    workers: int = 0,
    limit: int | None = None,
) -> Iterable[tuple[Tensor, Tensor]]:
    """The evaluation images of a data set in batches; iterable as often as one likes.

    Args:
        limit: only so many, spread evenly.
    """
    transform = create_transform(dataset.track.input, image_size)
    images: Dataset = AugmentedDataset(dataset, transform, seed=0)
    if limit is not None and limit < len(dataset):
        images = Subset(images, np.linspace(0, len(dataset) - 1, limit).astype(int).tolist())
    loader = DataLoader(images, batch_size, num_workers=workers)
    return list(loader) if image_size <= KEPT_SIZE else loader


class InheritedAccuracy:
    """Top-1 in % of configurations: `fitness(configs)` yields one value each, in order.

    What was scored is remembered. Use it as a context manager where it has workers: they are
    started once and hold the supernet and the images.

    Args:
        supernet: anything with `set_config`, with its weights; on its own device.
        batches: evaluation images; see `evaluation_batches`.
        workers: processes of one thread each; 0 scores in this one. Only on a CPU.
    """

    def __init__(
        self, supernet: Any, batches: Iterable[tuple[Tensor, Tensor]], workers: int = 0
    ) -> None:
        self.supernet, self.batches, self.workers = supernet.eval(), batches, workers
        self.known: dict[Config, float] = {}
        self._pool = None

    @torch.inference_mode()
    def bits(self, config: Config) -> np.ndarray:
        """One bool per image, `(N,)`: was the right class first."""
        device = next(self.supernet.parameters()).device
        self.supernet.set_config(config)
        hits = [
            self.supernet(images.to(device)).argmax(dim=1).cpu() == labels
            for images, labels in self.batches
        ]
        return torch.cat(hits).numpy()

    def accuracy(self, config: Config) -> float:
        """Top-1 in % of one configuration."""
        return 100 * float(self.bits(config).mean())

    def __call__(self, configs: Iterable[Config]) -> Iterator[float]:
        configs = list(configs)
        missing = list(dict.fromkeys(one for one in configs if one not in self.known))
        values = self._pool.imap(_score, missing) if self._pool else map(self.accuracy, missing)
        found = iter(values)
        for config in configs:
            if config not in self.known:
                self.known[config] = next(found)
            yield self.known[config]

    def __enter__(self) -> InheritedAccuracy:
        if self.workers > 0:
            context = multiprocessing.get_context("spawn")
            self._pool = context.Pool(
                self.workers, _start, (InheritedAccuracy(self.supernet, self.batches),)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
            self._pool = None


_own: InheritedAccuracy | None = None  # of a worker process


def _start(own: InheritedAccuracy) -> None:
    global _own
    torch.set_num_threads(1)
    _own = own


def _score(config: Config) -> float:
    return _own.accuracy(config)
