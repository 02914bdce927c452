"""The other parts of a Reformer: feed-forward in chunks, axial positions, loss in chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from harness.linear import Linear

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class FeedForward(nn.Module):
    """Norm, widen, activate, narrow: position by position, hence in chunks if wanted (Sec. 3).

    Args:
        dim, hidden: widths.
        chunk_size: so many positions at a time; 0 for all. It changes no number.
        drop_rate: dropout before the activation and behind the last layer.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str = "gelu",
        chunk_size: int = 0,
        drop_rate: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"no activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        if chunk_size < 0:
            raise ValueError(f"chunk_size is a number of positions, or 0; not {chunk_size}")
        self.chunk_size, self.activation = chunk_size, ACTIVATIONS[activation]
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, L, C)`; L need not divide."""
        if not self.chunk_size or x.shape[1] <= self.chunk_size:
            return self._section(x)
        return torch.cat([self._section(one) for one in x.split(self.chunk_size, 1)], 1)

    def _section(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.activation(self.drop(self.fc1(self.norm(x))))))


class PreNormAttention(nn.Module):
    """Norm, attention, dropout: F of a reversible block.

    Args:
        attention: `(x, valid, buckets) -> (out, buckets)`.
    """

    def __init__(
        self, dim: int, attention: nn.Module, drop: nn.Module | None = None, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.attention = attention
        self.drop = drop or nn.Identity()

    def forward(
        self, x: Tensor, valid: Tensor | None = None, buckets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As the attention inside."""
        out, buckets = self.attention(self.norm(x), valid, buckets)
        return self.drop(out), buckets


class AxialPositions(nn.Module):
    """A long table of positions as the combination of short ones.

    Position p of a grid (n1, n2) is the row p // n2 of one table beside the row p % n2 of another:
    n1 d1 + n2 d2 numbers instead of n1 n2 (d1 + d2). Any number of axes, the last runs fastest.

    Args:
        shape: of the grid.
        dims: widths, one per axis; together the width of the tokens.

    Raises:
        ValueError: not one width per axis, or an empty axis.
    """

    def __init__(self, shape: Sequence[int], dims: Sequence[int]) -> None:
        super().__init__()
        self.shape, self.dims = tuple(shape), tuple(dims)
        if len(self.shape) != len(self.dims) or not self.shape:
            raise ValueError(f"one width per axis: {len(self.shape)} axes, {len(self.dims)} widths")
        if min(*self.shape, *self.dims) < 1:
            raise ValueError(f"axes {self.shape} and widths {self.dims} must be positive")
        self.weights = nn.ParameterList(
            torch.randn(*(n if i == axis else 1 for i, n in enumerate(self.shape)), dim)
            for axis, dim in enumerate(self.dims)
        )

    @property
    def dim(self) -> int:
        """Width of a position."""
        return sum(self.dims)

    @property
    def length(self) -> int:
        """Positions of the grid."""
        return math.prod(self.shape)

    def forward(self, length: int | None = None) -> Tensor:
        """The first positions `(1, length, dim)`; default all.

        Raises:
            ValueError: more than the grid has.
        """
        length = self.length if length is None else length
        if length > self.length:
            raise ValueError(
                f"a sequence of {length} is longer than the axial grid "
                f"{'x'.join(map(str, self.shape))} = {self.length}"
            )
        slow = -(-length // math.prod(self.shape[1:]))  # rows of the first axis that are reached
        grid = (slow, *self.shape[1:])
        parts = [self.weights[0][:slow], *self.weights[1:]]
        table = torch.cat([one.expand(*grid, -1) for one in parts], -1)
        return table.flatten(0, -2)[None, :length]


def sinusoids(length: int, dim: int, base: float = 10000.0) -> Tensor:
    """Fixed positions `(length, dim)`: sines in even places, cosines in odd ones."""
    if dim % 2:
        raise ValueError(f"sinusoidal positions need an even width, not {dim}")
    angles = torch.arange(length)[:, None] * base ** -(torch.arange(0, dim, 2) / dim)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def chunked_cross_entropy(
    hidden: Tensor,
    decoder: nn.Module,
    targets: Tensor,
    chunk_size: int = 0,
    ignore_index: int = -100,
) -> Tensor:
    """Mean cross-entropy without ever holding all logits (Sec. 3, last paragraph).

    Each section's logits are computed, used and dropped, in the backward pass once more.

    Args:
        hidden: `(B, L, C)`.
        decoder: `(…, C) -> (…, vocabulary)`.
        targets: `(B, L)`.
        chunk_size: positions at a time; 0 for all at once.

    Raises:
        ValueError: a chunk size below 0.
    """
    if chunk_size < 0:
        raise ValueError(f"chunk_size is a number of positions, or 0; not {chunk_size}")

    def of_section(one: Tensor, wanted: Tensor) -> Tensor:
        logits = decoder(one).flatten(0, -2)
        return F.cross_entropy(logits, wanted.flatten(), ignore_index=ignore_index, reduction="sum")

    size = chunk_size or hidden.shape[1]
    pairs = zip(hidden.split(size, 1), targets.split(size, 1), strict=True)
    total = sum(
        checkpoint(of_section, one, wanted, use_reentrant=False) if chunk_size else
        of_section(one, wanted)
        for one, wanted in pairs
    )  # fmt: skip
    return total / (targets != ignore_index).sum()
