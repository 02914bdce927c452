"""The joint search space: operator, down-sampling module and sizes of every stage.

A network is a tuple of choices, one number per decision. Operators share one form, so the same
decisions describe a stage whatever its operator is. The space is ours (micro); that of the paper
was not published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from reproductions.uninet.model import Architecture

#: One number per decision: the index of what was chosen.
Genes = tuple[int, ...]


@dataclass(frozen=True)
class Decision:
    """One choice: `name` is a field of `Architecture`, `stage` where it holds."""

    name: str
    stage: int
    options: tuple[Any, ...]


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen, and what is fixed.

    Attributes:
        operators, downsamplers: by name.
        repeats, expansion: options of every stage.
        channels: options of each stage; their number is that of the stages.
        strides, stem_dim, final_head_dim, head_dim: fixed.

    Raises:
        ValueError: stages do not fit together, or an option is no legal choice.
    """

    operators: tuple[str, ...] = ("dw", "attn", "mlp")
    downsamplers: tuple[str, ...] = ("l", "g", "lg")
    repeats: tuple[int, ...] = (1, 2)
    channels: tuple[tuple[int, ...], ...] = ((16, 32), (32, 48), (48, 64, 96))
    expansion: tuple[float, ...] = (1, 2, 4)
    strides: tuple[int, ...] = (1, 2, 2)
    stem_dim: int = 16
    final_head_dim: int = 128
    head_dim: int = 16

    def __post_init__(self) -> None:
        for name in ("operators", "downsamplers", "repeats", "expansion", "strides"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "channels", tuple(map(tuple, self.channels)))
        if len(self.channels) != len(self.strides) or not self.channels:
            raise ValueError("channels and strides need one entry per stage")
        for one in self.decisions:
            if not one.options or len(set(one.options)) < len(one.options):
                raise ValueError(f"{one.name} needs options that differ, not {one.options}")
        for index in range(max(self.choices)):  # every option is legal in a network
            self.architecture(tuple(min(index, count - 1) for count in self.choices))

    @cached_property
    def decisions(self) -> tuple[Decision, ...]:
        """All decisions, stage by stage, in the order in which a controller makes them."""
        found = []
        for stage, channels in enumerate(self.channels):
            if stage:
                found.append(Decision("ds_ops", stage - 1, self.downsamplers))
            found += [
                Decision("block_ops", stage, self.operators),
                Decision("repeats", stage, self.repeats),
                Decision("channels", stage, channels),
                Decision("expansion", stage, self.expansion),
            ]
        return tuple(found)

    @property
    def choices(self) -> tuple[int, ...]:
        """How many options each decision has."""
        return tuple(len(one.options) for one in self.decisions)

    def __len__(self) -> int:
        """Number of networks."""
        return prod(self.choices)

    def architecture(self, genes: Sequence[int]) -> Architecture:
        """The network that choices stand for.

        Raises:
            ValueError: not one choice per decision, or one that does not exist.
        """
        if len(genes) != len(self.decisions):
            raise ValueError(f"a network has {len(self.decisions)} choices, not {len(genes)}")
        fields: dict[str, list] = {}
        for one, choice in zip(self.decisions, genes, strict=True):
            if not 0 <= choice < len(one.options):
                raise ValueError(
                    f"{one.name} of stage {one.stage} has {len(one.options)} options; "
                    f"there is no option {choice}"
                )
            fields.setdefault(one.name, []).append(one.options[choice])
        return Architecture(
            **{"ds_ops": (), **fields}, strides=self.strides, stem_dim=self.stem_dim,
            final_head_dim=self.final_head_dim, head_dim=self.head_dim,
        )  # fmt: skip

    def sample(self, rng: np.random.Generator) -> Genes:
        """A network drawn uniformly."""
        return tuple(int(one) for one in rng.integers(self.choices))


def in_words(architecture: Architecture) -> str:
    """`dw 24x2 e3 -lg-> attn 64x2 e2`: operator, width, repeats, expansion; the module between."""
    arch, parts = architecture, []
    for stage, operator in enumerate(arch.block_ops):
        if stage:
            parts.append(f"-{arch.ds_ops[stage - 1]}->")
        parts.append(
            f"{operator} {arch.channels[stage]}x{arch.repeats[stage]} e{arch.expansion[stage]:.3g}"
        )
    return " ".join(parts)


def variant_for(track: str) -> str:
    """The variant whose recipe and preprocessing hold for networks of the space on a track."""
    return "uninet_b1" if track == "imagenet" else "uninet_micro"
