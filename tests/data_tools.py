"""Made-up data sets and a toy paper, small enough to be known to the last image."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from harness import registry
from harness.data import Track, get_track

TOY_PAPER = """\
key: toy
title: A toy
authors: [A. Author]
venue: Nowhere
year: 2024
summary: Small.
variants:
  toy_small: {build: "model:build_toy", args: {width: 4}, convert: "model:from_official",
              track: cifar10, image_size: 32, num_classes: 10,
              weights: {cifar10: weights/toy_small.safetensors}}
  toy_big: {build: "model:build_toy", args: {width: 8}, convert: "model:from_official",
            track: cifar10, image_size: 32, num_classes: 10, input: {crop_pct: 0.5}}
"""
TOY_MODEL = """\
import torch
from torch import nn


class Toy(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.num_classes = num_classes
        self.body = nn.Conv2d(3, width, 8, 8)
        self.head = nn.Linear(width, num_classes)
        self.register_buffer("table", torch.arange(4))

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))

    def reset_classifier(self, num_classes):
        self.num_classes = num_classes
        self.head = nn.Linear(self.head.in_features, num_classes)


def build_toy(num_classes, image_size, width):
    return Toy(num_classes, width)


def from_official(state):
    names = {"stem": "body", "fc": "head"}
    return {names[k.split(".")[0]] + "." + k.split(".")[1]: v for k, v in state.items()}
"""


def install_toy_paper(root: Path, monkeypatch) -> Path:
    """Make `toy` the only paper, in a package of its own; returns its folder.

    Call `registry.refresh()` afterwards.
    """
    directory = root / "toy_package" / "toy"
    directory.mkdir(parents=True)
    for folder in (directory.parent, directory):
        (folder / "__init__.py").write_text("")
    (directory / "paper.yaml").write_text(TOY_PAPER)
    (directory / "model.py").write_text(TOY_MODEL)
    monkeypatch.syspath_prepend(root)
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_package"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(registry, "BUILT_IN", "toy_package")
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [])
    registry.refresh()
    return directory


def image_of(label: int, number: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A grey image whose value is `20 * label + number`: its label can be read off it."""
    return Image.new("RGB", size, (20 * label + number,) * 3)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def write_parquet(
    path: Path,
    images: list[bytes | None],
    labels: list,
    names: list[str] | None = None,
    columns: tuple[str, str] = ("image", "label"),
) -> Path:
    """A parquet file in Hugging Face's layout."""
    features = {columns[0]: {"_type": "Image"}}
    features[columns[1]] = {"names": names, "_type": "ClassLabel"} if names else {"_type": "Value"}
    table = pa.table(
        {
            columns[0]: [{"bytes": one, "path": None} for one in images],
            columns[1]: pa.array(labels),
        }
    )
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(note), path)
    return path


def small_cifar(folder: Path, count: int = 40, kind: str = "PNG", **changes) -> Track:
    """`<folder>/cifar10/{train,test}.parquet` with `count` images each, and a track to match."""
    track = get_track("cifar10")
    labels = [i % 10 for i in range(count)]
    images = [encoded(image_of(label, i // 10), kind) for i, label in enumerate(labels)]
    for split in ("train", "test"):
        write_parquet(folder / "cifar10" / f"{split}.parquet", images, labels, list(track.classes))
    return track.model_copy(update={"images": {"train": count, "test": count}, **changes})


def write_folders(folder: Path, classes: list[str], each: int = 2, size=(40, 30)) -> Path:
    """`<folder>/<class>/<number>.png`."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            image_of(label % 12, number, size).save(folder / name / f"{number}.png")
    return folder


def grey_of(image) -> int:
    """The value `image_of` was made with."""
    return int(np.asarray(image)[0, 0, 0])
