"""Counting a module or a function of tensors by both counters."""

from torch import nn

from harness.measurement.macs import count_macs
from harness.measurement.macs_fvcore import count_macs_fvcore


class Calls(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def counted(target, *inputs):
    """(canonical count, fvcore count) of a module or function; the batch is 1."""
    module = target if isinstance(target, nn.Module) else Calls(target)
    return count_macs(module, inputs=inputs), count_macs_fvcore(module, inputs=inputs)


def totals(target, *inputs):
    canonical, fvcore = counted(target, *inputs)
    return canonical.total, fvcore.total
