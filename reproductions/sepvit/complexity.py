"""The paper's complexity formulas, with the terms for blocks that have a single window.

N windows of S tokens on a map of HW = N * S tokens, C channels: DWA and PWA, as third-party notes
print them. They equal a counter's linear layers and matrix products exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from reproductions.sepvit.model import Architecture
from reproductions.sepvit.windows import Windows


@dataclass(frozen=True)
class BlockCost:
    """Multiply-adds of one block on one image, by part."""

    stage: int
    block: int
    windows: int
    depthwise: int
    pointwise: int
    projection: int
    mlp: int

    @property
    def attention(self) -> int:
        return self.depthwise + self.pointwise + self.projection

    @property
    def total(self) -> int:
        return self.attention + self.mlp


def depthwise_macs(count: int, size: int, dim: int, token: bool) -> int:
    """3 HW C^2 + 3 N C^2 + 2 N (S + 1)^2 C; without a token, S in place of S + 1."""
    length = size + token
    return 3 * count * length * dim**2 + 2 * count * length**2 * dim


def pointwise_macs(count: int, size: int, dim: int) -> int:
    """2 N C^2 + N^2 C + N HW C; the HW C^2 of the projection is counted apart."""
    return 2 * count * dim**2 + count**2 * dim + count * (count * size) * dim


def block_costs(architecture: Architecture, image_size: int) -> list[BlockCost]:
    """Every block of a classifier; attention computes padded tokens, so they are counted."""
    costs = []
    maps, counts = architecture.maps(image_size), architecture.window_counts(image_size)
    for stage, (height, width) in enumerate(maps):
        dim = architecture.embed_dims[stage]
        for block, side in enumerate(architecture.sides(stage)):
            count = counts[stage][block]
            windows = Windows.of_side(height, width, side)
            size = windows.size if count > 1 else height * width
            heads = architecture.num_heads[stage]
            between = pointwise_macs(count, size, dim) if count > 1 else 0
            if count > 1 and windows.padded:
                between += heads * count**2 * size  # how much weight each slot's windows have
            costs.append(
                BlockCost(
                    stage, block, count,
                    depthwise_macs(count, size, dim, token=count > 1),
                    between,
                    height * width * dim**2,
                    2 * height * width * dim * int(dim * architecture.mlp_ratio),
                )
            )  # fmt: skip
    return costs


def two_swin_blocks(height: int, width: int, dim: int, side: int = 7) -> int:
    """Two consecutive blocks of window attention: 2 (4 HW C^2 + 2 S HW C + 8 HW C^2)."""
    area = height * width
    return 2 * (12 * area * dim**2 + 2 * side**2 * area * dim)
