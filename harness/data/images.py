"""`ImageDataset`: encoded images from anywhere, decoded to RGB, fingerprinted by content."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from harness.data.fingerprint import content_fingerprint
from harness.data.tracks import Track
from harness.errors import ReplivitError

#: PIL reports a broken file with any of these, depending on the format.
DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


class DataError(ReplivitError):
    """Something is wrong with a data set, in one sentence.

    A loader's worker process hands an error on as `type("Caught ... traceback ... message")`;
    what goes before the sentence is dropped again here.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


class Source(Protocol):
    """Encoded images in a fixed order."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded image (PNG, JPEG, ...)."""
        ...

    def where(self, index: int) -> str:
        """The image's place in words, for messages."""
        ...


class Files:
    """Images as files of their own."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()

    def where(self, index: int) -> str:
        return self.paths[index]


class Column:
    """A column of encoded images: a `pyarrow` array of bytes, or a Hugging Face data set."""

    def __init__(self, rows: Any, place: str, column: str | None = None) -> None:
        self.rows, self.place, self.column = rows, place, column

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes:
        cell = self.rows[index]
        if self.column is None:
            data = cell.as_py()
        else:
            cell = cell[self.column] or {}
            data = cell.get("bytes")
            if data is None and cell.get("path"):
                data = Path(cell["path"]).read_bytes()
        if data is None:
            raise ValueError("no image is stored")
        return data

    def where(self, index: int) -> str:
        return f"row {index} of {self.place}"


class ImageDataset(Dataset):
    """A map-style data set: `dataset[i] -> (PIL.Image in RGB, int)`.

    Attributes:
        name: the data set's name for people ("CIFAR-10 (JPEG re-encoded)").
        split: the split's name as it was asked for.
        classes: class names in label order.
        labels: `(N,)` int64.
        track: the track it belongs to, or None for foreign data.
        place: where it was found, for people; never part of a record.

    Raises:
        DataError: a label lies outside the classes; later, on access, an image that cannot be
            decoded (named by index and place).
    """

    def __init__(
        self,
        source: Source,
        labels: np.ndarray,
        classes: Sequence[str],
        *,
        name: str,
        split: str,
        place: str = "",
        track: Track | None = None,
    ) -> None:
        self.source = source
        self.labels = np.asarray(labels)
        self.classes = tuple(classes)
        self.name, self.split, self.place, self.track = name, split, place, track
        self._check_labels()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        index = range(len(self))[index]  # negative indices, and IndexError at the end
        if self.pixels is not None:
            return Image.fromarray(self.pixels[index]), int(self.labels[index])
        return self.decode(index), int(self.labels[index])

    def __repr__(self) -> str:
        return f"<{self.name}, {self.split}: {len(self):,} images, {len(self.classes)} classes>"

    def decode(self, index: int) -> Image.Image:
        """Image `index` in RGB, freshly decoded (and put on the track's canvas, if it has one)."""
        try:
            image = Image.open(io.BytesIO(self.source.read(index))).convert("RGB")
        except DECODING_ERRORS as error:
            raise DataError(
                f"{self.name}, {self.split}: image {index} ({self.source.where(index)}) "
                f"cannot be decoded: {_without_addresses(error)}"
            ) from error
        canvas = self.track.canvas if self.track else None
        return image if canvas is None else self._centred(image, index, canvas)

    def _centred(self, image: Image.Image, index: int, side: int) -> Image.Image:
        width, height = image.size
        if width == height == side:
            return image
        if max(width, height) > side:
            raise DataError(
                f"{self.name}, {self.split}: image {index} is {width}x{height} pixels, "
                f"the track's are at most {side}x{side}"
            )
        canvas = Image.new("RGB", (side, side))
        canvas.paste(image, ((side - width) // 2, (side - height) // 2))
        return canvas

    @cached_property
    def pixels(self) -> np.ndarray | None:
        """All images as uint8 `(N, H, W, 3)`, decoded once; None unless the track has a canvas."""
        if self.track is None or self.track.canvas is None:
            return None
        side = self.track.canvas
        pixels = np.empty((len(self), side, side, 3), dtype=np.uint8)
        for index in range(len(self)):
            pixels[index] = np.asarray(self.decode(index))
        return pixels

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the content: see `harness.data.fingerprint`."""
        try:
            return content_fingerprint(self.source, self.labels, self.classes)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.name}, {self.split}: cannot be read ({error})") from error

    def _check_labels(self) -> None:
        """Refuse what would silently train or score nonsense."""
        about = f"{self.name}, {self.split}"
        if len(self.source) != len(self.labels):
            raise DataError(f"{about}: {len(self.source)} images but {len(self.labels)} labels")
        if len(self.labels) == 0:
            raise DataError(f"{about}: no images in {self.place}")
        if not np.issubdtype(self.labels.dtype, np.integer) or self.labels.ndim != 1:
            raise DataError(
                f"{about}: labels must be whole numbers, not {self.labels.dtype}: one for each "
                f"image and none missing (the first is {self.labels[0]})"
            )
        self.labels = self.labels.astype(np.int64)
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if len(wrong):
            first = int(wrong[0])
            label = int(self.labels[first])
            hint = " (this split has no labels)" if (self.labels == -1).all() else ""
            raise DataError(
                f"{about}: image {first} has the label {label}, outside the "
                f"{len(self.classes)} classes{hint}; {len(wrong)} such labels"
            )


def _without_addresses(error: BaseException) -> str:
    """PIL names the in-memory buffer by its address, which tells a user nothing."""
    text = " ".join(str(error).split())
    return "not an image" if text.startswith("cannot identify image file") else text
