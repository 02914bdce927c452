"""Settings by scale: what may be given, in which forms, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from harness import ReplivitError
from harness.settings import as_seeds, choose, of_scale


@dataclass(frozen=True)
class Network:
    depth: int = 2
    widths: tuple[int, ...] = (8, 16)

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError("a network has a block")


@dataclass(frozen=True)
class Setting:
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 3
    limit: int | None = None
    lr: float = 1e-3
    shares: Sequence[float] = (0.5, 0.7)
    names: tuple[str, ...] = ("a", "b")
    network: Network = Network()
    quiet: bool = False
    device: str | None = "cpu"


SCALES = {"tiny": Setting(seeds=(0,), epochs=1), "small": Setting(), "paper": Setting(limit=9)}


def test_scale_alone():
    assert choose(SCALES, "paper", {}) == SCALES["paper"]
    assert of_scale({"tiny": 4}, "tiny") == 4


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("seeds", 4, (4,)),
        ("seeds", [3, 1], (3, 1)),
        ("seeds", "0, 1,2", (0, 1, 2)),
        ("epochs", "7", 7),
        ("limit", None, None),
        ("limit", 5, 5),
        ("lr", "1e-2", 0.01),  # YAML reads it as a word
        ("lr", 1, 1),
        ("shares", 0.3, (0.3,)),
        ("shares", "0.3,1", (0.3, 1.0)),
        ("names", "b,c", ("b", "c")),
        ("names", ["b"], ("b",)),
        ("network", {"depth": 5}, Network(5, (8, 16))),
        ("network", Network(1), Network(1)),
        ("quiet", True, True),
    ],
)
def test_forms_of_values(name, given, expected):
    setting = choose(SCALES, "tiny", {name: given}, least={"epochs": 1, "limit": 1})
    assert setting == replace(SCALES["tiny"], **{name: expected})
    assert type(getattr(setting, name)) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("epoch", 1, "no option 'epoch'; there are seeds, epochs, limit"),
        ("epochs", 0, "option epochs must be a whole number from 1 on, not 0"),
        ("epochs", "0", "option epochs must be a whole number from 1 on, not '0'"),
        ("epochs", 1.5, "option epochs must be a whole number from 1 on, not 1.5"),
        ("epochs", True, "option epochs must be a whole number from 1 on, not True"),
        ("epochs", None, "option epochs must be a whole number from 1 on, not None"),
        ("limit", 0, "option limit must be a whole number from 1 on, not 0"),
        ("lr", "fast", "option lr must be a number, not 'fast'"),
        ("lr", float("nan"), "option lr must be a number from 0 on, not nan"),
        ("shares", "0.3,x", "option shares must be a number, not 'x'"),
        ("network", {"width": 1}, "option network: .*width"),
        ("network", {"depth": 0}, "option network: a network has a block"),
        ("seeds", (), r"seeds must be whole numbers that differ, not \(\)"),
        ("seeds", (0, 0), r"seeds must be whole numbers that differ, not \(0, 0\)"),
        ("seeds", "0,x", "seeds must be whole numbers that differ, not '0,x'"),
        ("seeds", None, "seeds must be whole numbers that differ, not None"),
        ("seeds", 0.5, "seeds must be whole numbers that differ, not 0.5"),
    ],
)
def test_impossible_values(name, given, message):
    least = {"epochs": 1, "limit": 1} | ({"lr": 0} if given != "fast" else {})
    with pytest.raises(ReplivitError, match=message):
        choose(SCALES, "tiny", {name: given}, least)


def test_unknown_scale():
    for call in (lambda: choose(SCALES, "huge", {}), lambda: of_scale(SCALES, "huge")):
        with pytest.raises(ReplivitError, match="no scale 'huge'; there are tiny, small, paper"):
            call()


def test_a_missing_device_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ReplivitError, match="no CUDA device is available; say device=cpu"):
        choose(SCALES, "tiny", {"device": "cuda:0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose(SCALES, "tiny", {"device": "cuda:0"}).device == "cuda:0"
    assert choose(SCALES, "tiny", {"device": None}).device is None


def test_seeds_alone():
    assert as_seeds(2) == (2,) and as_seeds("2,0") == (2, 0) and as_seeds(range(2)) == (0, 1)
