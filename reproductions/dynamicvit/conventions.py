"""How the authors count: fvcore's total, as their `calc_flops.py` prints it."""

from __future__ import annotations

from torch import nn

from harness.measurement.macs_fvcore import count_macs_fvcore


def macs(module: nn.Module, image_size: int | tuple[int, int]) -> int:
    """Multiply-adds per image by fvcore: layer norms count 5 per element, batch norms 2, and a
    global pooling 1, beside convolutions, linear layers and matrix products."""
    return count_macs_fvcore(module, image_size).total
