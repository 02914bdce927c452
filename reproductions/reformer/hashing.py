"""Angular LSH: which vectors share a bucket, and the order in which buckets lie side by side.

Sec. 2 of the paper, "Locality sensitive hashing". A random rotation R gives `argmax([xR; -xR])`:
vectors that point the same way fall into the same bucket, more likely the smaller the angle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reproductions.reformer.pieces import pieces

#: One number of buckets, or factors whose product it is: each factor is hashed on its own.
NumBuckets = int | Sequence[int]
Sharing = Literal["example_head", "head", "all"]

#: Elements of the projections that are made at a time: what a cache holds.
PROJECTED_ELEMENTS = 1 << 20


def factors_of(num_buckets: NumBuckets) -> tuple[int, ...]:
    """The factors of a number of buckets, checked.

    Raises:
        ValueError: a factor is odd or below 2: each half of a rotation gives a bucket and its
            opposite one.
    """
    factors = tuple(num_buckets) if isinstance(num_buckets, Sequence) else (num_buckets,)
    if not factors or any(type(one) is not int or one < 2 or one % 2 for one in factors):
        raise ValueError(f"every factor of num_buckets must be even and positive, not {factors}")
    return factors


def buckets_paper(length: int, chunk: int) -> int:
    """`2 L / m`: a bucket holds half a chunk on average, so that most fit into one or two."""
    return 2 * max(1, length // chunk)


def buckets_trax(length: int, chunk: int) -> NumBuckets:
    """As the paper, in two factors above 128 (official code, 2020 on: `LSHSelfAttention`)."""
    total = buckets_paper(length, chunk)
    if total <= 128:
        return total
    first = 2 ** math.ceil(math.log2(math.sqrt(total)))
    return first, 2 * (total // (2 * first))


def buckets_hugging_face(length: int, chunk: int, max_positions: int = 4096) -> NumBuckets:
    """The power of two up to `2 L / m`, in two factors above a limit (transformers' port)."""
    power = max(1, (2 * (length // chunk)).bit_length() - 1)
    limit = 2 * max(int((max_positions // chunk) ** 0.5), chunk)
    return 2**power if 2**power <= limit else (2 ** (power // 2), 2 ** (power - power // 2))


def buckets_lucidrains(length: int, chunk: int) -> int:
    """`L / m`, so that a bucket holds a whole chunk on average.

    Raises:
        ValueError: not an even number of chunks.
    """
    return factors_of(length // chunk)[0]


def factorised(num_buckets: int) -> NumBuckets:
    """The most equal pair of even factors (official code, 2019: `factorize_hash`).

    The first is the largest even one up to the square root; where that is 2, or there is none,
    the number stays whole. 48 gives (6, 8).
    """
    first = 2 * (math.isqrt(num_buckets) // 2)
    while first > 2:
        if num_buckets % first == 0 and num_buckets // first % 2 == 0:
            return first, num_buckets // first
        first -= 2
    return num_buckets


def rotation_columns(num_buckets: NumBuckets) -> int:
    """Columns of a rotation: half the sum of the factors."""
    return sum(factors_of(num_buckets)) // 2


def draw_rotations(
    dim: int,
    rounds: int,
    num_buckets: NumBuckets,
    *,
    batch: int = 1,
    heads: int = 1,
    sharing: Sharing = "head",
    seed: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal rotations `(B or 1, H or 1, dim, rounds, columns)`, not orthogonalised.

    Args:
        sharing: who shares one: nobody ("example_head", the authors), the examples of a batch
            ("head", transformers' port), or everybody ("all", lucidrains' default).
        seed: of a generator of its own, so that drawing leaves torch's random state alone;
            None draws from that state.

    Raises:
        ValueError: unknown sharing, or an odd number of buckets.
    """
    shapes = {"example_head": (batch, heads), "head": (1, heads), "all": (1, 1)}
    if sharing not in shapes:
        raise ValueError(f"no sharing {sharing!r}; known: {', '.join(shapes)}")
    shape = (*shapes[sharing], dim, rounds, rotation_columns(num_buckets))
    if seed is None:
        return torch.randn(shape, device=device)
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(device)


@torch.no_grad()
def hash_vectors(
    vectors: Tensor, rotations: Tensor, num_buckets: NumBuckets, valid: Tensor | None = None
) -> Tensor:
    """Bucket ids `(B, H, rounds, L)`, int32, each round from 0 on.

    Args:
        vectors: `(B, H, L, dim)`; only their direction counts.
        rotations: `(B or 1, H or 1, dim, rounds, columns)`.
        num_buckets: factors b1, b2, ... give the id `id1 + b1 * id2 + b1 * b2 * id3 ...`.
        valid: `(B, L)` bool. Other positions get one extra bucket, the last: see `total_buckets`.

    Ties go to the first of `[xR; -xR]`.
    """
    factors = factors_of(num_buckets)
    rounds, columns = rotations.shape[-2:]
    if columns != sum(factors) // 2:
        raise ValueError(
            f"buckets {factors} need rotations of {sum(factors) // 2} columns, not {columns}"
        )
    flat = rotations.to(vectors.dtype).flatten(-2)
    each = vectors.shape[0] * vectors.shape[1] * flat.shape[-1]
    found = []
    for tokens in pieces(0, vectors.shape[-2], each, PROJECTED_ELEMENTS, vectors.device):
        projected = vectors[..., tokens, :] @ flat
        found.append(_bucket_ids(projected.unflatten(-1, (rounds, columns)), factors))
    buckets = torch.cat(found, -1)
    if valid is not None:
        buckets.masked_fill_(~valid[:, None, None, :], math.prod(factors))
    return buckets


def _bucket_ids(projected: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Ids `(B, H, rounds, L)` of projections `(B, H, L, rounds, columns)`."""
    buckets, weight = None, 1
    for factor, part in zip(factors, projected.split([f // 2 for f in factors], -1), strict=True):
        own = _argmax_of_both_signs(part, factor // 2)
        buckets = own if buckets is None else buckets.add_(own, alpha=weight)
        weight *= factor
    return buckets.transpose(-1, -2)


def _argmax_of_both_signs(x: Tensor, half: int) -> Tensor:
    """`cat([x, -x]).argmax(-1)` as int32 without making the second half."""
    high, low = x.max(-1), x.min(-1)
    opposite = low.indices.int().add_(half)
    return torch.where(high.values >= -low.values, high.indices.int(), opposite)


def total_buckets(num_buckets: NumBuckets, padded: bool = False) -> int:
    """Buckets of one round, the extra one of padding included."""
    return math.prod(factors_of(num_buckets)) + padded


def small_ids(buckets: Tensor, num_buckets: NumBuckets) -> Tensor:
    """Bucket ids in the narrower type that holds them, and the extra bucket: int16 or int32."""
    fits = total_buckets(num_buckets, padded=True) - 1 <= torch.iinfo(torch.int16).max
    return buckets.to(torch.int16 if fits else torch.int32)


@dataclass(frozen=True)
class Sorted:
    """Tokens of each round in the order of their buckets; equal buckets keep their order.

    Attributes:
        order: `(B * H, rounds, L)` int32: which token lies at a place.
        places: the inverse: where in its round a token lies.
        buckets: the sorted ids `(B * H, rounds, L)`, each round from 0 on.
    """

    order: Tensor
    places: Tensor
    buckets: Tensor

    @property
    def sticker(self) -> Tensor:
        """Indices into the rounds laid end to end, `(B * H, rounds * L)`: the authors' name."""
        return _end_to_end(self.order)

    @property
    def undo(self) -> Tensor:
        """The inverse permutation of `sticker`."""
        return _end_to_end(self.places)


def _end_to_end(index: Tensor) -> Tensor:
    rounds, length = index.shape[1:]
    offsets = torch.arange(rounds, device=index.device, dtype=index.dtype) * length
    return (index + offsets[:, None]).flatten(1)


def sort_by_bucket(buckets: Tensor) -> Sorted:
    """Sort tokens by bucket, then by position: one stable sort.

    Args:
        buckets: `(B, H, rounds, L)`.
    """
    found = torch.sort(buckets.flatten(0, 1), dim=-1, stable=True)
    positions = torch.arange(buckets.shape[-1], dtype=torch.int32, device=buckets.device)
    places = torch.empty_like(found.values, dtype=torch.int32)
    places.scatter_(-1, found.indices, positions.expand_as(places))
    return Sorted(found.indices.int(), places, found.values)
