"""Parts of a data set: images held out of training, on which a search may look."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pandas as pd

from harness.data.images import DataError, ImageDataset, Source


class _Chosen:
    """Some of the images of a source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.indices[index]))

    def where(self, index: int) -> str:
        return self.source.where(int(self.indices[index]))


class Part(ImageDataset):
    """Images `indices` of `whole`, as a data set of its own."""

    def __init__(self, whole: ImageDataset, indices: Sequence[int] | np.ndarray, split: str):
        self.whole, self.indices = whole, np.asarray(indices, dtype=np.int64)
        super().__init__(
            _Chosen(whole.source, self.indices), whole.labels[self.indices], whole.classes,
            name=whole.name, split=split, place=whole.place, track=whole.track,
        )  # fmt: skip

    @cached_property
    def pixels(self) -> np.ndarray | None:
        """As of the whole, which decodes every image once for all its parts."""
        return None if self.whole.pixels is None else self.whole.pixels[self.indices]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the whole's fingerprint and the indices."""
        digest = hashlib.sha256(self.whole.fingerprint.encode())
        digest.update(self.indices.astype("<i8").tobytes())
        return digest.hexdigest()


def hold_out(dataset: ImageDataset, count: int, seed: int = 0) -> tuple[Part, Part]:
    """Split a training set into (what stays, `count` images held out), the classes evenly.

    A search that looked at test images would choose on them; it looks at held-out images instead,
    which `harness.train(..., hold_out=count)` leaves out. The choice depends on `seed` alone.

    Raises:
        DataError: not between 1 and all but one of the images.
    """
    if not 0 < count < len(dataset):
        raise DataError(
            f"{dataset.name}, {dataset.split}: {count} of {len(dataset):,} images cannot be held "
            f"out; at least 1 and at most {len(dataset) - 1:,} can"
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    labels = dataset.labels[order]
    turn = pd.Series(labels).groupby(labels).cumcount()  # 0 for the first of each class, 1, ...
    chosen = np.zeros(len(dataset), dtype=bool)
    chosen[order[np.argsort(turn.to_numpy(), kind="stable")[:count]]] = True
    return (
        Part(dataset, np.flatnonzero(~chosen), f"{dataset.split} without {count} held out"),
        Part(dataset, np.flatnonzero(chosen), f"{count} held out of {dataset.split}"),
    )
