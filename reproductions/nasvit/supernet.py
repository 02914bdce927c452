"""The supernet: one set of weights, of which every configuration uses the leading parts.

Layers store how much of their output is asked for and cut their weights where they are used, so
that setting a configuration costs nothing and gradients reach exactly what was used. Batch norms
share their running statistics between all widths. These are right for no network: extract one and
calibrate it (`calibration.py`) before it is judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.linear import linear
from harness.meta import on_meta
from harness.patches import ImageSize
from reproductions.nasvit.attention import (
    MLP,
    SCALE_COLUMNS,
    VALUE_RATIO,
    joint_norm,
    mix_values,
    relative_bias,
    split_heads,
    talk,
    to_map,
    to_tokens,
)
from reproductions.nasvit.layers import Conv2d, Depthwise, Layers, MBConv
from reproductions.nasvit.space import HEAD_DIM, Block, Config, Space
from reproductions.nasvit.subnet import Subnet


class SlicedConv2d(Conv2d):
    """Convolution with `width` filters on the channels that come in."""

    width: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight[: self.width, : x.shape[1]], None)


class SlicedDepthwise(Depthwise):
    """Depthwise convolution of the channels that come in; a smaller kernel is the middle."""

    kernel: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        width, full = x.shape[1], self.kernel_size[0]
        kernel = self.kernel or full
        cut = slice((full - kernel) // 2, (full + kernel) // 2)
        weight = self.weight[:width, :, cut, cut]
        return F.conv2d(x, weight, None, self.stride, kernel // 2, groups=width)


class SlicedLinear(nn.Linear):
    """Linear layer with `width` outputs on the channels that come in."""

    width: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[: self.width]
        return linear(x, self.weight[: self.width, : x.shape[-1]], bias)


class SlicedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of the channels that come in; in training it moves their running statistics.

    The released one refuses evaluation. Here it uses the running statistics as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        momentum = self.momentum
        if momentum is None:  # calibration: a cumulative average
            if self.training:
                self.num_batches_tracked.add_(1)
            momentum = 1 / max(1, int(self.num_batches_tracked))
        mean, variance, weight, bias = (
            one[: x.shape[1]]
            for one in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return F.batch_norm(x, mean, variance, weight, bias, self.training, momentum, self.eps)


SLICED = Layers(SlicedConv2d, SlicedDepthwise, SlicedBatchNorm2d, SlicedLinear)


class SlicedAttention(nn.Module):
    """Attention as wide as its input: `(B, C, H, W) -> (B, N, C)`."""

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        heads, inner = dim // HEAD_DIM, VALUE_RATIO * dim
        self.q, self.k = SlicedLinear(dim, dim), SlicedLinear(dim, dim)
        self.v = SlicedLinear(dim, inner)
        self.vconv = SlicedDepthwise(inner)
        self.before, self.after = nn.Linear(heads, heads), nn.Linear(heads, heads)
        self.proj = SlicedLinear(inner, dim)
        self.table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def set_width(self, width: int) -> None:
        self.q.width = self.k.width = self.proj.width = width
        self.v.width = VALUE_RATIO * width

    def forward(self, x: Tensor) -> Tensor:
        side, heads = x.shape[-1], x.shape[1] // HEAD_DIM
        tokens = to_tokens(x)
        query, key = split_heads(self.q(tokens)), split_heads(self.k(tokens))
        values = self.vconv(to_map(self.v(tokens), side))
        attention = query * HEAD_DIM**-0.5 @ key.transpose(-2, -1)
        attention = attention + relative_bias(self.table[:, :heads], side)
        attention = self._talk(attention, self.before, heads).softmax(-1)
        attention = self._talk(attention, self.after, heads)
        return self.proj(F.silu(mix_values(attention, values)))

    @staticmethod
    def _talk(attention: Tensor, mix: nn.Linear, heads: int) -> Tensor:
        return talk(attention, mix.weight[:heads, :heads], mix.bias[:heads, None])


class SlicedBlock(nn.Module):
    """Transformer block as wide as its input, with switched layer scales.

    A row of a scale table is chosen by the number of active blocks of the stage and the number of
    tokens modulo 8, and is multiplied by 8 / C. The authors call the second index a width, but it
    is computed from the tokens, so it follows the resolution.

    Attributes:
        depth: active blocks of the stage.
        switched: whether rows are chosen; without, all networks share one row.
    """

    def __init__(self, dim: int, space: Space, switched: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(1, dim) for _ in range(3))
        self.attn = SlicedAttention(dim, space.window)
        self.mlp1, self.mlp2 = MLP(dim, SlicedLinear), MLP(dim, SlicedLinear)
        shape = (space.scale_rows, SCALE_COLUMNS, dim)
        self.rescale_attn = nn.Parameter(torch.full(shape, space.scale_init))
        self.rescale_mlp = nn.Parameter(torch.full(shape, space.scale_init))
        self.depth, self.switched = 0, switched

    def set_size(self, width: int, depth: int) -> None:
        self.depth = depth
        self.attn.set_width(width)
        for mlp in (self.mlp1, self.mlp2):
            mlp.linear1.width = mlp.linear2.width = width

    def forward(self, x: Tensor) -> Tensor:
        width, side = x.shape[1], x.shape[-1]
        row = scale_row(self.depth, side**2, self.switched)
        attn, mlp = (
            table[row][:width] * (SCALE_COLUMNS / width)
            for table in (self.rescale_attn, self.rescale_mlp)
        )
        tokens = torch.addcmul(to_tokens(x), self.attn(self._normed(x, self.norm1)), attn)
        for norm, part in ((self.norm3, self.mlp2), (self.norm2, self.mlp1)):
            branch = part(to_tokens(self._normed(to_map(tokens, side), norm)))
            tokens = torch.addcmul(tokens, branch, mlp)
        return to_map(tokens, side)

    @staticmethod
    def _normed(x: Tensor, norm: nn.GroupNorm) -> Tensor:
        width = x.shape[1]
        return joint_norm(x, norm.weight[:width], norm.bias[:width], norm.eps)


def scale_row(depth: int, tokens: int, switched: bool = True) -> tuple[int, int]:
    """The row of a layer-scale table that a network uses."""
    return (depth, tokens % SCALE_COLUMNS) if switched else (0, 0)


class Supernet(Subnet):
    """All networks of a space in one: set a configuration, then call it like any network.

    Args:
        switched: whether layer scales are switched by the configuration.
        config: the configuration in force; default the largest.
    """

    layers = SLICED

    def __init__(
        self,
        space: Space,
        num_classes: int = 1000,
        image_size: ImageSize = 224,
        switched: bool = True,
        config: Config | Mapping[str, Any] | None = None,
    ) -> None:
        self.switched = switched
        super().__init__(space, space.largest(), num_classes, image_size)
        self.set_config(space.largest() if config is None else config)

    def _block(self, block: Block) -> nn.Module:
        space = self.space
        if block.transformer:
            return SlicedBlock(block.width_out, space, self.switched)
        made = MBConv(block, space.leftovers or space.projects(block), self.layers)
        if space.leftovers:
            made.rescale = nn.Parameter(torch.ones(block.width_out), requires_grad=False)
        return made

    def set_config(self, config: Config | Mapping[str, Any]) -> Supernet:
        """Become a network of the space; returns the supernet. Nothing is copied.

        Raises:
            ValueError: the configuration is outside the space; the gene and its choices are named.
        """
        self.config = config = self.space.check(config)
        self.first_conv.conv.width = config.width[0]
        for block in self.space.blocks(config):
            module = self.stages[block.stage][block.index]
            if block.transformer:
                module.set_size(block.width_out, block.depth)
                continue
            if module.expand is not None:
                module.expand.conv.width = block.hidden
            module.depthwise.conv.kernel = block.kernel
            if module.se is not None:
                module.se.reduce.width, module.se.expand.width = block.reduced, block.hidden
            module.project.conv.width = module.shortcut.width = block.width_out
            if module.shortcut.conv is not None:
                module.shortcut.conv.width = block.width_out
        self.final_expand.conv.width = self.space.head_ratio * config.width[-2]
        self.feature_mix.width = self.num_features = config.width[-1]
        return self

    def active(self, stage: int) -> nn.ModuleList:
        """The first blocks of a stage, as many as the configuration says."""
        return self.stages[stage][: self.config.depth[stage]]

    def _classifier(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return SlicedLinear(self.space.largest().width[-1], self.num_classes)

    def extract(self, config: Config | Mapping[str, Any] | None = None) -> Subnet:
        """A network as a dense model with weights of its own, and equal outputs.

        Args:
            config: by default the one in force.

        Raises:
            ValueError: it is outside the space.
        """
        config = self.config if config is None else self.space.check(config)
        with on_meta():  # no weights are drawn only to be replaced
            subnet = Subnet(self.space, config, self.num_classes, self.image_size)
        state = slice_state(self.state_dict(), self.space, config, self.switched)
        subnet.load_state_dict(state, assign=True)
        return subnet.train(self.training)

    def no_weight_decay(self) -> set[str]:
        """The layer-scale tables, as the released model says."""
        return {name for name, _ in self.named_parameters() if ".rescale_" in name}


def slice_state(
    state: Mapping[str, Tensor], space: Space, config: Config, switched: bool = True
) -> dict[str, Tensor]:
    """A network's part of a supernet's state dict, as copies under the network's own names.

    Raises:
        KeyError: an entry is missing.
    """
    with on_meta():
        shapes = Subnet(space, config, classes_of(state)).state_dict()
    blocks = {block.name: block for block in space.blocks(config)}
    made = {}
    for name, target in shapes.items():
        if name.endswith(".num_batches_tracked") and name not in state:
            continue  # a count, which no evaluation reads
        part, inner = _split(name)
        block = blocks.get(part)
        if block is not None and block.transformer:
            value = _of_transformer(state, part, inner, block, switched)
        else:
            value = state[name]
            if target.ndim == 4 and value.shape[1:] != target.shape[1:] and target.shape[1] == 1:
                edge = (value.shape[-1] - target.shape[-1]) // 2  # a kernel's middle
                value = value[..., edge : value.shape[-1] - edge, edge : value.shape[-1] - edge]
        made[name] = value[tuple(map(slice, target.shape))].detach().clone()
    return made


def classes_of(state: Mapping[str, Tensor]) -> int:
    """Number of classes of a state dict; 0 without a classifier."""
    return len(state["classifier.weight"]) if "classifier.weight" in state else 0


def _split(name: str) -> tuple[str, str]:
    """`stages.3.1.attn.qk.weight` -> (`stages.3.1`, `attn.qk.weight`)."""
    parts = name.split(".")
    return ".".join(parts[:3]), ".".join(parts[3:])


def _of_transformer(
    state: Mapping[str, Tensor], part: str, inner: str, block: Block, switched: bool
) -> Tensor:
    """An entry of a dense transformer block, before it is cut to its width."""
    width = block.width_out
    if inner.startswith("scale_"):
        table = state[f"{part}.re{inner}"]
        return table[scale_row(block.depth, block.tokens, switched)] * (SCALE_COLUMNS / width)
    if inner.startswith("attn.qk."):
        rest = inner.removeprefix("attn.qk.")
        both = (state[f"{part}.attn.{one}.{rest}"] for one in "qk")
        return torch.cat([one[(slice(width),) * one.ndim] for one in both])
    return state[f"{part}.{inner}"]
