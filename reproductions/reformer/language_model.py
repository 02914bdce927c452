"""The Reformer as a language model: tokens in, logits of a vocabulary out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from harness.linear import Linear
from reproductions.reformer.attention import FullAttention, LocalAttention, LSHAttention
from reproductions.reformer.hashing import NumBuckets, buckets_hugging_face
from reproductions.reformer.layers import (
    AxialPositions,
    FeedForward,
    PreNormAttention,
    chunked_cross_entropy,
    sinusoids,
)
from reproductions.reformer.reversible import ReversibleBlock, ReversibleStack
from reproductions.reformer.rules import Rules, get_rules

KINDS = ("lsh", "local", "full")


class LearnedPositions(nn.Module):
    """One learned vector per position."""

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.length, self.dim = length, dim
        self.weight = nn.Parameter(0.02 * torch.randn(length, dim))

    def forward(self, length: int | None = None) -> Tensor:
        """The first positions `(1, length, dim)`.

        Raises:
            ValueError: more than there are.
        """
        length = self.length if length is None else length
        if length > self.length:
            raise ValueError(f"a sequence of {length} is longer than the {self.length} positions")
        return self.weight[None, :length]


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines."""

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("table", sinusoids(length, dim), persistent=False)

    def forward(self, length: int | None = None) -> Tensor:
        """The first positions `(1, length, dim)`.

        Raises:
            ValueError: more than there are.
        """
        if length is not None and length > len(self.table):
            raise ValueError(
                f"a sequence of {length} is longer than the {len(self.table)} positions"
            )
        return self.table[None, :length]


class ReformerLM(nn.Module):
    """Embedding, reversible layers, norm over both streams, logits (Sec. 5; official: ReformerLM).

    Args:
        vocab_size: V.
        dim, num_heads, head_dim: width C, heads, and their width (default C / heads).
        layers: kind of attention of each layer: "lsh", "local" or "full".
        max_length: positions; for axial ones the grid's size counts instead.
        hidden: width of the feed-forward; default 4 C.
        positions: "learned", "sinusoidal", or "axial" with `axial_shape` and `axial_dims`.
        causal: each token sees earlier ones and itself.
        chunk, local_chunk: tokens of a chunk of LSH and of local attention (default the same).
        before, after: neighbouring chunks, default the rules'.
        rounds, eval_rounds, num_buckets, rules: of LSH attention.
        drop_rate, attn_drop: dropout of tokens, and of attention.
        activation: of the feed-forward; ff_chunk: positions it takes at a time, 0 for all.
        reversible: False keeps all activations.
        eps: of the norms.

    Raises:
        ValueError: what cannot be built.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        num_heads: int = 4,
        head_dim: int | None = None,
        layers: Sequence[str] = ("lsh",) * 3,
        max_length: int = 4096,
        *,
        hidden: int | None = None,
        positions: str = "learned",
        axial_shape: Sequence[int] | None = None,
        axial_dims: Sequence[int] | None = None,
        causal: bool = True,
        chunk: int = 64,
        local_chunk: int | None = None,
        before: int | None = None,
        after: int | None = None,
        rounds: int = 2,
        eval_rounds: int | None = None,
        num_buckets: NumBuckets | None = None,
        rules: str | Rules = "trax_v2",
        drop_rate: float = 0.0,
        attn_drop: float = 0.0,
        activation: str = "relu",
        ff_chunk: int = 0,
        reversible: bool = True,
        eps: float = 1e-6,
        rotation_seed: int = 0,
    ) -> None:
        super().__init__()
        rules = get_rules(rules)
        rules = rules.changed(
            before=rules.before if before is None else before,
            after=rules.after if after is None else after,
        )
        unknown = sorted(set(layers) - set(KINDS))
        if unknown or not layers:
            raise ValueError(f"layers are a list of {', '.join(KINDS)}, not {list(layers)}")
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = _positions(positions, max_length, dim, axial_shape, axial_dims)
        if rules.num_buckets is buckets_hugging_face:  # their limit depends on the positions
            longest = math.prod(axial_shape) if positions == "axial" else max_length
            rules = rules.changed(num_buckets=partial(buckets_hugging_face, max_positions=longest))
        self.drop = nn.Dropout(drop_rate)
        common = {"causal": causal, "attn_drop": attn_drop}

        def attention(index: int, kind: str) -> nn.Module:
            if kind == "lsh":
                return LSHAttention(
                    dim, num_heads, head_dim, rounds=rounds, eval_rounds=eval_rounds,
                    num_buckets=num_buckets, rules=rules, chunk=chunk,
                    rotation_seed=rotation_seed + index, **common,
                )  # fmt: skip
            if kind == "local":
                return LocalAttention(
                    dim, num_heads, head_dim, before=rules.before, after=rules.after,
                    chunk=local_chunk or chunk, **common,
                )  # fmt: skip
            return FullAttention(dim, num_heads, head_dim, rules=rules, chunk=chunk, **common)

        self.stack = ReversibleStack(
            (
                ReversibleBlock(
                    PreNormAttention(dim, attention(index, kind), nn.Dropout(drop_rate), eps),
                    FeedForward(
                        dim, hidden or 4 * dim, activation=activation, chunk_size=ff_chunk,
                        drop_rate=drop_rate, eps=eps,
                    ),
                )
                for index, kind in enumerate(layers)
            ),
            reversible,
        )  # fmt: skip
        self.norm = nn.LayerNorm(2 * dim, eps=eps)
        self.decoder = Linear(2 * dim, vocab_size)

    def features(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """What the decoder reads: both streams, normed, `(B, L, 2 C)`.

        Args:
            tokens: `(B, L)` int64.
            valid: `(B, L)` bool, False for padding.
        """
        x = self.drop(self.embedding(tokens) + self.positions(tokens.shape[1]))
        streams = self.stack(x, x, valid)
        return self.drop(self.norm(torch.cat(streams, -1)))

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits `(B, L, V)`; those at position i speak of token i + 1 in a causal model."""
        return self.decoder(self.features(tokens, valid))

    def loss(
        self, tokens: Tensor, targets: Tensor, chunk_size: int = 0, valid: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy of `targets` `(B, L)`, -100 where none counts.

        Args:
            chunk_size: positions whose logits exist at a time; 0 for all.
        """
        features = self.features(tokens, valid)
        return chunked_cross_entropy(features, self.decoder, targets, chunk_size)


def _positions(
    kind: str,
    length: int,
    dim: int,
    shape: Sequence[int] | None,
    dims: Sequence[int] | None,
) -> nn.Module:
    if kind == "axial":
        if shape is None or dims is None or sum(dims) != dim:
            raise ValueError(
                f"axial positions need axial_shape, and axial_dims that add up to {dim}"
            )
        return AxialPositions(shape, dims)
    kinds = {"learned": LearnedPositions, "sinusoidal": SinusoidalPositions}
    if kind not in kinds:
        raise ValueError(f"no positions {kind!r}; known: axial, {', '.join(kinds)}")
    return kinds[kind](length, dim)


def reformer_lm(vocab_size: int, max_length: int, **options) -> ReformerLM:
    """A Reformer language model with random weights (options: see `ReformerLM`)."""
    return ReformerLM(vocab_size, max_length=max_length, **options)
