"""What operators and down-sampling modules share.

Everything is a map `(B, C, H, W)` laid out channels-last. In this layout its tokens `(B, N, C)`,
row by row, are the same memory, so attention and convolution take turns without a copy, and maps
need not be square.
"""

from __future__ import annotations

import torch
from timm.layers import make_divisible
from torch import Tensor, nn
from torch.nn import functional as F

from harness.deployment.packed import PackedLinear

Size = tuple[int, int]

#: `init_values` that switches layer scales, and the zero start of convolution blocks, off.
NO_SCALE = -1


def tokens_of(x: Tensor) -> Tensor:
    """`(B, C, H, W) -> (B, H * W, C)`, row by row; a view of a channels-last map."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def map_of(tokens: Tensor, size: Size) -> Tensor:
    """`(B, H * W, C) -> (B, C, H, W)`, a channels-last view."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def heads_of(dim: int, head_dim: int, name: str) -> int:
    """How many heads of about `head_dim` channels fit into `dim`: `dim // head_dim`.

    Raises:
        ValueError: none, or `dim` does not divide by their number.
    """
    if head_dim < 1 or dim < head_dim:
        raise ValueError(f"{name}: {dim} channels are too few for a head of {head_dim}")
    if dim % (dim // head_dim):
        raise ValueError(f"{name}: {dim} channels do not divide into {dim // head_dim} heads")
    return dim // head_dim


class OverwritingGELU(nn.GELU):
    """Exact GELU that overwrites its input where no gradient is asked for.

    Only behind a layer whose output nobody else reads: it spares the widest maps a copy.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


class SqueezeExcite(nn.Module):
    """A factor for each channel, from its mean over the map (official code: `SqueezeExcitation`).

    `x * hard_sigmoid(fc2(relu(fc1(mean(x)))))`, a quarter of the channels between. The layers are
    the authors' 1x1 convolutions of one pixel, written as what they are: linear.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = make_divisible(dim // 4, 8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.fc2(F.relu(self.fc1(self.pool(x).flatten(1))))
        return x * F.hardsigmoid(scale)[:, :, None, None]


class Residual(nn.Module):
    """What goes round a strided module: max pooling 3x3 where there is a choice, then 1x1.

    `(B, C_in, H, W) -> (B, C_out, ceil(H / s), ceil(W / s))`. The down-sampling modules leave the
    pooling out at stride 1, the blocks do not.
    """

    def __init__(self, in_dim: int, out_dim: int, stride: int, pool: bool = True) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(3, stride, padding=1) if pool else nn.Identity()
        self.conv = nn.Conv2d(in_dim, out_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class SeparableConv(nn.Sequential):
    """Depthwise 3x3, BatchNorm and 1x1, all with bias and nothing between: no activation.

    The local half of the down-sampling modules (official code: `downsample` and `q`).
    """

    def __init__(self, in_dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_dim, in_dim, 3, stride, padding=1, groups=in_dim)
        self.norm = nn.BatchNorm2d(in_dim)
        self.pointwise = nn.Conv2d(in_dim, out_dim, 1)


class MapLinear(nn.Module):
    """A 1x1 convolution as the linear layer that it is on a channels-last map, weights packed."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        layer = nn.Linear(conv.in_channels, conv.out_channels, conv.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias
        self.linear = PackedLinear.of(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def pack_pointwise(model: nn.Module) -> None:
    """Replace the 1x1 convolutions below `model`, where torch can pack weights."""
    if not torch.backends.mkldnn.is_available():
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            whole = type(child) is nn.Conv2d and child.groups == 1
            if whole and child.kernel_size == child.stride == (1, 1):
                setattr(parent, name, MapLinear(child))


def scaled_sum(x: Tensor, scale: Tensor | None, branch: Tensor) -> Tensor:
    """`x + scale * branch`, `scale` per channel of tokens; in one pass over memory."""
    return x + branch if scale is None else torch.addcmul(x, scale, branch)


def layer_scale(dim: int, init_values: float) -> nn.Parameter | None:
    """A vector `(dim,)` of `init_values`, or None where these are switched off."""
    if init_values == NO_SCALE:
        return None
    return nn.Parameter(torch.full((dim,), float(init_values)))
