"""Where data come from: the package, the data folder, a local folder or parquet file, the hub.

A track is looked for in `root` or `REPLIVIT_DATA` first, then in the package itself. Only a track
that is nowhere on this machine, or a hub name asked for as such, ever touches the network.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.data import folders
from harness.data.images import Column, DataError, ImageDataset
from harness.data.tracks import HERE, SPLIT_NAMES, TRACKS, Track, get_track
from harness.errors import ReplivitError, one_line

#: Parquet files up to this size are read into memory; larger ones go through `datasets`' cache.
IN_MEMORY_BYTES = 2**30
#: Labels without class names are counted up to their largest; a larger one is no class.
MOST_CLASSES = 1_000_000
JPEG = b"\xff\xd8"
HUB = "hub:"
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True)
class Place:
    """A folder where a track may lie, and who named it."""

    folder: Path
    origin: str  # "data folder", "REPLIVIT_DATA" or "package"


def places(track: Track | str, root: Path | str | None = None) -> list[Place]:
    """The folders in which `track` is looked for, in order; they need not exist."""
    track = get_track(track) if isinstance(track, str) else track
    origin, base = "data folder", root
    if root is None:
        origin, base = "REPLIVIT_DATA", os.environ.get("REPLIVIT_DATA")
    found = []
    if base:
        base = Path(base).expanduser()
        found = [Place(base / name, origin) for name in track.folders or (track.name,)]
        splits = {name for split in track.images for name in track.split_names(split)}
        if root and any(folders.has_split(base, name) for name in splits):
            found.append(Place(base, origin))  # the folder given is the track itself
    if track.embedded:
        found.append(Place(HERE / track.embedded, "package"))
    return found


def locate(track: Track | str, root: Path | str | None = None) -> Place | None:
    """The first of the `places` that holds anything, or None."""
    return next((one for one in places(track, root) if folders.holds_data(one.folder)), None)


def load_split(
    track_or_path: Track | str | Path, split: str = "test", root: Path | str | None = None
) -> ImageDataset:
    """The images of one split.

    Args:
        track_or_path: a track; a folder with `<split>.parquet`, `<split>-*.parquet` or
            `<split>/<class>/<image>`; a parquet file; or a hub name ("owner/name", "hub:name").
        split: "train", "test" or what the data set calls it ("val" serves as "test" where there
            is no "test"; ImageNet's test images are those of `val`).
        root: where a track is looked for instead of `REPLIVIT_DATA`: a folder, or "hub:<name>".

    Raises:
        ReplivitError: nothing there, or truncated, mislabelled, unreadable; in one sentence.
    """
    if root is not None and not str(root).startswith(HUB) and not Path(root).expanduser().is_dir():
        raise ReplivitError(f"no folder {root} to look for {track_or_path} in")
    if isinstance(track_or_path, Track):
        return _load_track(track_or_path, split, root)
    text = str(track_or_path)
    if text in TRACKS:
        return _load_track(get_track(text), split, root)
    path = Path(text).expanduser()
    if path.exists():
        return _load_local(path, _split_names(split), split, None)
    if text.startswith(HUB) or (_HUB_NAME.match(text) and not text.endswith(".parquet")):
        return _load_hub(text.removeprefix(HUB), split, None)
    if re.fullmatch(r"\w+", text):
        get_track(text)  # a word that is no folder is a mistyped track: it says which one
    raise ReplivitError(
        f"no folder or parquet file {text!r}; the tracks are {', '.join(TRACKS)}, and a hub name "
        "is written owner/name"
    )


def _split_names(split: str) -> tuple[str, ...]:
    return SPLIT_NAMES.get(split, (split,))


def _load_track(track: Track, split: str, root: Path | str | None) -> ImageDataset:
    if split not in track.images:
        known = ", ".join(track.images)
        raise ReplivitError(f"track {track.name} has no split {split!r}; it has {known}")
    if root is not None and str(root).startswith(HUB):
        return _checked(_load_hub(str(root).removeprefix(HUB), split, track), track)
    place = locate(track, root)
    if place:
        return _checked(_load_local(place.folder, track.split_names(split), split, track), track)
    if track.hub and root is None:
        return _checked(_load_hub(track.hub, split, track), track)
    looked = ", ".join(str(one.folder) for one in places(track, root))
    raise ReplivitError(
        f"track {track.name} is not on this machine "
        f"({f'looked in {looked}' if looked else 'REPLIVIT_DATA is not set'}); set REPLIVIT_DATA "
        f"to the folder that holds {(track.folders or (track.name,))[0]}/"
    )


def _load_local(path: Path, names: Sequence[str], split: str, track: Track | None) -> ImageDataset:
    """A parquet file, or a folder of parquet files or of class folders."""
    about = {"split": split, "track": track, "name": track.title if track else path.name}
    if path.is_file():
        return _load_parquet([path], **about)
    for name in names:
        shards = folders.parquet_files(path, name)
        if shards:
            return _load_parquet(shards, **about)
        if (path / name).is_dir():
            source, labels, classes = folders.image_folder(path / name, track)
            return ImageDataset(source, labels, classes, place=str(path / name), **about)
    raise ReplivitError(
        f"{path} has no split {split!r}: expected {names[0]}.parquet or {names[0]}/<class>/<image>"
    )


def _load_parquet(files: list[Path], *, name: str, split: str, track: Track | None):
    """Parquet files with an image and a label column."""
    place = str(files[0] if len(files) == 1 else files[0].parent)
    if sum(file.stat().st_size for file in files) > IN_MEMORY_BYTES:
        rows = _with_datasets(lambda datasets: datasets.Dataset.from_parquet(
            [str(file) for file in files]), f"cannot read {place}")  # fmt: skip
        return _from_rows(rows, name=name, split=split, track=track, place=place)
    table = _read_parquet(files)
    image, label, names = _parquet_columns(table.schema, place)
    cells = table.column(image).combine_chunks()
    # Hugging Face's layout keeps the bytes in a struct; plain files have them directly
    if hasattr(cells, "field") and cells.type.get_field_index("bytes") >= 0:
        cells = cells.field("bytes")
    if str(cells.type) not in ("binary", "large_binary"):
        raise DataError(f"{place}: column {image} holds {cells.type}, not encoded images (binary)")
    labels = table.column(label).to_numpy()
    return ImageDataset(
        Column(cells, place), labels, _classes(names, labels, track, name),
        name=name, split=split, track=track, place=place,
    )  # fmt: skip


def _read_parquet(files: list[Path]) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ReplivitError("reading parquet needs pyarrow: pip install pyarrow") from error
    tables = []
    for file in files:
        try:
            tables.append(pyarrow.parquet.read_table(file))
            _ = tables[-1].schema.names  # decoded only here: damaged ones are no text
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{file} is truncated or not a parquet file ({one_line(error)})"
            ) from error
    try:
        return pyarrow.concat_tables(tables)
    except pyarrow.ArrowException as error:
        raise DataError(f"the parquet files of {files[0].parent} have different columns") from error


def _parquet_columns(schema: Any, place: str) -> tuple[str, str, list[str] | None]:
    """Image column, label column and class names, from Hugging Face's note or the usual names."""
    features = _noted_features((schema.metadata or {}).get(b"huggingface"))
    kinds = {name: one.get("_type") for name, one in features.items()}
    image, label = _pick_columns(kinds, schema.names, place)
    names = features.get(label, {}).get("names")
    return image, label, [str(one) for one in names] if isinstance(names, list) else None


def _noted_features(note: bytes | None) -> dict[str, dict[str, Any]]:
    """Column -> what Hugging Face's note says of it; a note that cannot be read says nothing."""
    try:
        found = json.loads(note)["info"]["features"] if note else {}
    except (ValueError, LookupError, TypeError):
        return {}
    found = found if isinstance(found, dict) else {}
    return {name: one for name, one in found.items() if isinstance(one, dict)}


def _pick_columns(kinds: dict[str, str | None], names: Sequence[str], place: str) -> tuple:
    def pick(kind: str, usual: tuple[str, ...]) -> str:
        chosen = [name for name in names if kinds.get(name) == kind]
        chosen += [name for name in usual if name in names]
        if not chosen:
            raise DataError(
                f"{place} has no column named {' or '.join(usual)}; it has {', '.join(names)}"
            )
        return chosen[0]

    return pick("Image", ("image", "img")), pick("ClassLabel", ("label", "labels"))


def _with_datasets(action: Any, failure: str) -> Any:
    """Run `action(datasets)`; whatever goes wrong is one sentence that starts with `failure`."""
    try:
        import datasets
    except ImportError as error:
        raise ReplivitError(f"{failure}: pip install datasets") from error
    # a data set's own program is never run (releases before 2.20 did so by default)
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    try:
        return action(datasets)
    except Exception as error:  # hub, network, disk and format errors share no base class
        raise ReplivitError(f"{failure} ({type(error).__name__}: {one_line(error)})") from error


def _load_hub(name: str, split: str, track: Track | None) -> ImageDataset:
    """A data set of the Hugging Face hub, or of its cache when `HF_HUB_OFFLINE` is set."""
    names = track.split_names(split) if track else _split_names(split)
    advice = "put it below REPLIVIT_DATA, or go online once" if track else "is the name right?"

    def load(datasets: Any) -> Any:
        stored = datasets.load_dataset(name)
        chosen = next((one for one in names if one in stored), None)
        if chosen is None:
            raise ValueError(f"it has the splits {', '.join(stored)}, not {split!r}")
        return stored[chosen]

    rows = _with_datasets(load, f"cannot load {name} from the Hugging Face hub; {advice}")
    title = track.title if track else name
    return _from_rows(rows, name=title, split=split, track=track, place=f"{HUB}{name}")


def _from_rows(rows: Any, *, name: str, split: str, track: Track | None, place: str):
    """An `ImageDataset` over a Hugging Face `Dataset`."""
    import datasets

    kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
    image, label = _pick_columns(kinds, rows.column_names, place)
    names = getattr(rows.features[label], "names", None)
    labels = np.asarray(rows[label][:])
    source = Column(rows.cast_column(image, datasets.Image(decode=False)), place, image)
    return ImageDataset(
        source, labels, _classes(names, labels, track, name),
        name=name, split=split, track=track, place=place,
    )  # fmt: skip


def _classes(
    names: Sequence[str] | None, labels: np.ndarray, track: Track | None, name: str
) -> Sequence[str]:
    """Class names: the file's, which must be the track's in its order; numbers where unnamed."""
    if track is None:
        if names or not np.issubdtype(labels.dtype, np.integer):
            return names or ()  # labels that are no whole numbers are refused with the rest
        largest = int(labels.max(initial=0))
        if largest >= MOST_CLASSES:
            raise DataError(f"{name}: a label is {largest:,}, which cannot be a class")
        return [str(label) for label in range(largest + 1)]
    if names:
        folders.check_classes(names, track, name)
    return track.classes


def _checked(found: ImageDataset, track: Track) -> ImageDataset:
    """Refuse another number of images than the track has; name a re-encoded copy as such."""
    expected = track.images[found.split]
    if len(found) != expected:
        raise DataError(
            f"{found.place} has {len(found):,} images, but {track.name} has {expected:,} in "
            f"{found.split}: it is truncated or another data set (name the folder instead of the "
            "track to use it as it is)"
        )
    if track.lossless and found.source.read(0).startswith(JPEG):
        found.name = f"{track.title} (JPEG re-encoded)"
    return found
