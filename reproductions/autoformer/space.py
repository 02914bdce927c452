"""The search spaces: what a configuration says, and which ones there are.

A configuration gives a subnet its depth, one embedding dimension for all layers, and for each layer
the number of heads and the MLP ratio. A space gives the choices of each gene and the supernet that
is wide enough for all of them. The two are kept apart: the published AutoFormer-T has ratios that
its own space does not offer, and still is a slice of the supernet.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: A candidate of the search: (depth, ratio of each layer ..., heads of each layer ..., dimension).
Genes = tuple[float, ...]


@dataclass(frozen=True)
class Config:
    """One subnet. Raises ValueError where the lists do not have one entry per layer."""

    depth: int
    embed_dim: int
    mlp_ratios: tuple[float, ...]
    num_heads: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "depth", int(self.depth))
        object.__setattr__(self, "embed_dim", int(self.embed_dim))
        object.__setattr__(self, "mlp_ratios", tuple(float(one) for one in self.mlp_ratios))
        object.__setattr__(self, "num_heads", tuple(int(one) for one in self.num_heads))
        for name in ("mlp_ratios", "num_heads"):
            if len(getattr(self, name)) != self.depth:
                raise ValueError(
                    f"a configuration of depth {self.depth} needs {self.depth} {name}, "
                    f"not {len(getattr(self, name))}"
                )

    @property
    def hidden_dims(self) -> tuple[int, ...]:
        """The MLPs' hidden sizes: int(E * ratio), rounded down."""
        return tuple(int(self.embed_dim * ratio) for ratio in self.mlp_ratios)

    @property
    def genes(self) -> Genes:
        """The candidate tuple of the official search."""
        return (self.depth, *self.mlp_ratios, *self.num_heads, self.embed_dim)

    @classmethod
    def from_genes(cls, genes: Sequence[float]) -> Config:
        """The configuration of a candidate tuple.

        Raises:
            ValueError: the tuple's length does not fit its depth.
        """
        depth = int(genes[0]) if genes else 0
        if len(genes) != 2 * depth + 2:
            raise ValueError(f"a candidate of depth {depth} has {2 * depth + 2} genes, "
                             f"not {len(genes)}")  # fmt: skip
        return cls(depth, int(genes[-1]), tuple(genes[1 : depth + 1]),
                   tuple(genes[depth + 1 : -1]))  # fmt: skip

    @classmethod
    def of(cls, given: Config | Mapping[str, Any]) -> Config:
        """A configuration from a mapping: `depth`, `embed_dim`, `mlp_ratios` (or the official
        `mlp_ratio`) and `num_heads`; a single number stands for all layers.

        Raises:
            ValueError: a key is missing or unknown.
        """
        if isinstance(given, Config):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(f"a configuration is a Config or a mapping, not {given!r}")
        named = {"mlp_ratios" if key == "mlp_ratio" else key: value for key, value in given.items()}
        keys = {"depth", "embed_dim", "mlp_ratios", "num_heads"}
        if set(named) != keys:
            raise ValueError(
                f"a configuration has the keys depth, embed_dim, mlp_ratios and num_heads, "
                f"not {', '.join(map(str, given))}"
            )
        depth = int(named["depth"])
        for key in ("mlp_ratios", "num_heads"):
            if isinstance(named[key], (int, float)):
                named[key] = (named[key],) * depth
        return cls(**named)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON and YAML."""
        return {
            "depth": self.depth,
            "embed_dim": self.embed_dim,
            "mlp_ratios": list(self.mlp_ratios),
            "num_heads": list(self.num_heads),
        }

    def __str__(self) -> str:
        ratios = " ".join(f"{one:g}" for one in self.mlp_ratios)
        heads = " ".join(str(one) for one in self.num_heads)
        return f"depth {self.depth}, dim {self.embed_dim}, heads {heads}, ratios {ratios}"


@dataclass(frozen=True)
class Space:
    """A search space and its supernet.

    Attributes:
        embed_dims, depths, num_heads, mlp_ratios: the choices, in the order they are drawn from.
        super_dim, super_depth, super_heads, super_ratio: the supernet's own size.
        head_dim: of every head; the supernet's Q-K-V dimension is `super_heads * head_dim`.
        max_distance: rows and columns further apart than this share a relative position.
        xavier: start linears from Xavier weights; a std of 0.02 is for wide networks.
    """

    name: str
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[float, ...]
    super_dim: int
    super_depth: int
    super_heads: int
    super_ratio: float
    patch_size: int = 16
    max_distance: int = 14
    xavier: bool = False

    @property
    def head_dim(self) -> int:
        return self.super_dim // self.super_heads

    @property
    def candidates(self) -> int:
        """How many different configurations there are."""
        per_layer = len(self.num_heads) * len(self.mlp_ratios)
        return len(self.embed_dims) * sum(per_layer**depth for depth in self.depths)

    def full(self) -> Config:
        """The supernet itself."""
        return self._uniform(self.super_depth, self.super_dim, self.super_ratio, self.super_heads)

    def smallest(self) -> Config:
        return self._uniform(
            min(self.depths), min(self.embed_dims), min(self.mlp_ratios), min(self.num_heads)
        )

    def largest(self) -> Config:
        """The largest candidate, which can be smaller than the supernet."""
        return self._uniform(
            max(self.depths), max(self.embed_dims), max(self.mlp_ratios), max(self.num_heads)
        )

    @staticmethod
    def _uniform(depth: int, dim: int, ratio: float, heads: int) -> Config:
        return Config(depth, dim, (ratio,) * depth, (heads,) * depth)

    def sample(self, rng: random.Random | Any = random) -> Config:
        """A uniform draw, gene by gene, in the released order (official code: `sample_configs`):
        depth, then the ratios, then the heads, then the dimension.

        Args:
            rng: anything with `choice`; by default Python's global generator, as released.
        """
        depth = rng.choice(self.depths)
        ratios = tuple(rng.choice(self.mlp_ratios) for _ in range(depth))
        heads = tuple(rng.choice(self.num_heads) for _ in range(depth))
        return Config(depth, rng.choice(self.embed_dims), ratios, heads)

    def check(self, config: Config) -> Config:
        """Give the configuration back if all its genes are choices of this space.

        Raises:
            ValueError: one is not; the allowed values are named.
        """
        genes = (
            ("depth", (config.depth,), self.depths),
            ("embed_dim", (config.embed_dim,), self.embed_dims),
            ("mlp_ratio", config.mlp_ratios, self.mlp_ratios),
            ("num_heads", config.num_heads, self.num_heads),
        )
        for name, values, allowed in genes:
            for value in values:
                if value not in allowed:
                    choices = ", ".join(f"{one:g}" for one in allowed)
                    raise ValueError(
                        f"{name} {value:g} is outside {self.name}; it can be {choices}"
                    )
        return config

    def contains(self, config: Config) -> bool:
        """Whether all genes are choices of this space."""
        try:
            self.check(config)
        except ValueError:
            return False
        return True

    def check_fits(self, config: Config) -> Config:
        """Give the configuration back if the supernet is wide and deep enough for it.

        Raises:
            ValueError: it is not; the supernet's limit is named.
        """
        limits = (
            ("depth", (config.depth,), 1, self.super_depth),
            ("embed_dim", (config.embed_dim,), 1, self.super_dim),
            ("num_heads", config.num_heads, 1, self.super_heads),
        )
        for name, values, low, high in limits:
            for value in values:
                if not low <= value <= high:
                    raise ValueError(
                        f"{name} {value} does not fit the supernet of {self.name}; "
                        f"it can be {low} to {high}"
                    )
        widest = math.floor(self.super_dim * self.super_ratio)
        for ratio, hidden in zip(config.mlp_ratios, config.hidden_dims, strict=True):
            if not 1 <= hidden <= widest:
                raise ValueError(
                    f"mlp_ratio {ratio:g} does not fit the supernet of {self.name}; with embed_dim "
                    f"{config.embed_dim} it can be at most {widest / config.embed_dim:g}"
                )
        return config


#: The released spaces (official code: `experiments/supernet/*.yaml`).
AUTOFORMER_T = Space("AutoFormer-T", (192, 216, 240), (12, 13, 14), (3, 4), (3.5, 4.0),
                     super_dim=256, super_depth=14, super_heads=4, super_ratio=4.0)  # fmt: skip
AUTOFORMER_S = Space("AutoFormer-S", (320, 384, 448), (12, 13, 14), (5, 6, 7), (3.0, 3.5, 4.0),
                     super_dim=448, super_depth=14, super_heads=7, super_ratio=4.0)  # fmt: skip
AUTOFORMER_B = Space("AutoFormer-B", (528, 576, 624), (14, 15, 16), (9, 10), (3.0, 3.5, 4.0),
                     super_dim=640, super_depth=16, super_heads=10, super_ratio=4.0)  # fmt: skip
#: Base as the released subnet's file has it, with one more choice of heads.
AUTOFORMER_B8 = Space("AutoFormer-B8", (528, 576, 624), (14, 15, 16), (8, 9, 10), (3.0, 3.5, 4.0),
                      super_dim=640, super_depth=16, super_heads=10, super_ratio=4.0)  # fmt: skip
#: Ours, around `vit_micro` (dimension 64, depth 6, 4 heads, ratio 3): 32x32 images, 8x8 patches.
MICRO = Space("AutoFormer-micro", (48, 56, 64), (5, 6, 7), (2, 3, 4), (2.0, 2.5, 3.0),
              super_dim=64, super_depth=7, super_heads=4, super_ratio=3.0,
              patch_size=4, max_distance=7, xavier=True)  # fmt: skip

SPACES = {
    "t": AUTOFORMER_T, "s": AUTOFORMER_S, "b": AUTOFORMER_B, "b8": AUTOFORMER_B8, "micro": MICRO,
}  # fmt: skip

#: The published subnets (official code: `experiments/subnet/*.yaml`).
PUBLISHED = {
    "t": Config(13, 192, (3.5, 3.5, 3, 3.5, 3, 3, 4, 4, 3.5, 4, 3.5, 4, 3.5),
                (3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3)),
    "s": Config(13, 384, (3, 3.5, 3, 3.5, 4, 4, 4, 4, 4, 4, 4, 3.5, 4),
                (6, 6, 5, 7, 5, 5, 5, 6, 6, 7, 7, 6, 7)),
    "b": Config(14, 576, (3.5, 3.5, 4, 3.5, 4, 3.5, 3.5, 3, 4, 4, 3, 4, 3, 3.5),
                (9, 9, 9, 9, 9, 10, 9, 9, 10, 9, 10, 9, 9, 10)),
}  # fmt: skip


def get_space(space: Space | str) -> Space:
    """The space itself, or the one of that name: t, s, b, b8, micro.

    Raises:
        ValueError: there is no such space.
    """
    if isinstance(space, Space):
        return space
    if space not in SPACES:
        raise ValueError(f"no search space {space!r}; there are {', '.join(SPACES)}")
    return SPACES[space]
