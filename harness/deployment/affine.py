"""Scales and shifts that move into a neighbouring layer: computed in float64, rounded once."""

from __future__ import annotations

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm_affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as `x * scale + shift`: two float64 vectors `(C,)`."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        weight = norm.weight.double()
        scale, shift = scale * weight, shift * weight + norm.bias.double()
    return scale, shift


@torch.no_grad()
def fold_after(layer: nn.Module, scale: Tensor, shift: Tensor | float = 0.0) -> None:
    """Turn `layer(x) * scale + shift` into `layer(x)`, in place.

    Args:
        layer: a linear layer or a convolution (not transposed) with `C` output channels.
        scale, shift: per output channel, `(C,)`; a layer scale is a `scale` without a `shift`.
    """
    scale = scale.double().flatten()
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.dim() - 1))
    _store(layer, weight, _bias(layer) * scale + shift)


@torch.no_grad()
def fold_before(layer: nn.Module, scale: Tensor, shift: Tensor | float = 0.0) -> None:
    """Turn `layer(x * scale + shift)` into `layer(x)`, in place.

    Args:
        layer: one that `takes_affine`, with `C` input channels.
        scale, shift: per input channel, `(C,)`.

    Raises:
        ValueError: `layer` cannot take a shift.
    """
    if not takes_affine(layer):
        raise ValueError("only linear layers and unpadded convolutions of one group take a shift")
    weight, tail = layer.weight.double(), [1] * (layer.weight.dim() - 2)
    shift = torch.as_tensor(shift, dtype=torch.float64, device=weight.device).flatten()
    moved = (weight * shift.view(1, -1, *tail)).flatten(1).sum(1)
    scale = scale.double().flatten()
    _store(layer, weight * scale.view(1, -1, *tail), _bias(layer) + moved)


def takes_affine(layer: nn.Module) -> bool:
    """Whether a shift of the input is a shift of the output: false with zeros at the border."""
    if isinstance(layer, nn.Linear):
        return True
    unpadded = layer.padding in ("valid", (0,) * len(layer.kernel_size))
    return unpadded and layer.groups == 1 and not isinstance(layer, Conv2dSame)


def _bias(layer: nn.Module) -> Tensor:
    if layer.bias is not None:
        return layer.bias.double()
    return layer.weight.new_zeros(layer.weight.shape[0], dtype=torch.float64)


def _store(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    dtype = layer.weight.dtype
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
