"""Linear layers whose weights lie in memory as the processor's matrix product reads them.

An ordinary `nn.Linear` in float32 rearranges its weights in every call, which for a handful of
images costs as much as a fifth of the product. oneDNN can keep them rearranged; torch's compiler
uses the same operator for frozen models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from harness.linear import Linear, is_plain, linear

#: Fewest weights for which packing pays: below it the operator's own cost outweighs the gain
#: (a width of 64 gets slower, one of 128 and more gets faster).
LEAST_WEIGHTS = 16_384


class PackedLinear(nn.Linear):
    """`(*, in_features) -> (*, out_features)`: a linear layer for inference on a CPU.

    It keeps its `weight`, so state dict, devices and dtypes are those of the layer it replaces. The
    packed copy, as large again, is made at the first call that can use it: float32 on a CPU,
    without gradients or mixed precision, not traced and not compiled; any other call is
    `nn.Linear`'s.
    """

    @classmethod
    def of(cls, layer: nn.Linear) -> PackedLinear:
        """A packed layer that shares `layer`'s parameters."""
        packed = cls.__new__(cls)
        nn.Module.__init__(packed)
        packed.in_features, packed.out_features = layer.in_features, layer.out_features
        packed.weight, packed.bias = layer.weight, layer.bias
        return packed

    _packed: tuple[tuple, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self._fits(x):
            return linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._weights(), self.bias, "none", [], "none")

    def _fits(self, x: Tensor) -> bool:
        return (
            is_plain(x, self.weight)
            and x.numel() > 0
            and not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))
        )

    def _weights(self) -> Tensor:
        # Tensors made in inference mode count no versions.
        version = None if self.weight.is_inference() else self.weight._version
        stamp = (self.weight.data_ptr(), version)
        if self._packed is None or self._packed[0] != stamp:
            weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
            self._packed = stamp, weight
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the packed weights out: they are made again."""
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


def pack_linears(model: nn.Module) -> list[str]:
    """Replace the larger linear layers below `model`; returns their names.

    Subclasses with a forward of their own stay as they are, as do layers that are watched by hooks
    or hold their weight in an unusual way (parametrized, or something other than float32).
    """
    if not torch.backends.mkldnn.is_available():
        return []
    names = {module: name for name, module in model.named_modules()}
    replaced: dict[nn.Module, PackedLinear] = {}
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if _can_pack(child):
                replaced.setdefault(child, PackedLinear.of(child))
                setattr(parent, child_name, replaced[child])
    return [names[layer] for layer in replaced]


def _can_pack(layer: nn.Module) -> bool:
    return (
        type(layer) in (nn.Linear, Linear)
        and layer.weight.dtype == torch.float32
        and layer.weight.numel() >= LEAST_WEIGHTS
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _flops(x: tuple, weight: tuple, *_: Any, out_shape: tuple, **__: Any) -> int:
    """Two per multiply-add, as torch counts `addmm`."""
    rows = 1
    for side in x[:-1]:
        rows *= side
    return 2 * rows * x[-1] * out_shape[-1]
