"""A toy data set that can be learned in seconds, a toy model, and a toy paper."""

from __future__ import annotations

import io
import sys
from importlib import metadata

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from training_tools import CLASSES, RECIPE, SIDE, Net

from harness import registry
from harness.training import train

COUNTS = {"train": 96, "test": 40}

PAPER = """\
key: toy
title: A toy
authors: [A. Author]
venue: Nowhere
year: 2024
summary: Small.
variants:
  toy_net:
    build: "model:toy_net"
    track: fashion_mini
    image_size: 16
    num_classes: 4
  toy_ship:
    build: "model:toy_net"
    track: fashion_mini
    image_size: 32
    num_classes: 10
  toy_recipe:
    build: "model:toy_net"
    track: fashion_mini
    recipe: own
"""
MODEL = """\
from torch import nn


class ToyNet(nn.Sequential):
    def __init__(self, num_classes, image_size, width, drop_path_rate):
        side = image_size // 4
        super().__init__(nn.Conv2d(3, width, 4, 4), nn.GELU(), nn.Flatten(), nn.Dropout(0.1),
                         nn.Linear(width * side**2, num_classes))
        self.num_classes = num_classes


def toy_net(num_classes, image_size, width=8, drop_path_rate=0.0):
    return ToyNet(num_classes, image_size, width, drop_path_rate)
"""


def picture(rng: np.random.Generator, label: int) -> bytes:
    """Noise with one bright band: the label is its height, which no flip changes."""
    pixels = rng.integers(0, 120, (SIDE, SIDE, 3), dtype=np.uint8)
    band = SIDE // CLASSES
    pixels[label * band : (label + 1) * band] += 120
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> str:
    """A folder with train.parquet and test.parquet."""
    folder = tmp_path_factory.mktemp("toy_data")
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        labels = np.arange(count) % CLASSES
        images = [{"bytes": picture(rng, int(label))} for label in labels]
        pd.DataFrame({"image": images, "label": labels}).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture
def net():
    """`net()` gives the same untrained model every time."""

    def make(dropout: float = 0.2, seed: int = 0) -> Net:
        torch.manual_seed(seed)
        return Net(dropout)

    return make


@pytest.fixture
def fit(toy_data, tmp_path, net):
    """`fit(name, **changes)` trains the toy model into a directory of that name."""

    def run(name: str = "run", model: nn.Module | None = None, recipe: dict | None = None, **more):
        more = {"image_size": 16, "quiet": True, "evaluate": False, **more}
        return train(
            net() if model is None else model, toy_data, {**RECIPE, **(recipe or {})},
            out=tmp_path / name, **more,
        )  # fmt: skip

    return run


@pytest.fixture
def toy_paper(tmp_path, monkeypatch):
    """The paper `toy`, declared by an entry point; returns its directory."""
    directory = tmp_path / "outside" / "toy"
    (directory / "recipes").mkdir(parents=True)
    (directory.parent / "__init__.py").write_text("")
    (directory / "__init__.py").write_text("")
    (directory / "paper.yaml").write_text(PAPER)
    (directory / "model.py").write_text(MODEL)
    (directory / "recipes" / "own.yaml").write_text("extends: deit_imagenet\nlr: 7.0e-3\n")
    monkeypatch.syspath_prepend(tmp_path)
    point = metadata.EntryPoint("outside", "outside", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [point])
    registry.refresh()
    yield directory
    registry.refresh()
    for name in ("outside", "outside.toy", "outside.toy.model"):
        sys.modules.pop(name, None)
