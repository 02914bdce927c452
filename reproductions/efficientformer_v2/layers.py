"""Convolution with normalisation, which every part of the network is made of.

Sub-module names follow timm's EfficientFormerV2, so its checkpoints load without renaming.
"""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from harness.deployment import batch_norm_affine, fold_after


class ConvNorm(nn.Module):
    """Convolution (with bias) and BatchNorm: `(B, C_in, H, W) -> (B, C_out, H', W')`.

    The padding keeps the size at stride 1; all normalised convolutions of the network are these.
    """

    def __init__(
        self, in_dim: int, out_dim: int, kernel_size: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_dim, out_dim, kernel_size, stride, padding=kernel_size // 2, groups=groups
        )
        self.bn = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def deploy_(self) -> None:
        """Fold the norm into the convolution."""
        if not isinstance(self.bn, nn.Identity):
            fold_after(self.conv, *batch_norm_affine(self.bn))
            self.bn = nn.Identity()


class GELU(nn.GELU):
    """GELU (exact); in the deployed form in place, which spares the largest maps a copy."""

    inplace = False

    def forward(self, x: Tensor) -> Tensor:
        if self.inplace and not torch.is_grad_enabled():
            return torch.ops.aten.gelu_(x)
        return super().forward(x)

    def deploy_(self) -> None:
        """Every GELU here follows a map that nobody else reads."""
        self.inplace = True


class LayerScale(nn.Module):
    """One learned factor per channel, shaped `(C, 1, 1)`.

    The shape matters in training: rules that spare one-dimensional parameters from weight decay
    do not spare these (official code: `layer_scale_1`, `layer_scale_2`).
    """

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), init))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """`x + gamma * branch` in one pass over memory."""
        return torch.addcmul(x, self.gamma, branch)


@torch.no_grad()
def merged(*convs: nn.Conv2d) -> nn.Conv2d:
    """1x1 convolutions of the same input as one; its output is theirs, concatenated."""
    outputs = sum(conv.out_channels for conv in convs)
    weight = torch.cat([conv.weight for conv in convs])
    one = nn.Conv2d(convs[0].in_channels, outputs, 1, device=weight.device, dtype=weight.dtype)
    one.weight.copy_(weight)
    one.bias.copy_(torch.cat([conv.bias for conv in convs]))
    return one


class Residual(nn.Module):
    """`x + branch`: what is left of a layer scale that was folded into its branch."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch


def folded(scale: nn.Module, last: ConvNorm) -> nn.Module:
    """Move a layer scale into the (already norm-free) last layer of its branch."""
    if isinstance(scale, LayerScale):
        fold_after(last.conv, scale.gamma)
    return Residual()


def init_feed_forward_(module: nn.Module) -> None:
    """Truncated normal of 0.02 and zero bias, as the authors start 1x1 and linear layers."""
    trunc_normal_(module.weight, std=0.02)
    nn.init.zeros_(module.bias)
