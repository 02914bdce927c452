"""What stands around the attention: patch embedding, position encoder, MLP. All maps are
`(B, H, W, C)`, which a convolution reads as channels-last without a copy."""

from __future__ import annotations

import math

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn


def convolve(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a convolution to a map `(B, H, W, C)`."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Strided convolution and LayerNorm (eps 1e-5): `(B, H, W, C_in) -> (B, H', W', C)`.

    Overlapping patches are padded by half a kernel; kernels of 4 and 2 do not overlap and are not
    padded (official code: `PatchEmbed`).
    """

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        padding = 0 if kernel_size in (4, 2) else kernel_size // 2
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride, padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(convolve(self.proj, x))


class PositionEncoder(nn.Module):
    """Conditional positions: a depthwise 3x3 convolution of the map, added to it (official code:
    `PosCNN`)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim))
        self.folded = False

    def forward(self, x: Tensor) -> Tensor:
        out = convolve(self.proj, x)
        return out if self.folded else out + x

    @torch.no_grad()
    def deploy_(self) -> None:
        """Adding the input is a kernel with one more in its centre."""
        if not self.folded:
            self.proj[0].weight[:, :, 1, 1] += 1
            self.folded = True


class Mlp(nn.Module):
    """Two linear layers with a GELU (exact) between: `(..., C) -> (..., C)`."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def init_weights_(module: nn.Module, std: float = 0.02) -> None:
    """The released initialisation of one layer (official code: `SepViT._init_weights`).

    Args:
        std: of linear layers.
    """
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=std)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
