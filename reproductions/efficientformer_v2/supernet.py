"""The supernet of the joint search: one set of weights, many networks.

A sub-network takes the leading channels of every shared weight, but each width owns its batch
norms (switchable norms). In stages 3 and 4 every block of the supernet has an attention, so that
depth also decides which blocks are global.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.linear import linear
from harness.training import Objective, cross_entropy
from reproductions.efficientformer_v2.blocks import FFN, AttnFFN
from reproductions.efficientformer_v2.layers import ConvNorm, LayerScale
from reproductions.efficientformer_v2.model import Architecture, EfficientFormerV2

REMOVED = 0.0


@dataclass(frozen=True)
class Subnet:
    """A point of the search space.

    Attributes:
        widths: channels of each stage.
        expansions: for each block of the supernet its expansion, or 0 where it is removed.
        attention: how many of the kept blocks of stages 3 and 4 are global; they are the last.
    """

    widths: tuple[int, ...]
    expansions: tuple[tuple[float, ...], ...]
    attention: tuple[int, int]

    def kept(self, stage: int) -> list[int]:
        """Which blocks of the supernet's `stage` (from 0) are left."""
        return [i for i, ratio in enumerate(self.expansions[stage]) if ratio != REMOVED]

    def global_blocks(self, stage: int) -> frozenset[int]:
        """Which of them have an attention."""
        kept = self.kept(stage)
        return frozenset(kept[len(kept) - self.attention[stage - 2] :] if stage >= 2 else ())

    def with_expansion(self, stage: int, block: int, ratio: float) -> Subnet:
        """This network with another expansion of one block; 0 removes the block."""
        stages = [list(ratios) for ratios in self.expansions]
        stages[stage][block] = ratio
        changed = replace(self, expansions=tuple(map(tuple, stages)))
        attention = tuple(
            min(count, len(changed.kept(index))) for index, count in enumerate(self.attention, 2)
        )
        return replace(changed, attention=attention)


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen: each stage's widths (ascending) and every block's expansions.

    `depths` are the supernet's. The remaining sizes are those of `Architecture`.
    """

    widths: tuple[tuple[int, ...], ...]
    depths: tuple[int, ...]
    expansions: tuple[float, ...] = (2, 3, 4)
    num_heads: int = 8
    key_dim: int = 32
    attn_ratio: float = 4
    stem_stride: int = 4

    def __post_init__(self) -> None:
        for choices in (*self.widths, self.expansions):
            if list(choices) != sorted(set(choices)) or min(choices, default=0) <= 0:
                raise ValueError(f"choices must be positive and ascending, not {choices}")
        if len(self.widths) != 4 or len(self.depths) != 4:
            raise ValueError("a search space has four stages")

    def uniform(self, which: Literal["largest", "smallest"]) -> Subnet:
        """The supernet itself, or the smallest network: one block per stage, none of it global."""
        pick = max if which == "largest" else min
        blocks = [depth if which == "largest" else 1 for depth in self.depths]
        return Subnet(
            tuple(pick(widths) for widths in self.widths),
            tuple(
                (pick(self.expansions),) * kept + (REMOVED,) * (depth - kept)
                for kept, depth in zip(blocks, self.depths, strict=True)
            ),
            (blocks[2], blocks[3]) if which == "largest" else (0, 0),
        )

    def sample(self, rng: random.Random) -> Subnet:
        """A random sub-network: first the number of blocks, then each choice, all uniformly."""
        expansions = []
        for depth in self.depths:
            kept = set(rng.sample(range(depth), rng.randint(1, depth)))
            expansions.append(
                tuple(rng.choice(self.expansions) if i in kept else REMOVED for i in range(depth))
            )
        counts = [sum(ratio != REMOVED for ratio in stage) for stage in expansions]
        attention = (rng.randint(0, counts[2]), rng.randint(0, counts[3]))
        return Subnet(tuple(rng.choice(w) for w in self.widths), tuple(expansions), attention)

    def architecture(self, subnet: Subnet) -> Architecture:
        """The sub-network as the depths, widths, expansions and attentions of a plain model."""
        expansions = tuple(
            tuple(ratio for ratio in stage if ratio != REMOVED) for stage in subnet.expansions
        )
        return Architecture(
            depths=tuple(map(len, expansions)),
            widths=subnet.widths,
            expansions=expansions,
            attention_blocks=subnet.attention,
            num_heads=self.num_heads,
            key_dim=self.key_dim,
            attn_ratio=self.attn_ratio,
            stem_stride=self.stem_stride,
        )


@dataclass(frozen=True)
class Role:
    """What the output channels of a convolution follow, hence which norm belongs to a sub-network.

    `width`: its stage's width; `half`: half of it (the stem); `hidden`: width times the expansion
    of `block`; `fixed`: the heads of an attention, whose input alone is elastic.
    """

    kind: Literal["width", "half", "hidden", "fixed"]
    stage: int
    block: int = 0

    def key(self, subnet: Subnet) -> str:
        """The name of the norm that `subnet` uses here (the c of gamma_c, beta_c, mu_c, ...)."""
        width = subnet.widths[self.stage]
        if self.kind != "hidden":
            return str(width)
        return self._hidden_key(width, subnet.expansions[self.stage][self.block])

    def channels(self, space: SearchSpace, full: int) -> dict[str, int]:
        """Output channels by norm; `full` is what the supernet's own convolution has."""
        widths = space.widths[self.stage]
        if self.kind == "hidden":
            return {
                self._hidden_key(width, ratio): int(width * ratio)
                for width in widths
                for ratio in space.expansions
            }
        count = {"width": lambda w: w, "half": lambda w: w // 2, "fixed": lambda w: full}
        return {str(width): count[self.kind](width) for width in widths}

    @staticmethod
    def _hidden_key(width: int, ratio: float) -> str:
        return f"{width}x{ratio:g}".replace(".", "_")


class ElasticConvNorm(nn.Module):
    """A convolution of which the leading channels are used, and one BatchNorm per width.

    `(B, c_in, H, W) -> (B, c_out, H', W')` with any c_in up to the full one. The norm is
    `gamma_c * (w^c x - mu_c) / sqrt(sigma_c^2 + eps) + beta_c` with everything of the selected c.
    """

    def __init__(self, plain: ConvNorm, role: Role, space: SearchSpace) -> None:
        super().__init__()
        self.conv = plain.conv
        self.depthwise = plain.conv.groups > 1
        self.role = role
        self.channels = role.channels(space, plain.conv.out_channels)
        self.norms = nn.ModuleDict(
            {key: nn.BatchNorm2d(count) for key, count in self.channels.items()}
        )
        self.key = next(reversed(self.channels))

    def select(self, subnet: Subnet) -> None:
        """Use the channels and the norm of `subnet` from now on."""
        self.key = self.role.key(subnet)

    def forward(self, x: Tensor) -> Tensor:
        conv, used = self.conv, x.shape[1]
        if self.depthwise:
            weight, bias, groups = conv.weight[:used], conv.bias[:used], used
        else:
            count = self.channels[self.key]
            weight, bias, groups = conv.weight[:count, :used], conv.bias[:count], 1
        x = F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=groups)
        return self.norms[self.key](x)


class ElasticDepthwise(nn.Conv2d):
    """A depthwise convolution of as many channels as come in."""

    def forward(self, x: Tensor) -> Tensor:
        used = x.shape[1]
        return F.conv2d(
            x, self.weight[:used], self.bias[:used], self.stride, self.padding, groups=used
        )


class ElasticLayerScale(LayerScale):
    """A layer scale of as many channels as come in."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return torch.addcmul(x, self.gamma[: x.shape[1]], branch)


class ElasticLinear(nn.Linear):
    """A linear layer of as many inputs as come in."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight[:, : x.shape[-1]], self.bias)


class Supernet(EfficientFormerV2):
    """All sub-networks of a search space in one module; `select` says which one it is.

    `drop_path_rate` makes it robust to missing blocks (stochastic depth).
    """

    def __init__(
        self, space: SearchSpace, num_classes: int, image_size: int, drop_path_rate: float = 0.1,
        layer_scale_init: float = 1e-5,
    ) -> None:  # fmt: skip
        largest = space.uniform("largest")
        super().__init__(
            space.architecture(largest), num_classes, image_size, distillation=False,
            drop_path_rate=drop_path_rate, layer_scale_init=layer_scale_init,
        )  # fmt: skip
        self.space = space
        self._make_elastic()
        self.select(largest)

    def _make_elastic(self) -> None:
        """Replace every layer whose size depends on a choice by its elastic form."""

        def swap(parent: nn.Module, role: Role, *names: str) -> None:
            for name in names:
                setattr(parent, name, ElasticConvNorm(getattr(parent, name), role, self.space))

        swap(self.stem, Role("half", 0), "conv1")
        swap(self.stem, Role("width", 0), "conv2")
        for index, stage in enumerate(self.stages):
            width, fixed = Role("width", index), Role("fixed", index)
            for number, block in enumerate(stage.blocks):
                swap(block.mlp, Role("hidden", index, number), "fc1", "mid")
                swap(block.mlp, width, "fc2")
                if isinstance(block, AttnFFN):
                    swap(block.token_mixer, fixed, "q", "k", "v", "v_local")
                    swap(block.token_mixer, width, "proj")
                    if block.token_mixer.stride_conv is not None:
                        swap(block.token_mixer, width, "stride_conv")
            if index == 0:
                continue
            swap(stage.downsample, width, "conv")
            attention = stage.downsample.attn
            if attention is not None:
                before = Role("fixed", index - 1)
                swap(attention, before, "k", "v", "v_local")
                swap(attention.q, before, "proj")
                swap(attention, width, "proj")
                attention.q.local = _share(attention.q.local, ElasticDepthwise)
        for parent in list(self.modules()):
            for name, child in parent.named_children():
                if type(child) is LayerScale:
                    scale = ElasticLayerScale(len(child.gamma), 0.0)
                    scale.gamma = child.gamma
                    setattr(parent, name, scale)
        self.norm = nn.ModuleDict(
            {str(width): nn.BatchNorm2d(width) for width in self.space.widths[3]}
        )
        head = ElasticLinear(self.num_features, self.num_classes)
        head.weight, head.bias = self.head.weight, self.head.bias
        self.head = head

    def select(self, subnet: Subnet) -> None:
        """Become `subnet`."""
        self.subnet = subnet
        for module in self.modules():
            if isinstance(module, ElasticConvNorm):
                module.select(subnet)

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, 3, H, W) -> (B, C4, h, w)` of the selected sub-network."""
        x = self.stem(self._checked_input(x))
        for index, stage in enumerate(self.stages):
            x = stage.downsample(x)
            wide = self.subnet.global_blocks(index)
            for number in self.subnet.kept(index):
                block = stage.blocks[number]
                x = block(x) if number in wide else FFN.forward(block, x)
        return self.norm[str(self.subnet.widths[-1])](x)

    def extract(self, subnet: Subnet) -> EfficientFormerV2:
        """A plain model of `subnet` with copies of its weights and norms, in evaluation mode."""
        plain = EfficientFormerV2(
            self.space.architecture(subnet), self.num_classes, self.image_size, distillation=False
        )
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        with torch.no_grad():
            for name, target in plain.state_dict().items():
                source = state[self._source_of(name, subnet)]
                target.copy_(source[tuple(slice(size) for size in target.shape)])
        return plain.eval()

    def _source_of(self, name: str, subnet: Subnet) -> str:
        """Where an entry of the plain model of `subnet` lives in the supernet."""
        parts = name.split(".")
        if parts[0] == "stages" and parts[2] == "blocks":
            parts[3] = str(subnet.kept(int(parts[1]))[int(parts[3])])
        if parts[0] == "norm":
            return ".".join(["norm", str(subnet.widths[-1]), *parts[1:]])
        if parts[-2] == "bn":
            owner = self.get_submodule(".".join(parts[:-2]))
            parts[-2:-1] = ["norms", owner.role.key(subnet)]
        return ".".join(parts)


def _share(layer: nn.Conv2d, kind: type[nn.Conv2d]) -> nn.Conv2d:
    """`layer` as another class of convolution, with the same parameters."""
    new = kind(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
        groups=layer.groups,
    )  # fmt: skip
    new.weight, new.bias = layer.weight, layer.bias
    return new


class SandwichRule(Objective):
    """Each step trains the largest, the smallest and two random sub-networks.

    Their gradients add up for one update. A random network is drawn from Python's generator, which
    the trainer seeds for each step, so that a resumed run draws the same ones.
    """

    find_unused_parameters = True

    def __init__(self, randoms: int = 2) -> None:
        self.randoms = randoms

    def sandwich(self, space: SearchSpace) -> Iterator[tuple[str, Subnet]]:
        """The sub-networks of one step, with the names their losses are logged under."""
        yield "max", space.uniform("largest")
        yield "min", space.uniform("smallest")
        rng = random.Random(random.getrandbits(64))
        for number in range(self.randoms):
            yield f"random{number + 1}", space.sample(rng)

    def step(self, model, images, targets, context) -> dict[str, Tensor]:
        supernet: Supernet = context.model
        losses = {}
        for name, subnet in self.sandwich(supernet.space):
            supernet.select(subnet)
            with context.autocast():
                loss = cross_entropy(model(images), targets, context.recipe.label_smoothing)
            context.backward(loss)
            losses[name] = loss.detach()
        supernet.select(supernet.space.uniform("largest"))
        return {"loss": sum(losses.values()) / len(losses), **losses}
