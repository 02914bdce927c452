"""Tracks: a data set and the protocol on which top-1 counts, read from `tracks.yaml`.

Nothing here imports torch: describing a variant's input must stay instant.
"""

from __future__ import annotations

import difflib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from harness.errors import ReplivitError
from harness.paper import Fact, InputSpec, load_yaml

if TYPE_CHECKING:
    from harness.registry import Variant

HERE = Path(__file__).parent

#: Where a split of a foreign data set is looked for, when the track does not say otherwise.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "val", "validation"),
    "val": ("val", "validation"),
    "validation": ("validation", "val"),
}


class Track(Fact):
    """A data set and its protocol.

    Attributes:
        title: the data set's name in records and pages.
        image_size: side of the square input, in pixels.
        canvas: side in pixels on which small images are centred (black); such a track is decoded
            once and kept in memory. None for photographs of any size.
        lossless: whether the original images are; JPEGs in their place are a re-encoded copy, and
            are named so.
        images: split -> number of images; another count is refused as truncated.
        protocol: fields of the default training recipe.
        folders: names looked for below the data folders.
        embedded: the folder beside this file that holds the data, if it comes with the package.
        hub: the Hugging Face name it is fetched from when it is nowhere on this machine.
    """

    name: str = ""
    title: str
    image_size: int = Field(gt=0)
    canvas: int | None = None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear", "nearest"]
    crop_pct: float = Field(gt=0, le=1)
    lossless: bool = False
    images: dict[str, int]
    splits: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    class_list: tuple[str, ...] | str = Field(alias="classes")
    folders: tuple[str, ...] = ()
    embedded: str | None = None
    hub: str | None = None
    protocol: dict[str, Any]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        if isinstance(self.class_list, str):
            return _timm_classes(self.class_list)
        return self.class_list

    @property
    def class_words(self) -> tuple[str, ...]:
        """Descriptions of classes that are named by an identifier; otherwise empty."""
        if isinstance(self.class_list, str):
            return _timm_classes(self.class_list, "label_descriptions")
        return ()

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def input(self) -> InputSpec:
        """The track's own normalisation, interpolation and crop."""
        return InputSpec(
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
        )

    def split_names(self, split: str) -> tuple[str, ...]:
        """The names under which `split` may be stored, best first."""
        return self.splits.get(split) or SPLIT_NAMES.get(split, (split,))


@functools.cache
def _timm_classes(name: str, what: str = "label_names") -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    return tuple(getattr(ImageNetInfo(name), what)())


class _TrackFile(Fact):
    tracks: dict[str, Track]


@functools.cache
def _tracks() -> dict[str, Track]:
    read = load_yaml(HERE / "tracks.yaml", _TrackFile).tracks
    return {name: track.model_copy(update={"name": name}) for name, track in read.items()}


#: The names of all tracks.
TRACKS: tuple[str, ...] = tuple(_tracks())


def get_track(name: str) -> Track:
    """The track `name`; a typo raises `ReplivitError` with suggestions."""
    if name not in _tracks():
        close = difflib.get_close_matches(name, TRACKS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(TRACKS)}"
        raise ReplivitError(f"no track {name!r}; {hint}")
    return _tracks()[name]


def input_spec(variant: Variant, track: str | None = None) -> InputSpec:
    """What `variant` expects of an image, every field set.

    On its own track the variant's fields go before the track's. On another track that track's
    protocol holds alone, so that all its rows see the same pixels.
    """
    chosen = get_track(track or variant.track)
    if chosen.name != variant.track:
        return chosen.input
    own = variant.spec.input.model_dump(exclude_none=True)
    return chosen.input.model_copy(update=own)
