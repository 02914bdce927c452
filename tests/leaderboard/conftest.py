"""One display case for the tests that only look at it."""

from pathlib import Path

import pytest
from display_case import make_case

from leaderboard import build_site


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """Papers and a store: 12 ImageNet and 3 micro models on two machines."""
    return make_case(tmp_path_factory.mktemp("case"), 12)


@pytest.fixture(scope="session")
def site(case, tmp_path_factory):
    """The pages of `case`."""
    papers, store = case
    return build_site(store, tmp_path_factory.mktemp("site"), papers)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty REPLIVIT_HOME."""
    monkeypatch.setenv("REPLIVIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
