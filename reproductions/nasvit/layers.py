"""Convolutional parts, written once for dense networks and for the supernet.

A part is given the kinds of layers it is made of: `DENSE` ones, or those of `supernet.py`, which
use as much of their weights as a configuration asks for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from harness.linear import Linear
from reproductions.nasvit.space import Block


class Conv2d(nn.Conv2d):
    """A convolution without bias that keeps the side at stride 1."""

    def __init__(self, width_in: int, width_out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(width_in, width_out, kernel, stride, kernel // 2, bias=False)


class Depthwise(nn.Conv2d):
    """The same, channel by channel."""

    def __init__(self, width: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(width, width, kernel, stride, kernel // 2, groups=width, bias=False)


@dataclass(frozen=True)
class Layers:
    """The kinds of layers that parts are made of."""

    conv: type[nn.Conv2d] = Conv2d
    depthwise: type[nn.Conv2d] = Depthwise
    batch_norm: type[nn.BatchNorm2d] = nn.BatchNorm2d
    linear: type[nn.Linear] = Linear


DENSE = Layers()


class ConvNorm(nn.Module):
    """Convolution, batch norm, and unless `act` is False swish."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, act: bool = True) -> None:
        super().__init__()
        self.conv, self.bn = conv, norm
        self.act = nn.SiLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class SqueezeExcite(nn.Module):
    """Scale channels by a hard sigmoid of their pooled values (official code: `SELayer`)."""

    def __init__(self, width: int, reduced: int, layers: Layers) -> None:
        super().__init__()
        self.reduce = layers.linear(width, reduced)
        self.expand = layers.linear(reduced, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`."""
        gate = F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class Shortcut(nn.Module):
    """What is added to an inverted bottleneck: every one has a shortcut, also where it shrinks.

    An odd side is padded, and the padded zeros count in the average, so borders are diluted
    (official code: `DynamicShortcutLayer`).
    """

    def __init__(
        self, width_in: int, width_out: int, stride: int, projects: bool, layers: Layers
    ) -> None:
        super().__init__()
        self.width, self.stride = width_out, stride
        self.conv = layers.conv(width_in, width_out) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)`, rounded up."""
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, padding=int(x.shape[-1]) % 2)
        return x if self.conv is None or x.shape[1] == self.width else self.conv(x)


class MBConv(nn.Module):
    """Inverted bottleneck with a shortcut: `(B, C_in, H, W) -> (B, C_out, H', W')`.

    The norm of the last convolution starts at zero, so that the block starts as its shortcut.

    Args:
        block: its sizes.
        projects: whether the shortcut has a projection.
    """

    def __init__(self, block: Block, projects: bool, layers: Layers = DENSE) -> None:
        super().__init__()
        hidden, width_out = block.hidden, block.width_out
        self.expand = None
        if block.expands:
            self.expand = ConvNorm(layers.conv(block.width_in, hidden), layers.batch_norm(hidden))
        self.depthwise = ConvNorm(
            layers.depthwise(hidden, block.kernel, block.stride), layers.batch_norm(hidden)
        )
        self.se = SqueezeExcite(hidden, block.reduced, layers) if block.reduced else None
        self.project = ConvNorm(
            layers.conv(hidden, width_out), layers.batch_norm(width_out), act=False
        )
        nn.init.zeros_(self.project.bn.weight)
        self.shortcut = Shortcut(block.width_in, width_out, block.stride, projects, layers)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        y = y if self.se is None else self.se(y)
        return self.project(y) + self.shortcut(x)
