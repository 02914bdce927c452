"""Parameters of a module, counted once each however often they are shared."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class ParamsCount:
    """Elements of a module's parameters and buffers.

    Attributes:
        total: all parameters.
        trainable: those with `requires_grad`.
        buffers: statistics, index tables, masks, ...: saved or cached, never trained.
    """

    total: int
    trainable: int
    buffers: int


def count_params(module: nn.Module) -> ParamsCount:
    """Count `module`; a shared parameter counts once. Works on any device, meta included.

    Raises:
        ValueError: a lazy parameter has no shape yet.
    """
    parameters = list(module.parameters())
    if any(is_lazy(one) for one in parameters):
        raise ValueError("a lazy module has no shapes before its first forward pass; run one")
    return ParamsCount(
        total=sum(one.numel() for one in parameters),
        trainable=sum(one.numel() for one in parameters if one.requires_grad),
        buffers=sum(one.numel() for one in module.buffers()),
    )
