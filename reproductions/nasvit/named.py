"""Networks with a name, as data: `networks.yaml`."""

from __future__ import annotations

import functools
from pathlib import Path

from harness.paper import Fact, load_yaml
from reproductions.nasvit.space import Config, get_space


class Network(Fact):
    """One entry.

    Attributes:
        space: that it is of.
        config: its genes.
        origin: where it comes from, in words.
    """

    space: str = "nasvit"
    config: dict[str, int | list[int]]
    origin: str


class Networks(Fact):
    """The file."""

    networks: dict[str, Network]


@functools.cache
def networks() -> dict[str, Network]:
    """All entries by name.

    Raises:
        ReplivitError: a mistake in the file.
    """
    return load_yaml(Path(__file__).parent / "networks.yaml", Networks).networks


def named_configs(space: str = "nasvit") -> dict[str, Config]:
    """The configurations of a space that have a name.

    Raises:
        ValueError: one is outside its space.
    """
    return {
        name: get_space(space).check(one.config)
        for name, one in networks().items()
        if one.space == space
    }
