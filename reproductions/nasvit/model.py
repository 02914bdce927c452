"""The variants' builders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.patches import ImageSize
from reproductions.nasvit.named import named_configs
from reproductions.nasvit.space import Config, get_space
from reproductions.nasvit.subnet import Subnet
from reproductions.nasvit.supernet import Supernet


def supernet(
    num_classes: int,
    image_size: ImageSize,
    space: str = "nasvit",
    config: Config | Mapping[str, Any] | str | None = None,
    switched: bool = True,
) -> Supernet:
    """The supernet of a space: `(B, 3, S, S) -> (B, num_classes)` by the configuration in force.

    Args:
        image_size: side of the images; they are resized to the configuration's resolution.
        space: nasvit, micro or micro_cnn.
        config: in force, a mapping or the name of a network in networks.yaml; default the largest.
            `set_config` changes it.
        switched: whether layer scales are switched by the configuration.

    Raises:
        ValueError: no such space or network, a configuration outside the space, or images that are
            not square.
    """
    if not isinstance(switched, bool):
        raise ValueError(f"switched must be true or false, not {switched!r}")
    known = get_space(space)
    chosen = None if config is None else _config(config, space)
    return Supernet(known, num_classes, image_size, switched, chosen)


def subnet(
    num_classes: int,
    image_size: ImageSize,
    config: Config | Mapping[str, Any] | str,
    space: str = "nasvit",
) -> Subnet:
    """One network of a space as a dense model: `(B, 3, S, S) -> (B, num_classes)`.

    Args:
        image_size: side of the images; they are resized to the configuration's resolution.
        config: a mapping, or the name of a network in networks.yaml.
        space: nasvit, micro or micro_cnn.

    Raises:
        ValueError: no such space or network, a configuration outside the space, or images that are
            not square.
    """
    return Subnet(get_space(space), _config(config, space), num_classes, image_size)


def _config(given: Config | Mapping[str, Any] | str, space: str) -> Config | Mapping[str, Any]:
    if not isinstance(given, str):
        return given
    known = named_configs(space)
    if given not in known:
        raise ValueError(f"no network {given!r} of {space}; there are {', '.join(known)}")
    return known[given]
