"""`paper.yaml`: what it accepts, and that a mistake names file, line and key."""

from __future__ import annotations

import pytest

from harness.errors import ReplivitError
from harness.paper import load_paper

GOOD = """\
key: toy
title: A toy
authors: [A. Author]
venue: Nowhere
year: 2024
summary: Small.
variants:
  toy_one:
    build: "model:toy"
published:
  - {variant: One, of: toy_one, metric: top1, value: 70.1, unit: "%", source: README, seen: true}
"""


def write(tmp_path, text):
    path = tmp_path / "paper.yaml"
    path.write_text(text)
    return path


def test_good_file_is_read(tmp_path):
    paper = load_paper(write(tmp_path, GOOD))
    assert paper.variants["toy_one"].num_classes == 1000
    assert paper.published[0].value == 70.1


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("year: 2024", "yaer: 2024", 5, ["yaer", "unknown key"]),
        ("year: 2024", "year: soon", 5, ["year"]),
        ('unit: "%"', "unit: fraction", 11, ["published.0", "'fraction'", "'%'"]),
        ('build: "model:toy"', "build: model.toy", 9, ["variants.toy_one.build"]),
        ("seen: true", "seen: true, page: 3", 11, ["published.0.page", "unknown key"]),
        ("of: toy_one", "of: toy_two", 1, ["toy_two", "not a variant"]),
        ("summary: Small.", "showcase: [toy_two]\nsummary: Small.", 1, ["showcase", "toy_two"]),
        ("key: toy", "key: Toy Paper", 1, ["key"]),
        ("value: 70.1", "value: .nan", 11, ["published.0.value", "finite"]),
        ("value: 70.1", "value: 70.1, tolerance: -1", 11, ["published.0.tolerance"]),
    ],
)
def test_mistake_names_file_line_and_key(tmp_path, old, new, line, words):
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ReplivitError) as caught:
        load_paper(path)
    message = str(caught.value)
    assert str(path) in message
    assert f"line {line}" in message
    for word in words:
        assert word in message
    assert "\n" not in message


def test_same_published_row_twice_is_refused(tmp_path):
    last = GOOD.splitlines()[-1] + "\n"
    with pytest.raises(ReplivitError, match="stands twice"):
        load_paper(write(tmp_path, GOOD + last))


def test_broken_yaml_and_missing_file(tmp_path):
    with pytest.raises(ReplivitError, match=r"line 3: not valid YAML"):
        load_paper(write(tmp_path, "key: toy\ntitle: [open\n: x"))
    with pytest.raises(ReplivitError, match=r"not valid YAML .it refers to itself"):
        load_paper(write(tmp_path, "key: &a {title: *a}"))
    with pytest.raises(ReplivitError, match="No such file"):
        load_paper(tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReplivitError, match="UTF-8"):
        load_paper(binary)


def test_facts_cannot_be_changed(tmp_path):
    paper = load_paper(write(tmp_path, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        paper.year = 2025
