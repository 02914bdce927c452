"""A paper outside the repository, for tests: well-behaved models and ones that fail in each way.

It joins through the entry-point group, as any package does, so child processes find it too.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import registry

PAPER_YAML = """
key: benchpaper
title: A paper for tests
authors: [Nobody]
venue: none
year: 2024
summary: Models that behave, and models that do not.
variants:
"""
VARIANT = """
  benchpaper_{name}:
    build: "model:{name}"
    track: fashion_mini
    image_size: 32
    num_classes: 10
"""
MODEL_PY = '''
import ctypes, os, resource, sys, time
import torch
from torch import nn


class Net(nn.Module):
    """A convolution and a head; `trouble` is called before each forward pass."""

    def __init__(self, num_classes, width=8, trouble=None, norm=False):
        super().__init__()
        self.trouble = trouble
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.head = nn.Linear(width, num_classes)
        self.num_classes = num_classes

    def forward(self, x):
        if self.trouble:
            self.trouble()
        return self.head(self.norm(self.stem(x).mean(dim=(2, 3))))


def _hog():
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    torch.empty(1 << 40, dtype=torch.uint8)


def _kill():
    os.kill(os.getpid(), 9)


def _chat():
    print("noise on standard output")
    os.write(1, b"more noise\\n")


def _raise():
    raise RuntimeError("the model\\nis unwell")


def small(num_classes, image_size, width=8): return Net(num_classes, width)
def wide(num_classes, image_size): return Net(num_classes, 64)
def normed(num_classes, image_size): return Net(num_classes, norm=True)
def chatty(num_classes, image_size): return Net(num_classes, trouble=_chat)
def raising(num_classes, image_size): return Net(num_classes, trouble=_raise)
def exiting(num_classes, image_size): return Net(num_classes, trouble=lambda: os._exit(3))
def crashing(num_classes, image_size): return Net(num_classes, trouble=lambda: ctypes.string_at(0))
def killed(num_classes, image_size): return Net(num_classes, trouble=_kill)
def sleeping(num_classes, image_size): return Net(num_classes, trouble=lambda: time.sleep(600))
def hogging(num_classes, image_size): return Net(num_classes, trouble=_hog)
'''
NAMES = (
    "small", "wide", "normed", "chatty", "raising", "exiting", "crashing", "killed", "sleeping",
    "hogging",
)  # fmt: skip


@contextlib.contextmanager
def installed(folder: Path) -> Iterator[None]:
    """Write the paper below `folder` and have registry and child processes see it."""
    package = folder / "benchpapers" / "benchpaper"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "model.py").write_text(MODEL_PY)
    variants = "".join(VARIANT.format(name=name) for name in NAMES)
    (package / "paper.yaml").write_text(PAPER_YAML + variants)
    info = folder / "benchpapers-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: benchpapers\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[replivit.papers]\nbenchpapers = benchpapers\n")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(folder))
        registry.refresh()
        yield
    registry.refresh()
    for name in [name for name in sys.modules if name.split(".")[0] == "benchpapers"]:
        del sys.modules[name]
