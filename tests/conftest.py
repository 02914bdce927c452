"""Every test writes its records, data and figures to a place of its own."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """`REPLIVIT_HOME` of the test, so that nothing is written into the checkout."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("REPLIVIT_HOME", str(home))
    monkeypatch.delenv("REPLIVIT_DATA", raising=False)
    return home
