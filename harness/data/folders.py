"""Data in local folders: parquet files by split, and one folder per class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from harness.data.images import DataError, Files
from harness.data.tracks import Track


def holds_data(folder: Path) -> bool:
    """Whether a folder exists and holds anything that could be a data set."""
    return folder.is_dir() and any(
        not one.name.startswith(".") and (one.is_dir() or one.suffix == ".parquet")
        for one in folder.iterdir()
    )


def has_split(folder: Path, split: str) -> bool:
    """Whether a folder holds a split as parquet files or as a folder."""
    return (folder / split).is_dir() or bool(parquet_files(folder, split))


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The parquet files of a split: one file, or shards, also in `data/` as the hub keeps them.

    Raises:
        DataError: shards are missing (`train-00000-of-00003.parquet` without its fellows).
    """
    for base in (folder, folder / "data"):
        if (base / f"{split}.parquet").is_file():
            return [base / f"{split}.parquet"]
        shards = sorted(base.glob(f"{split}-*.parquet"))
        if shards:
            total = re.search(r"-of-(\d+)", shards[0].stem)
            if total and int(total[1]) != len(shards):
                raise DataError(f"{base} has {len(shards)} of {int(total[1])} parts of {split}")
            return shards
    return []


def image_folder(folder: Path, track: Track | None) -> tuple[Files, np.ndarray, Sequence[str]]:
    """Images in `<folder>/<class>/`: source, labels and class names in sorted order.

    Raises:
        DataError: no class folders, an empty one, or others than the track's.
    """
    try:
        names, numbers = find_classes(str(folder))
    except FileNotFoundError as error:
        flat = sum(one.suffix.lower() in IMG_EXTENSIONS for one in folder.iterdir())
        example = f" ({', '.join(track.classes[:2])}, ...)" if track else ""
        raise DataError(
            f"{folder} holds {flat:,} images without class folders; sort them into one folder per "
            f"class{example}"
        ) from error
    if track:
        check_classes(names, track, str(folder))
    try:
        samples = make_dataset(str(folder), numbers, IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise DataError(f"{folder}: {str(error).split('. ')[0]}") from error
    paths = [path for path, _ in samples]
    return Files(paths), np.array([label for _, label in samples], dtype=np.int64), names


def check_classes(names: Sequence[str], track: Track, place: str) -> None:
    """Refuse class names that are not the track's in the track's order: labels would be wrong."""
    expected = track.classes
    if tuple(names) == expected:
        return
    if track.class_words and not re.match(r"n\d{8}$", names[0]):
        # the hub's ImageNet names its classes in words; a few of them are spelt in two ways
        expected = track.class_words
        pairs = zip(names, expected, strict=False)
        same = sum(ours.split(",")[0] == theirs.split(",")[0] for ours, theirs in pairs)
        if len(names) == len(expected) and same > 0.9 * len(expected):
            return
    if len(names) != len(expected):
        missing = [one for one in expected if one not in set(names)]
        hint = f"; {missing[0]} is missing" if missing else ""
        raise DataError(
            f"{place} has {len(names)} classes, but {track.name} has {len(expected)}{hint}"
        )
    first = next(i for i, name in enumerate(names) if name != expected[i])
    raise DataError(
        f"{place}: class {first} is {names[first]!r}, but {track.name} has {expected[first]!r} "
        "there, so its labels mean other classes"
    )
