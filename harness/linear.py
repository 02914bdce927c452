"""Linear layers by the faster of the processor's two matrix products.

On a CPU torch multiplies float32 matrices with MKL and convolves with oneDNN. A linear layer is
a 1x1 convolution over tokens, so either can compute it. On AMD's processors with AVX-512 MKL
leaves half of each register unused and oneDNN does not: a network of linear layers is twice as
fast by the other one, forwards and backwards. `harness.build` chooses for every network, timm's
among them, so that a comparison of methods is not one of libraries. Other processors, GPUs, small
products and networks that are compiled, exported, traced or in mixed precision keep torch's way.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.environment import cpu_vendor

#: Fewest multiply-adds, and numbers in the input, for which the convolution pays. Below the latter
#: torch hands a convolution to another library.
LEAST_MACS = 8_000_000
LEAST_INPUT = 20_481

_torchs_own = ContextVar("torchs_own", default=False)


@contextmanager
def matrix_products() -> Iterator[None]:
    """Inside, `linear` is torch's own: for whoever looks at operators and not at time."""
    token = _torchs_own.set(True)
    try:
        yield
    finally:
        _torchs_own.reset(token)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`(*, in_features) -> (*, out_features)`: what `F.linear` computes, up to rounding.

    Args:
        weight: `(out_features, in_features)`.
        bias: `(out_features,)` or None.
    """
    if not pays(x, weight):
        return F.linear(x, weight, bias)
    images = x.shape[0] if x.dim() > 2 else 1
    tokens = x.reshape(images, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # channels last: no copy
    # Dilation means nothing to a 1x1 kernel, but with one thread torch asks for oneDNN only then.
    out = F.conv2d(tokens, weight[:, :, None, None], bias, dilation=2)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes the convolution, i.e. gains by it."""
    return (
        is_plain(x, weight)
        and x.numel() >= LEAST_INPUT
        and x.numel() * weight.shape[0] >= LEAST_MACS
        and not _torchs_own.get()
        and mkl_holds_back()
    )


def is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether this is an eager float32 product on a CPU: not traced, compiled or mixed."""
    return (
        isinstance(x, Tensor)  # torch.fx calls with something else
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def mkl_holds_back() -> bool:
    """Whether MKL computes with AVX2 what oneDNN computes with AVX-512."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and "AMD" in cpu_vendor()
    )


class Linear(nn.Linear):
    """An `nn.Linear` that computes by `linear`: same state dict, same numbers up to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def choose_linears(model: nn.Module) -> nn.Module:
    """Make every plain `nn.Linear` in `model` a `Linear`, in place; subclasses stay as they are.

    Returns:
        `model` itself.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    return model
