"""How the authors count (official code: misc/flops_counter.py and `validate` in main.py)."""

from __future__ import annotations

from harness.patches import ImageSize
from reproductions.nasvit.counting import macs_of, released_params
from reproductions.nasvit.subnet import Subnet


def params(model: Subnet) -> int:
    """Parameters that their counter prints for the configuration in force.

    It sees full-width transformer blocks and unused projections, and no tables.
    """
    return released_params(model.space, model.config, model.num_classes)


def macs(model: Subnet, image_size: ImageSize) -> int:
    """Their multiply-adds: always at the configuration's resolution, whatever the image."""
    return macs_of(model.space, model.config, model.num_classes)
