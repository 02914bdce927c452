"""The pooling transformer (PiT) space of TF-TAS, and its networks.

Three stages of plain transformer blocks; between them a strided depthwise convolution halves the
map and widens it. Searched are the depth and the heads of each stage, one width per head and one
MLP ratio for the whole network.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from harness.patches import ImageSize

STAGES = 3


@dataclass(frozen=True)
class PitConfig:
    """One network of the space.

    Attributes:
        depth: blocks of each stage.
        num_heads: heads of each stage.
        base_dim: channels per head, one for all stages; a stage is `base_dim * heads` wide.
        mlp_ratio: hidden over outer channels of every MLP.
    """

    depth: tuple[int, ...]
    num_heads: tuple[int, ...]
    base_dim: int
    mlp_ratio: int

    def __post_init__(self) -> None:
        """Raises `ValueError` where no such network can be built."""
        for name in ("depth", "num_heads"):
            values = tuple(getattr(self, name))
            if len(values) != STAGES or min(values) < 1:
                raise ValueError(f"{name} must be {STAGES} positive numbers, not {list(values)}")
            object.__setattr__(self, name, values)
        if self.base_dim < 1 or not self.mlp_ratio > 0:
            raise ValueError(
                f"base_dim and mlp_ratio must be positive, not {self.base_dim} and {self.mlp_ratio}"
            )
        for before, after in pairwise(self.num_heads):
            if after % before:  # the pooling convolution works on each channel by itself
                raise ValueError(
                    f"the heads of a stage must be a multiple of the stage before, not {after} "
                    f"after {before}"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the three stages."""
        return tuple(self.base_dim * heads for heads in self.num_heads)


def as_config(given: PitConfig | dict[str, Any]) -> PitConfig:
    """A `PitConfig` from one, or from its fields in a mapping.

    Raises:
        ValueError: a field is missing or unknown, or no such network can be built.
    """
    if isinstance(given, PitConfig):
        return given
    try:
        return PitConfig(**given)
    except TypeError as error:
        fields = ", ".join(PitConfig.__dataclass_fields__)
        raise ValueError(f"a PiT configuration is a mapping with {fields}") from error


@dataclass(frozen=True)
class PitSpace:
    """The choices of a PiT space (official code: `experiments/subnet_pit`)."""

    name: str
    base_dim: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: tuple[int, ...] = (2, 4, 6, 8)
    depth: tuple[tuple[int, ...], ...] = ((1, 2, 3), (4, 6, 8), (2, 4, 6))

    def check(self, config: PitConfig) -> PitConfig:
        """Return `config` if it is in the space.

        Raises:
            ValueError: naming the first value that is not, and the allowed ones.
        """
        chosen = [("base_dim", config.base_dim, self.base_dim)]
        chosen += [("mlp_ratio", config.mlp_ratio, self.mlp_ratio)]
        for stage in range(STAGES):
            chosen += [
                (f"num_heads of stage {stage + 1}", config.num_heads[stage], self.num_heads),
                (f"depth of stage {stage + 1}", config.depth[stage], self.depth[stage]),
            ]
        for name, value, allowed in chosen:
            if value not in allowed:
                raise ValueError(
                    f"{name} {value} is not in the space {self.name}; it is one of "
                    f"{', '.join(map(str, allowed))}"
                )
        return config

    def sample(self, rng: random.Random) -> PitConfig:
        """A random member; heads that cannot follow each other are drawn again.

        The search of this space was not released, so the order of the draws is ours.
        """
        while True:
            heads = tuple(rng.choice(self.num_heads) for _ in range(STAGES))
            if all(b % a == 0 for a, b in pairwise(heads)):
                break
        return PitConfig(
            tuple(rng.choice(depths) for depths in self.depth), heads,
            rng.choice(self.base_dim), rng.choice(self.mlp_ratio),
        )  # fmt: skip

    def smallest(self) -> PitConfig:
        return self._uniform(min)

    def largest(self) -> PitConfig:
        return self._uniform(max)

    def _uniform(self, pick: Callable[[Iterable[int]], int]) -> PitConfig:
        return PitConfig(
            tuple(pick(depths) for depths in self.depth), (pick(self.num_heads),) * STAGES,
            pick(self.base_dim), pick(self.mlp_ratio),
        )  # fmt: skip

    def params_of(self, config: PitConfig, num_classes: int = 1000, image_size: int = 224) -> int:
        """Parameters of a member's network, by formula."""
        grid, widths = (image_size - 16) // 8 + 1, config.widths
        total = widths[0] * (3 * 16**2 + 1 + grid**2 + 1)  # embedding, positions, class token
        for width, depth in zip(widths, config.depth, strict=True):
            hidden = int(width * config.mlp_ratio)
            total += depth * (4 * width**2 + 2 * width * hidden + 9 * width + hidden)
        for before, after in pairwise(widths):
            total += after * (before + 3 * 3 + 2)
        return total + widths[-1] * (num_classes + 2) + num_classes


PIT_SPACES = {
    "t": PitSpace("PiT-T", base_dim=(16, 24, 32, 40), num_heads=(2, 4, 8)),
    "xs": PitSpace("PiT-XS", base_dim=(40, 48, 56, 64), num_heads=(2, 4, 8)),
    "s": PitSpace("PiT-S", base_dim=(36, 48, 60, 72), num_heads=(3, 6, 12)),
}
#: What the search found, as released.
PIT_FOUND = {
    "t": PitConfig(depth=(2, 4, 4), num_heads=(2, 4, 8), base_dim=40, mlp_ratio=2),
    "xs": PitConfig(depth=(1, 4, 2), num_heads=(2, 8, 8), base_dim=56, mlp_ratio=2),
    "s": PitConfig(depth=(1, 4, 4), num_heads=(3, 12, 12), base_dim=36, mlp_ratio=6),
}


def tf_tas_pit(
    num_classes: int,
    image_size: ImageSize,
    size: str = "t",
    config: PitConfig | dict[str, Any] | None = None,
    patch_size: int = 16,
    stride: int = 8,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> PoolingTransformer:
    """A network of a PiT space: `(B, 3, H, W) -> (B, num_classes)`.

    Args:
        size: whose found network is built: `t`, `xs` or `s`.
        config: another network instead, inside the choices or not.
        drop_rate: dropout after the position map.
        drop_path_rate: stochastic depth; it grows linearly over the blocks. The release leaves
            it at 0.

    Raises:
        ValueError: an unknown size, a configuration that cannot be built, a too small image.
    """
    if size not in PIT_FOUND:
        raise ValueError(f"no PiT space {size!r}; there are {', '.join(PIT_FOUND)}")
    chosen = PIT_FOUND[size] if config is None else as_config(config)
    return PoolingTransformer(
        chosen, num_classes, image_size, patch_size, stride, drop_rate, drop_path_rate
    )


class PoolingTransformer(nn.Module):
    """Class token and a map of tokens through three stages; the class token decides.

    Source: official code `model/pit_space.py`. Parameter names are the authors'.

    Args:
        config: depth, heads, width per head and MLP ratio.
        image_size: in pixels; the position map is made for it.
        patch_size, stride: of the embedding; patches overlap where the stride is smaller.
    """

    def __init__(
        self,
        config: PitConfig,
        num_classes: int = 1000,
        image_size: ImageSize = 224,
        patch_size: int = 16,
        stride: int = 8,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if min(sides) < patch_size:
            raise ValueError(
                f"image_size must be at least the patch's {patch_size} pixels, not {image_size}"
            )
        grid = tuple((side - patch_size) // stride + 1 for side in sides)
        widths = config.widths
        self.config, self.num_classes, self.num_features = config, num_classes, widths[-1]
        self.image_size = sides
        self.pos_embed = nn.Parameter(torch.zeros(1, widths[0], *grid))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, widths[0]))
        self.patch_embed = ConvEmbedding(widths[0], patch_size, stride)
        self.pos_drop = nn.Dropout(drop_rate)
        # official code: block i of n has the rate r * i / n, so the last one stays below r
        total = sum(config.depth)
        rates = iter([drop_path_rate * index / total for index in range(total)])
        self.transformers = nn.ModuleList(
            Stage(width, heads, [next(rates) for _ in range(depth)], config.mlp_ratio)
            for width, heads, depth in zip(widths, config.num_heads, config.depth, strict=True)
        )
        self.pools = nn.ModuleList(Pooling(before, after) for before, after in pairwise(widths))
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_weights)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> normed class token (B, C)."""
        if tuple(images.shape[-2:]) != self.image_size:
            raise ValueError(
                f"this model was built for {self.image_size[0]}x{self.image_size[1]} pixels, not "
                f"{images.shape[-2]}x{images.shape[-1]}"
            )
        maps = self.pos_drop(self.patch_embed(images) + self.pos_embed)
        token = self.cls_token.expand(len(maps), -1, -1)
        for index, stage in enumerate(self.transformers):
            maps, token = stage(maps, token)
            if index < len(self.pools):
                maps, token = self.pools[index](maps, token)
        return self.norm(token)[:, 0]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, C) -> logits (B, num_classes)."""
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str = "") -> None:
        """A new, untrained head; none for 0 classes."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}


class ConvEmbedding(nn.Module):
    """Patches without padding: (B, 3, H, W) -> (B, C, h, w), 27 x 27 at 224 pixels."""

    def __init__(self, width: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, patch_size, stride)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


class Stage(nn.Module):
    """Pre-norm blocks over [class token, map].

    Args:
        drop_path: stochastic depth of each block; its length is the depth.
    """

    def __init__(
        self, width: int, heads: int, drop_path: Sequence[float], mlp_ratio: float
    ) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(
                Block(width, heads, mlp_ratio, qkv_bias=True, drop_path=rate, norm_layer=norm)
                for rate in drop_path
            )
        )

    def forward(self, maps: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, C, h, w) and token (B, 1, C), and the same again."""
        tokens = torch.cat([token, maps.flatten(2).transpose(1, 2)], dim=1)
        tokens = self.blocks(tokens)
        rest = tokens[:, 1:].transpose(1, 2).unflatten(2, maps.shape[2:])
        return rest, tokens[:, :1]


class Pooling(nn.Module):
    """Half the side, more channels; each channel gives `after / before` new ones by itself."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, stride=2, padding=1, groups=before)
        self.fc = nn.Linear(before, after)

    def forward(self, maps: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B, C, h, w) and token (B, 1, C) -> (B, C', h/2, w/2) and (B, 1, C')."""
        return self.conv(maps), self.fc(token)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight)  # as released: a wide start, unusual for convolutions
