"""A subnet as an ordinary dense network: what the supernet computes once a configuration is set.

Pre-norm transformer on patches with a class token that takes part in attention while the features
are the mean over the patches; every layer has its own number of heads and its own MLP ratio.
The supernet is this same network built from layers that compute with a part of their weights
(`supernet.py`), so there is one forward pass for both, and the names of weights are the official
ones in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from harness.linear import Linear
from harness.patches import ImageSize, patch_grid
from reproductions.autoformer.attention import Grid, RelativePosition, relative_attention
from reproductions.autoformer.space import Config, Space


@dataclass(frozen=True)
class Options:
    """What the released code can switch (official code: `Vision_TransformerSuper`).

    Attributes:
        global_pool: `gp`: features are the mean over patches, not the class token.
        scale: outputs of attention and MLP are scaled up as the layer is narrower than the
            supernet's. No released script forwards it.
        change_qkv: the Q-K-V dimension follows the heads; else it is the supernet's, and the
            heads must divide it.
        drop_rate: dropout of a network as wide as the supernet; narrower ones get less.
        drop_path_rate: of the supernet's last layer; a layer keeps its rate at any depth.
    """

    global_pool: bool = True
    scale: bool = False
    change_qkv: bool = True
    relative_position: bool = True
    absolute_position: bool = True
    pre_norm: bool = True
    qkv_bias: bool = True
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0


@dataclass(frozen=True)
class Layers:
    """Which modules a network is made of: dense ones here, sliced ones in the supernet."""

    linear: Callable[..., nn.Linear] = Linear
    qkv: Callable[..., nn.Linear] = Linear
    norm: Callable[..., nn.LayerNorm] = nn.LayerNorm
    conv: Callable[..., nn.Conv2d] = nn.Conv2d


DENSE = Layers()


class PatchEmbed(nn.Module):
    """`(B, 3, H, W) -> (B, P, E)`, row by row."""

    def __init__(self, space: Space, dim: int, image_size: ImageSize, conv: Callable) -> None:
        super().__init__()
        patch = space.patch_size
        self.grid = patch_grid(image_size, patch, "AutoFormer")
        self.image_size = (self.grid[0] * patch, self.grid[1] * patch)
        self.proj = conv(3, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_tracing() and tuple(x.shape[-2:]) != self.image_size:
            height, width = self.image_size
            raise ValueError(
                f"this model takes images of {height}x{width}, not {x.shape[-2]}x{x.shape[-1]}"
            )
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention whose Q-K-V dimension, heads * head_dim, need not be the embedding's.

    `(B, N, E) -> (B, N, E)`. The released code multiplies both the product with the keys and the
    one with their relative positions by head_dim^-0.5.
    """

    def __init__(self, space: Space, dim: int, heads: int, options: Options, layers: Layers):
        super().__init__()
        self.super_dim, self.options = space.super_dim, options
        self._set_heads(dim, heads, space.head_dim)
        inner = self.num_heads * self.head_dim
        self.qkv = layers.qkv(dim, 3 * inner, bias=options.qkv_bias)
        if options.relative_position:
            width = min(self.head_dim, space.head_dim)
            self.rel_pos_embed_k = RelativePosition(width, space.max_distance)
            self.rel_pos_embed_v = RelativePosition(width, space.max_distance)
        self.proj = layers.linear(inner, dim)

    def _set_heads(self, dim: int, heads: int, head_dim: int) -> None:
        """The sizes of one configuration.

        Raises:
            ValueError: with `change_qkv=False` the heads must divide the supernet's dimension.
        """
        self.num_heads, self.head_dim, self.logit_scale = heads, head_dim, head_dim**-0.5
        if not self.options.change_qkv:
            if self.super_dim % heads or (
                self.options.relative_position and self.super_dim // heads > head_dim
            ):
                raise ValueError(
                    f"without change_qkv the {self.super_dim} Q-K-V channels are split evenly into "
                    f"heads of at most {head_dim}: num_heads cannot be {heads}"
                )
            self.head_dim = self.super_dim // heads
            self.logit_scale = (dim // heads) ** -0.5

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.options.attn_drop_rate if self.training else 0.0
        if self.options.relative_position:
            keys = self.rel_pos_embed_k()[:, : self.head_dim]
            values = self.rel_pos_embed_v()[:, : self.head_dim]
            x = relative_attention(q, k, v, keys, values, grid, self.logit_scale, dropout)
        else:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.logit_scale)
        x = x.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim)
        if self.options.scale:
            x = x * (self.super_dim / x.shape[-1])
        return F.dropout(self.proj(x), self.options.drop_rate, self.training)


class Block(nn.Module):
    """Attention and MLP, each with a residual; one drop path serves both.

    `(B, N, E) -> (B, N, E)` (official code: `TransformerEncoderLayer`).
    """

    def __init__(
        self, space: Space, config: Config, index: int, options: Options, layers: Layers
    ) -> None:
        super().__init__()
        dim, ratio = config.embed_dim, config.mlp_ratios[index]
        self.super_ratio, self.options = space.super_ratio, options
        self.attn = Attention(space, dim, config.num_heads[index], options, layers)
        self.attn_layer_norm = layers.norm(dim)
        self.ffn_layer_norm = layers.norm(dim)
        self.fc1 = layers.linear(dim, config.hidden_dims[index])
        self.fc2 = layers.linear(config.hidden_dims[index], dim)
        self.drop_path = DropPath(drop_path_rates(space, options)[index])
        self._set_rates(dim / space.super_dim, ratio)

    def _set_rates(self, share: float, ratio: float) -> None:
        """Dropout shrinks with the share of the supernet's dimension that is in use."""
        self.dropout = self.options.drop_rate * share
        self.attn_dropout = self.options.attn_drop_rate * share
        self.mlp_scale = self.super_ratio / ratio

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        pre_norm = self.options.pre_norm
        y = self.attn(self.attn_layer_norm(x) if pre_norm else x, grid)
        x = x + self.drop_path(F.dropout(y, self.attn_dropout, self.training))
        if not pre_norm:
            x = self.attn_layer_norm(x)
        y = self.fc1(self.ffn_layer_norm(x) if pre_norm else x)
        y = F.gelu(y.float()).type_as(y)  # in float32 under mixed precision too, as released
        y = self.fc2(F.dropout(y, self.dropout, self.training))
        y = F.dropout(y, self.dropout, self.training)
        if self.options.scale:
            y = y * self.mlp_scale
        x = x + self.drop_path(y)
        return x if pre_norm else self.ffn_layer_norm(x)


def drop_path_rates(space: Space, options: Options) -> list[float]:
    """One rate per layer of the supernet, from 0 up; a shallower subnet ends below the top rate."""
    return torch.linspace(0, options.drop_path_rate, space.super_depth, device="cpu").tolist()


class Subnet(nn.Module):
    """The network of one configuration: `(B, 3, H, W) -> (B, num_classes)`.

    Args:
        space: where the configuration is from; gives head size, patch size, relative distances and
            the sizes that dropout and drop path refer to.
        config: the subnet. It may lie outside the space's choices, not outside its supernet.
        options: fields of `Options`.

    Raises:
        ValueError: the configuration does not fit the supernet, or the image the patches.
    """

    def __init__(
        self,
        space: Space,
        config: Config,
        num_classes: int = 1000,
        image_size: ImageSize = 224,
        layers: Layers = DENSE,
        **options: Any,
    ) -> None:
        super().__init__()
        self.space, self.config = space, space.check_fits(Config.of(config))
        self.options, self.layers = Options(**options), layers
        self.num_classes, self.num_features = num_classes, config.embed_dim
        dim = config.embed_dim
        # The attribute has the official name, as all weights do.
        self.patch_embed_super = PatchEmbed(space, dim, image_size, layers.conv)
        self.grid = Grid(self.patch_embed_super.grid, space.max_distance)
        if self.options.absolute_position:
            tokens = self.grid.size[0] * self.grid.size[1] + 1
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
            trunc_normal_(self.pos_embed, std=0.02)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        trunc_normal_(self.cls_token, std=0.02)
        self.blocks = nn.ModuleList(
            Block(space, config, index, self.options, layers) for index in range(config.depth)
        )
        self.norm = layers.norm(dim) if self.options.pre_norm else nn.Identity()
        self.head = self._make_head()
        self.dropout = self.options.drop_rate * dim / space.super_dim
        self.apply(self._init_weights)

    def _make_head(self) -> nn.Module:
        return self.layers.linear(self.config.embed_dim, self.num_classes)

    def _init_weights(self, module: nn.Module) -> None:
        """Linears: a truncated normal of std 0.02; the patch convolution as torch makes it."""
        if isinstance(module, nn.Linear):
            if self.space.xavier:
                nn.init.xavier_uniform_(module.weight)
            else:
                trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Beside 1-d tensors. The relative tables decay: the released list misspells them."""
        return {"pos_embed", "cls_token"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head; 0 classes leave the pooled features."""
        self.num_classes = num_classes
        like = self.cls_token
        self.head = (
            self._make_head().to(like.device, like.dtype) if num_classes > 0 else nn.Identity()
        )
        self.head.apply(self._init_weights)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.patch_embed_super.image_size

    def active_blocks(self) -> Iterable[Block]:
        """The blocks that run."""
        return self.blocks

    def forward_features(self, x: Tensor, blocks: Iterable[Block] | None = None) -> Tensor:
        """The tokens after the last norm: `(B, 1 + P, E)`.

        Args:
            blocks: others than this network's own.
        """
        x = self.patch_embed_super(x)
        dim = x.shape[-1]
        x = torch.cat((self.cls_token[..., :dim].expand(x.shape[0], -1, -1), x), dim=1)
        if self.options.absolute_position:
            x = x + self.pos_embed[..., :dim]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.active_blocks() if blocks is None else blocks:
            x = block(x, self.grid)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens `(B, 1 + P, E)`, then classify."""
        x = x[:, 1:].mean(dim=1) if self.options.global_pool else x[:, 0]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
