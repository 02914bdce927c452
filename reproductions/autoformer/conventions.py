"""How the paper counts: parameters of the sampled subnet, and `get_complexity` as "FLOPs"."""

from __future__ import annotations

from harness.patches import ImageSize
from reproductions.autoformer.counting import complexity_of, params_of
from reproductions.autoformer.subnet import Subnet


def params(model: Subnet) -> int:
    """Parameters of the configuration in force (of a supernet: of the part that is active)."""
    return params_of(model.space, model.config, model.num_classes, model.image_size, model.options)


def macs(model: Subnet, image_size: ImageSize) -> int:
    """The official counter's multiply-adds, rounded down where it has halves."""
    return int(
        complexity_of(model.space, model.config, model.num_classes, image_size, model.options)
    )
