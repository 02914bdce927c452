"""The operators (GOP): convolution, transformer and MLP in one form.

Each is built from the same numbers, `(in_dim, out_dim, expansion, stride)`, so that one set of
sizes describes a stage whatever its operator is, and each takes and returns a map `(B, C, H, W)`.
`DWConvBlock` and `AttentionBlock` are the released ones. `ConvBlock` and `MlpBlock` are **our
reading**: the paper searches over an MLP operator, but the released networks use none.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from harness.deployment import fold_after
from reproductions.uninet.layers import (
    NO_SCALE,
    OverwritingGELU,
    Residual,
    Size,
    SqueezeExcite,
    heads_of,
    layer_scale,
    map_of,
    scaled_sum,
    tokens_of,
)


def hidden_width(dim: int, expansion: float, name: str) -> int:
    """`int(dim * expansion)`.

    Raises:
        ValueError: no channel is left.
    """
    hidden = int(dim * expansion)
    if hidden < 1:
        raise ValueError(f"{name}: an expansion of {expansion:g} leaves no channel of {dim}")
    return hidden


def _residual(in_dim: int, out_dim: int, stride: int) -> nn.Module:
    changes = in_dim != out_dim or stride != 1
    return Residual(in_dim, out_dim, stride) if changes else nn.Identity()


class DWConvBlock(nn.Module):
    """The convolution operator: an inverted bottleneck that starts with a norm.

    `x + project(se(gelu(depthwise(gelu(expand(norm(x)))))))`, a BatchNorm after every convolution.
    Without expansion and stride the first half is left out, norm included (official code: `b1` is
    None). With a stride or another width the residual is max pooling and a 1x1 convolution.

    Args:
        in_dim, out_dim: channels before and after; between them are `int(in_dim * expansion)`.
        use_se: whether channels are weighted (`SqueezeExcite`).
        init_values: unless -1, the last norm's weight starts at zero: a block begins as its
            residual.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        expansion: float = 4,
        stride: int = 1,
        *,
        drop_path: float = 0.0,
        init_values: float = 1e-6,
        use_se: bool = True,
        **_: Any,
    ) -> None:
        super().__init__()
        hidden = hidden_width(in_dim, expansion, type(self).__name__)
        self.residual = _residual(in_dim, out_dim, stride)
        self._add_mixing(in_dim, hidden, stride)
        self.act = OverwritingGELU()
        self.se = SqueezeExcite(hidden) if use_se else nn.Identity()
        self.project = nn.Conv2d(hidden, out_dim, 1)
        self.project_norm = nn.BatchNorm2d(out_dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        if init_values != NO_SCALE:
            nn.init.zeros_(self.project_norm.weight)

    def _add_mixing(self, in_dim: int, hidden: int, stride: int) -> None:
        """The layers between the block's input and its wide map."""
        self.expand = None
        if hidden != in_dim or stride != 1:
            self.expand = nn.Sequential(
                nn.BatchNorm2d(in_dim),
                nn.Conv2d(in_dim, hidden, 1, bias=False),
                nn.BatchNorm2d(hidden),
                OverwritingGELU(),
            )
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(hidden)

    def _mix(self, x: Tensor) -> Tensor:
        if self.expand is not None:
            x = self.expand(x)
        return self.depthwise_norm(self.depthwise(x))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.se(self.act(self._mix(x)))
        branch = self.project_norm(self.project(branch))
        return self.residual(x) + self.drop_path(branch)


class ConvBlock(DWConvBlock):
    """A full 3x3 convolution in place of the 1x1 and the depthwise one. Ours, not released."""

    def _add_mixing(self, in_dim: int, hidden: int, stride: int) -> None:
        self.norm = nn.BatchNorm2d(in_dim)
        self.conv = nn.Conv2d(in_dim, hidden, 3, stride, 1, bias=False)
        self.conv_norm = nn.BatchNorm2d(hidden)

    def _mix(self, x: Tensor) -> Tensor:
        return self.conv_norm(self.conv(self.norm(x)))


class Attention(nn.Module):
    """Global self-attention of tokens `(B, N, dim) -> (B, N, out_dim)`; no mask, no bias table."""

    def __init__(self, dim: int, out_dim: int, head_dim: int = 32) -> None:
        super().__init__()
        self.num_heads = heads_of(dim, head_dim, "attention")
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        qkv = self.qkv(x).view(batch, count, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, dim / heads) each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, count, dim))


class TokenMixing(nn.Module):
    """One linear map over the N places, the same for all channels. Ours, not released.

    `(B, N, dim) -> (B, N, out_dim)`; the channels are mixed only where their number changes.
    """

    def __init__(self, dim: int, out_dim: int, count: int) -> None:
        super().__init__()
        self.places = nn.Linear(count, count)
        self.proj = nn.Linear(dim, out_dim) if dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.places(x.transpose(1, 2)).transpose(1, 2)
        return self.proj(mixed)


class TokenBlock(nn.Module):
    """What the transformer and the MLP operator have in common; a subclass brings the mixer.

        x = x + depthwise3x3(x)                     conditional position, in every block
        x = x + gamma_1 * mixer(norm1(x))
        x = x + gamma_2 * mlp(norm2(x))

    Where the width changes or the map is strided, there is no MLP (official code: the `else` branch
    of `AttentionBlock`, which the released networks never take):

        x = conv1x1(maxpool(x)) + gamma_1 * mixer(maxpool(norm1(x)))

    Args:
        in_dim, out_dim: channels before and after; the MLP has `int(in_dim * expansion)` inside.
        grid: height and width of the input, for mixers that are made for one size.
        init_values: of the vectors gamma; -1 for none.
    """

    position_folded = False

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        expansion: float = 4,
        stride: int = 1,
        *,
        head_dim: int = 32,
        drop_path: float = 0.0,
        init_values: float = 1e-6,
        grid: Size | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(in_dim, in_dim, 3, padding=1, groups=in_dim)
        self.norm1 = nn.LayerNorm(in_dim)
        self.mixer = self.make_mixer(in_dim, out_dim, head_dim, grid, stride)
        self.gamma_1 = layer_scale(out_dim, init_values)
        self.keeps_shape = stride == 1 and in_dim == out_dim
        if self.keeps_shape:
            self.norm2 = nn.LayerNorm(in_dim)
            hidden = hidden_width(in_dim, expansion, type(self).__name__)
            self.mlp = Mlp(in_dim, hidden, act_layer=OverwritingGELU)
            self.gamma_2 = layer_scale(out_dim, init_values)
        else:
            self.pool = nn.MaxPool2d(3, stride, padding=1)
            self.residual = Residual(in_dim, out_dim, stride)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def make_mixer(
        self, in_dim: int, out_dim: int, head_dim: int, grid: Size | None, stride: int
    ) -> nn.Module:
        """The module that mixes tokens `(B, N, in_dim) -> (B, N, out_dim)`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x) if self.position_folded else x + self.pos_embed(x)
        if not self.keeps_shape:
            return self._changed(x)
        size, x = x.shape[-2:], tokens_of(x)
        x = self._add(x, self.gamma_1, self.mixer(self.norm1(x)))
        x = self._add(x, self.gamma_2, self.mlp(self.norm2(x)))
        return map_of(x, size)

    def _add(self, x: Tensor, scale: Tensor | None, branch: Tensor) -> Tensor:
        if isinstance(self.drop_path, nn.Identity):
            return scaled_sum(x, scale, branch)
        return x + self.drop_path(branch if scale is None else scale * branch)

    def _changed(self, x: Tensor) -> Tensor:
        residual = self.residual(x)
        normed = map_of(self.norm1(tokens_of(x)), x.shape[-2:])
        branch = self.mixer(tokens_of(self.pool(normed)))
        return map_of(scaled_sum(tokens_of(residual), self.gamma_1, branch), residual.shape[-2:])

    @torch.no_grad()
    def deploy_(self) -> None:
        """Fold the layer scales into the last layers, and the identity into the position term."""
        ends = [(self.mixer.proj, "gamma_1")]
        ends += [(self.mlp.fc2, "gamma_2")] if self.keeps_shape else []
        for layer, name in ends:
            if isinstance(layer, nn.Linear) and getattr(self, name) is not None:
                fold_after(layer, getattr(self, name))
                setattr(self, name, None)
        if not self.position_folded:
            self.pos_embed.weight[:, :, 1, 1] += 1
            self.position_folded = True


class AttentionBlock(TokenBlock):
    """The transformer operator; heads of about `head_dim` channels."""

    def make_mixer(self, in_dim, out_dim, head_dim, grid, stride):
        return Attention(in_dim, out_dim, head_dim)


class MlpBlock(TokenBlock):
    """The MLP operator: the transformer block with `TokenMixing`. Ours, not released.

    It is made for one size of map, `grid`, and takes no other.

    Raises:
        ValueError: without `grid`; or, when it runs, on a map of another size.
    """

    def make_mixer(self, in_dim, out_dim, head_dim, grid, stride):
        if grid is None:
            raise ValueError("an MlpBlock mixes the places of one map: say its grid")
        self.grid = tuple(grid)
        height, width = (ceil(side / stride) for side in self.grid)
        return TokenMixing(in_dim, out_dim, height * width)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.grid:
            raise ValueError(
                "the MLP operator was built for a map of "
                f"{self.grid[0]}x{self.grid[1]}, not {x.shape[-2]}x{x.shape[-1]}; build the model "
                "with the image_size it shall see"
            )
        return super().forward(x)
