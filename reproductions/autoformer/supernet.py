"""The supernet: one set of weights, of which every configuration uses a part (weight entanglement).

All candidates of a layer share the same tensors: a smaller choice is the leading part of a larger
one (Sec. 3.2). A layer here stores only how much of its output is asked for, an integer; the
weights are cut where they are used, so a subnet is never stale, and gradients reach exactly the
slices.

One cut is not a leading part. The rows of the Q-K-V weight interleave q, k and v (row 3 i + j is
channel i of part j), so that a head keeps its rows whatever the number of heads; yet the Q-K-V
*bias* is cut contiguously. The second looks like an oversight, but all released weights were
trained with it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from harness.linear import linear
from harness.meta import on_meta
from harness.patches import ImageSize
from reproductions.autoformer.counting import complexity_of, params_of
from reproductions.autoformer.space import Config, Space
from reproductions.autoformer.subnet import Layers, Subnet


class SlicedLinear(nn.Linear):
    """Linear with the leading part of its weights: as wide as its input and `width`."""

    width: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        width = self.width or self.out_features
        bias = None if self.bias is None else self.bias[:width]
        return linear(x, self.weight[:width, : x.shape[-1]], bias)


def qkv_rows(weight: Tensor, inner: int, dim: int) -> Tensor:
    """Rows of q, k and v for a Q-K-V dimension: `(3 * S, E_sup) -> (3 * inner, dim)`."""
    interleaved = weight.unflatten(0, (-1, 3))[:inner, :, :dim]
    return interleaved.transpose(0, 1).reshape(3 * inner, dim)


class SlicedQKV(SlicedLinear):
    """Q-K-V projection with interleaved rows and contiguous bias (official code: `qkv_super`)."""

    def forward(self, x: Tensor) -> Tensor:
        width = self.width or self.out_features
        weight = qkv_rows(self.weight, width // 3, x.shape[-1])
        return linear(x, weight, None if self.bias is None else self.bias[:width])


class SlicedLayerNorm(nn.LayerNorm):
    """Layer norm over the channels that there are."""

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        return F.layer_norm(x, (dim,), self.weight[:dim], self.bias[:dim], self.eps)


class SlicedConv2d(nn.Conv2d):
    """Convolution with the leading `width` filters."""

    width: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        width = self.width or self.out_channels
        return self._conv_forward(x, self.weight[:width], self.bias[:width])


SLICED = Layers(linear=SlicedLinear, qkv=SlicedQKV, norm=SlicedLayerNorm, conv=SlicedConv2d)


class Supernet(Subnet):
    """All subnets of a space in one: set a configuration, then call it like any network.

    The configuration in force is `config`; at first it is the supernet itself.

    Args:
        space: choices and sizes.
        options: fields of `Options`, as for `Subnet`.
    """

    def __init__(
        self,
        space: Space,
        num_classes: int = 1000,
        image_size: ImageSize = 224,
        **options: Any,
    ) -> None:
        plain_qkv = not options.get("change_qkv", True)
        layers = Layers(SlicedLinear, SlicedLinear, SlicedLayerNorm, SlicedConv2d)
        super().__init__(
            space, space.full(), num_classes, image_size, layers if plain_qkv else SLICED, **options
        )

    def set_config(self, config: Config | Mapping[str, Any]) -> Supernet:
        """Activate a subnet; returns the supernet. It costs microseconds: nothing is copied.

        Raises:
            ValueError: the supernet is not wide or deep enough for it (the limit is named).
        """
        config = self.space.check_fits(Config.of(config))
        dim, share = config.embed_dim, config.embed_dim / self.space.super_dim
        for index in range(config.depth):
            block = self.blocks[index]
            block.attn._set_heads(dim, config.num_heads[index], self.space.head_dim)
            block.attn.qkv.width = 3 * block.attn.num_heads * block.attn.head_dim
            block.attn.proj.width = block.fc2.width = dim
            block.fc1.width = config.hidden_dims[index]
            block._set_rates(share, config.mlp_ratios[index])
        self.patch_embed_super.proj.width = dim
        self.dropout = self.options.drop_rate * share
        self.config, self.num_features = config, dim
        return self

    def _make_head(self) -> nn.Module:
        return self.layers.linear(self.space.super_dim, self.num_classes)

    def active_blocks(self) -> nn.ModuleList:
        """The first blocks; the rest are skipped (not a spread-out choice)."""
        return self.blocks[: self.config.depth]

    def extract(self, config: Config | Mapping[str, Any] | None = None) -> Subnet:
        """A subnet as a dense network of its own, with copied weights and equal outputs.

        Args:
            config: by default the one in force.

        Raises:
            ValueError: it does not fit the supernet.
        """
        config = self.config if config is None else Config.of(config)
        with on_meta():  # no weights are drawn only to be replaced
            subnet = Subnet(self.space, config, self.num_classes or 1, self.image_size,
                            **vars(self.options))  # fmt: skip
        if not self.num_classes:
            subnet.reset_classifier(0)
        like = self.cls_token
        subnet = subnet.to_empty(device=like.device).to(like.dtype)
        subnet.grid = copy.deepcopy(self.grid)
        subnet.load_state_dict(slice_state(self.state_dict(), self.space, config,
                                           self.options.change_qkv))  # fmt: skip
        return subnet.train(self.training)

    def params_of(self, config: Config | Mapping[str, Any]) -> int:
        """Parameters of a subnet, by formula; exactly those of `extract(config)`."""
        return params_of(self.space, self.space.check_fits(Config.of(config)), self.num_classes,
                         self.image_size, self.options)  # fmt: skip

    def complexity_of(self, config: Config | Mapping[str, Any]) -> float:
        """The official counter's result (official code: `get_complexity`)."""
        return complexity_of(self.space, self.space.check_fits(Config.of(config)), self.num_classes,
                             self.image_size, self.options)  # fmt: skip


def slice_state(
    state: Mapping[str, Tensor], space: Space, config: Config, change_qkv: bool = True
) -> dict[str, Tensor]:
    """A subnet's part of a supernet's state dict, under the same names, as copies.

    Args:
        state: the supernet's, ours or the authors' (the names are the same).

    Raises:
        KeyError: an entry is not a supernet's.
    """
    dim, kept = config.embed_dim, {}
    for name, value in state.items():
        layer, _, rest = name.removeprefix("blocks.").partition(".")
        if not name.startswith("blocks."):
            kept[name] = _slice_outside(name, value, dim)
        elif int(layer) < config.depth:
            index = int(layer)
            inner = config.num_heads[index] * space.head_dim if change_qkv else space.super_dim
            heads, hidden = config.num_heads[index], config.hidden_dims[index]
            kept[name] = _slice_inside(rest, value, dim, inner, heads, hidden, change_qkv)
    return {name: value.detach().clone() for name, value in kept.items()}


def _slice_outside(name: str, value: Tensor, dim: int) -> Tensor:
    if name in ("pos_embed", "cls_token", "head.weight"):
        return value[..., :dim]
    if name == "head.bias":
        return value
    if name in ("patch_embed_super.proj.weight", "patch_embed_super.proj.bias") or (
        name in ("norm.weight", "norm.bias")
    ):
        return value[:dim]
    raise KeyError(f"{name} is no weight of AutoFormer's supernet")


def _slice_inside(
    name: str, value: Tensor, dim: int, inner: int, heads: int, hidden: int, change_qkv: bool
) -> Tensor:
    if name == "attn.qkv.weight":
        return qkv_rows(value, inner, dim) if change_qkv else value[:, :dim]
    if name == "attn.qkv.bias":
        return value[: 3 * inner]
    if name.startswith("attn.rel_pos_embed_"):
        return value[:, : inner // heads]
    cuts = {
        "attn.proj.weight": (dim, inner), "attn.proj.bias": (dim,),
        "attn_layer_norm.weight": (dim,), "attn_layer_norm.bias": (dim,),
        "ffn_layer_norm.weight": (dim,), "ffn_layer_norm.bias": (dim,),
        "fc1.weight": (hidden, dim), "fc1.bias": (hidden,),
        "fc2.weight": (dim, hidden), "fc2.bias": (dim,),
    }  # fmt: skip
    if name not in cuts:
        raise KeyError(f"{name} is no weight of an AutoFormer block")
    return value[tuple(slice(length) for length in cuts[name])]
