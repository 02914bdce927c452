"""What the races of `benchmarks/` let pass; their timings are not tests."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def timing(ratio: float) -> SimpleNamespace:
    """Of a competitor that takes `ratio` times as long as the first."""
    interval = (0.99 * ratio, 1.01 * ratio)
    return SimpleNamespace(median=ratio, ratio=ratio, ratio_interval=interval, ratio_status="ok")


@pytest.mark.parametrize(
    ("base", "keep_ratio", "what", "form", "ours", "dense", "passes"),
    [
        ("deit_s", 0.7, "eval", "ours", 0.9, 1.4, True),
        ("deit_s", 0.7, "eval", "ours", 0.9, 1.3, False),  # 1.44 times its parent
        ("deit_s", 0.7, "eval", "ours", 0.95, 1.9, False),  # 1.05 times the authors' code
        ("deit_s", 0.7, "eval", "deployed", 0.95, 1.9, False),
        ("deit_s", 0.7, "eval", "deployed", 0.9, 1.9, True),
        ("deit_s", 0.7, "step", "ours", 0.95, None, False),
        ("deit_s", 0.7, "step", "ours", 0.9, None, True),
        ("deit_s", 0.9, "eval", "ours", 0.9, 0.95, True),
        ("deit_s", 0.9, "eval", "ours", 0.9, 0.85, False),  # slower than its parent
        ("deit_ti", 0.7, "eval", "ours", 0.9, 1.0, True),  # no bar against the parent
    ],
)
def test_dynamicvit_has_to_beat_the_authors_and_its_parent(
    monkeypatch, base, keep_ratio, what, form, ours, dense, passes
):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    race = importlib.import_module("dynamicvit_versus_authors")
    table = race.Table()
    timings = {"theirs": timing(1), form: timing(ours)}
    if dense is not None:
        timings["dense fused"] = timing(dense)
    race.report(table, base, keep_ratio, what, 8, timings, error=1e-7)
    assert table.passed is passes
