"""How the paper counts: its repository's own profiler (see `snap_profile` for the rule)."""

from __future__ import annotations

from torch import nn

from harness.measurement.paper_counters import snap_profile


def params(module: nn.Module) -> int:
    """Parameters by the authors' counter: without norms, layer scales and bias tables."""
    return snap_profile(module, module.image_size)[0]


def macs(module: nn.Module, image_size: int | tuple[int, int]) -> int:
    """Multiply-adds per image by the authors' counter."""
    return snap_profile(module, image_size)[1]
