"""How the paper counts: fvcore's total on one image, norms and poolings included."""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor, nn

from harness.measurement.macs import count_macs

#: fvcore's count per element of a layer's input, in evaluation mode.
_PER_ELEMENT = {nn.BatchNorm2d: 2, nn.LayerNorm: 5, nn.AdaptiveAvgPool2d: 1}


def macs(module: nn.Module, image_size: int | tuple[int, int]) -> int:
    """Multiply-adds per image as the authors print them (official code: `cal_flops.py`).

    Convolutions, linear layers and attention products, plus what fvcore adds for BatchNorm,
    LayerNorm and average pooling: about 2 % here. The same number as that of
    `harness.measurement.macs_fvcore`, without tracing, so it also works without weights.
    """
    extra = 0

    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal extra
        extra += _PER_ELEMENT[type(layer)] * inputs[0][0].numel()

    with ExitStack() as stack:
        for layer in module.modules():
            if type(layer) in _PER_ELEMENT:
                stack.callback(layer.register_forward_pre_hook(add).remove)
        total = count_macs(module, image_size).total
    return total + extra
