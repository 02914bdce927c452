"""How the paper counts: the rule of the official repository's `ProfileConv` (toolbox.py).

The published columns are this counter's figures, both heads and its quirks included.
"""

from __future__ import annotations

from torch import nn

from harness.measurement.paper_counters import snap_profile


def params(module: nn.Module) -> int:
    """Parameters as published: no batch norms, layer scales or bias tables."""
    return snap_profile(module, module.image_size)[0]


def macs(module: nn.Module, image_size: int | tuple[int, int]) -> int:
    """Multiply-adds per image as published: with pooling, layer norms and most of the GELUs."""
    return snap_profile(module, image_size)[1]
