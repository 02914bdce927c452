"""Discovery: lazy, tolerant of a broken paper, helpful with a typo, open to other packages."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
import torch

import harness
from harness import registry
from harness.errors import ReplivitError

PAPER = """\
key: {key}
title: A toy
authors: [A. Author]
venue: Nowhere
year: 2024
summary: Small.
variants:
  {key}_one:
    build: "model:build_toy"
    args: {{width: 4}}
    image_size: 8
    num_classes: 3
experiments:
  table: {{run: "experiments:table", title: Table 1}}
"""
MODEL = """\
from torch import nn


def build_toy(num_classes, image_size, width):
    if image_size % 8:
        raise ValueError(f"image_size {image_size} must be a multiple of 8")
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, width),
                         nn.Linear(width, num_classes))
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `outside` with papers, declared by an entry point."""
    root = tmp_path / "outside"
    for key in ("toy", "broken", "crashing"):
        directory = root / key
        directory.mkdir(parents=True)
        (directory / "__init__.py").write_text("")
        (directory / "paper.yaml").write_text(PAPER.format(key=key))
        (directory / "model.py").write_text(MODEL)
    (root / "__init__.py").write_text("")
    (root / "broken" / "paper.yaml").write_text("key: broken\nsurprise: 1\n")
    (root / "crashing" / "model.py").write_text("raise RuntimeError('no luck\\ntoday')")
    monkeypatch.syspath_prepend(tmp_path)
    point = metadata.EntryPoint("outside", "outside", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [point])
    registry.refresh()
    yield root
    registry.refresh()
    for name in [name for name in sys.modules if name.split(".")[0] == "outside"]:
        del sys.modules[name]


def test_papers_of_another_package_join(package):
    keys = {paper.key for paper in harness.papers()}
    assert {"toy", "broken", "crashing", "baselines"} <= keys
    assert [one.name for one in harness.variants("toy")] == ["toy_one"]
    assert [one.name for one in registry.experiments("toy")] == ["toy/table"]


def test_broken_paper_shows_and_hides_nobody(package):
    broken = {paper.key: paper.broken for paper in harness.papers() if paper.broken}
    assert set(broken) == {"broken"}
    assert "line" in broken["broken"]
    with pytest.raises(ReplivitError, match="paper broken is broken"):
        registry.get_paper("broken")
    with pytest.raises(ReplivitError, match="paper broken is broken"):
        registry.get_variant("broken_one")


def test_build_is_deterministic_and_takes_overrides(package):
    torch.manual_seed(3)
    first = harness.build("toy_one")
    torch.manual_seed(3)
    second = harness.build("toy_one")
    assert torch.equal(first[1].weight, second[1].weight)
    assert harness.build("toy_one", num_classes=5, image_size=16, width=2)[2].out_features == 5
    assert first.pretrained_cfg["input_size"] == (3, 8, 8)


def test_mistakes_are_one_sentence(package):
    with pytest.raises(ReplivitError, match="did you mean toy_one"):
        harness.build("toy_on")
    with pytest.raises(ReplivitError, match=r"no variant 'qqq'; `replivit list` names all \d+$"):
        harness.build("qqq")
    with pytest.raises(ReplivitError, match="takes no option 'depth'; it takes: width"):
        harness.build("toy_one", depth=3)
    with pytest.raises(ValueError, match="multiple of 8"):
        harness.build("toy_one", image_size=9)
    for size in (0, 8.5, (8, 8, 8), "8"):
        with pytest.raises(ReplivitError, match="image_size must be a whole number of pixels"):
            harness.build("toy_one", image_size=size)
    with pytest.raises(ReplivitError, match="num_classes must be a whole number from 0 on, not -1"):
        harness.build("toy_one", num_classes=-1)
    with pytest.raises(ReplivitError, match=r"cannot import model.py \(no luck today\)"):
        harness.build("crashing_one")
    with pytest.raises(ReplivitError, match="did you mean toy/table"):
        registry.get_experiment("toy/tabel")
    with pytest.raises(ReplivitError, match="no paper 'tyo'"):
        registry.get_paper("tyo")


def test_a_key_used_twice_does_not_replace_the_first(package):
    (package / "baselines").mkdir()
    (package / "baselines" / "__init__.py").write_text("")
    (package / "baselines" / "paper.yaml").write_text(PAPER.format(key="baselines"))
    registry.refresh()
    assert registry.get_paper("baselines").package == "reproductions.baselines"
    double = next(one for one in harness.papers() if one.key == "baselines@outside.baselines")
    assert "already used" in double.broken


def test_a_variant_declared_twice_breaks_the_later_paper_alone(package):
    text = PAPER.format(key="toy").replace("toy_one", "deit_ti")
    (package / "toy" / "paper.yaml").write_text(text)
    registry.refresh()
    assert registry.get_variant("deit_ti").paper.key == "baselines"
    with pytest.raises(ReplivitError, match="'deit_ti' is already declared by baselines"):
        registry.get_paper("toy")


def test_an_option_of_the_wrong_type_is_one_sentence(package):
    with pytest.raises(ReplivitError, match=r"toy_one cannot be built with width='x' \("):
        harness.build("toy_one", width="x")
    text = PAPER.format(key="toy").replace("width: 4", "width: x")
    (package / "toy" / "paper.yaml").write_text(text)
    registry.refresh()
    with pytest.raises(TypeError):  # the paper's own fault: not the caller's
        harness.build("toy_one")


def test_package_that_cannot_be_imported_shows_as_broken(monkeypatch):
    point = metadata.EntryPoint("gone", "no_such_package", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: [point])
    registry.refresh()
    try:
        broken = {paper.key: paper.broken for paper in harness.papers() if paper.broken}
        assert "not an importable package" in broken["gone"]
        assert registry.get_paper("baselines")
    finally:
        registry.refresh()


def test_no_paper_of_this_project_is_broken():
    assert [paper.broken for paper in harness.papers() if paper.broken] == []


def test_listing_imports_no_torch():
    code = "import sys, harness; harness.variants(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
