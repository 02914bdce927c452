"""Attention layers: LSH, local, and the full shared-QK attention that both are measured against.

All take `(B, L, C)` and give the same shape. Lengths that do not divide into chunks are padded
inside, and the padding is hidden: the answer is that of the ragged last chunk.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.linear import Linear
from reproductions.reformer.chunked import chunked_attention
from reproductions.reformer.hashing import (
    NumBuckets,
    draw_rotations,
    factors_of,
    hash_vectors,
    rotation_columns,
    small_ids,
    sort_by_bucket,
)
from reproductions.reformer.rules import Rules, get_rules
from reproductions.reformer.windows import Windows

#: Elements of what is added to the scores of full attention at a time.
DENSE_BIAS = 1 << 22


class HashedLinear(nn.Linear):
    """The projection whose output is hashed: rounded as torch rounds it, in any form of a network.

    A bucket is the place of the largest of some numbers. Among millions there are some whose two
    largest are equal to the last digit, and another order of summation chooses the other one.
    `harness.linear` and the deployment form leave a subclass as it is.
    """


class _Heads(nn.Module):
    """What the layers share: projections into heads and back.

    Args:
        dim: width C of the tokens.
        num_heads, head_dim: default `head_dim` C / num_heads.
        qkv_bias, out_bias: of the projections; the authors have neither.
        causal: whether later positions are hidden.
        chunk: tokens of a chunk.
        attn_drop: dropout of attention.

    Raises:
        ValueError: a width that does not divide into heads, or an empty chunk.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        causal: bool = False,
        chunk: int = 64,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"width {dim} does not divide into {num_heads} heads")
        if chunk < 1:
            raise ValueError(f"a chunk needs at least one token, not {chunk}")
        if not 0 <= attn_drop < 1:
            raise ValueError(f"a dropout rate lies in [0, 1), not at {attn_drop}")
        self.num_heads, self.head_dim = num_heads, head_dim or dim // num_heads
        self.causal, self.chunk, self.attn_drop = causal, chunk, attn_drop
        inner = self.num_heads * self.head_dim
        for name in self.projections:
            kind = HashedLinear if name == "to_qk" else Linear
            setattr(self, name, kind(dim, inner, bias=qkv_bias))
        self.to_out = Linear(inner, dim, bias=out_bias)

    projections: tuple[str, ...] = ("to_qk", "to_v")

    def heads(self, x: Tensor) -> Tensor:
        """`(B, L, H * d)` as `(B, H, L, d)`, laid out so."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2).contiguous()

    def check(self, x: Tensor, valid: Tensor | None) -> None:
        """Raise `ValueError` if tokens `(B, L, C)` or their mask `(B, L)` cannot be attended to."""
        if not x.shape[1]:
            raise ValueError("there is nothing to attend to in an empty sequence")
        if valid is not None and valid.shape != x.shape[:2]:
            raise ValueError(
                f"valid must be {tuple(x.shape[:2])}, a flag for each token, "
                f"not {tuple(valid.shape)}"
            )

    def rate(self) -> tuple[float, int]:
        """Dropout of this pass, and the seed that decides what is dropped.

        One number is drawn from torch's random state in every training pass, also where it is not
        needed, so that a pass that is repeated from the same state repeats its dropout.
        """
        if not self.training:
            return 0.0, 0
        return self.attn_drop, int(torch.randint(2**62, ()))

    def merged(self, x: Tensor) -> Tensor:
        """Heads `(B, H, L, d)` joined and projected back to `(B, L, C)`."""
        return self.to_out(x.transpose(1, 2).flatten(2))


def padded(x: Tensor, to: int) -> Tensor:
    """`(B, H, L, d)` with zeros behind, up to a multiple of `to` tokens."""
    missing = -x.shape[-2] % to
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def padded_mask(valid: Tensor | None, batch: int, length: int, to: int, device) -> Tensor | None:
    """Which of the padded positions are tokens `(B, L')`; None where all are."""
    missing = -length % to
    if valid is None:
        if not missing:
            return None
        valid = torch.ones(batch, length, dtype=torch.bool, device=device)
    return F.pad(valid.bool(), (0, missing))


def _as_rows(valid: Tensor | None, heads: int) -> Tensor | None:
    return None if valid is None else valid.repeat_interleave(heads, 0)


def check_rounds(*rounds: int | None) -> None:
    """Raise `ValueError` unless all that are given are numbers of rounds."""
    for one in rounds:
        if one is not None and (not isinstance(one, Integral) or one < 1):
            raise ValueError(f"LSH attention needs at least one round of hashing, not {one!r}")


class LSHAttention(_Heads):
    """LSH self-attention with shared queries and keys (Sec. 2).

    Args:
        rounds: of hashing, in training.
        eval_rounds: in evaluation; default as in training.
        num_buckets: a number or its factors; default by the rules, from length and chunk.
        rules: which of the published forms, or rules of your own.
        rotation_seed: of the rotations in evaluation, which are fixed; training draws new ones
            in every pass.

    Attributes:
        rotations: if set, used in every pass instead of drawn ones (see `hash_vectors`).

    Raises:
        ValueError: an odd number of buckets, or no round.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int | None = None,
        *,
        rounds: int = 2,
        eval_rounds: int | None = None,
        num_buckets: NumBuckets | None = None,
        rules: str | Rules = "trax_v2",
        rotation_seed: int = 0,
        **options,
    ) -> None:
        super().__init__(dim, num_heads, head_dim, **options)
        check_rounds(rounds, eval_rounds)
        self.rules = get_rules(rules)
        self.num_buckets = num_buckets if num_buckets is None else factors_of(num_buckets)
        self.rounds, self.eval_rounds = rounds, eval_rounds or rounds
        self.rotation_seed = rotation_seed
        self.rotations: Tensor | None = None

    def buckets_for(self, length: int) -> NumBuckets:
        """The buckets of a sequence of `length` tokens, a multiple of `multiple`."""
        return self.num_buckets or self.rules.num_buckets(int(length), self.chunk)

    @property
    def multiple(self) -> int:
        """Tokens to a multiple of which a sequence is padded."""
        return self.chunk * (self.rules.multiple if self.num_buckets is None else 1)

    def prepare(self, length: int) -> None:
        """Draw the rotations of evaluation for `length` tokens now, not when needed."""
        self.fixed_rotations(self.buckets_for(length + -length % self.multiple))

    def fixed_rotations(self, num_buckets: NumBuckets) -> Tensor:
        """The rotations of evaluation for so many buckets `(1, H or 1, d, rounds, columns)`."""
        name = f"rotations_{self.eval_rounds}_{rotation_columns(num_buckets)}"
        if not hasattr(self, name):
            drawn = draw_rotations(
                self.head_dim, self.eval_rounds, num_buckets, heads=self.num_heads,
                sharing="all" if self.rules.sharing == "all" else "head", seed=self.rotation_seed,
                device=self.to_qk.weight.device,
            )  # fmt: skip
            self.register_buffer(name, drawn, persistent=False)
        return getattr(self, name)

    def hash(self, queries: Tensor, valid: Tensor | None = None, seed: int = 0) -> Tensor:
        """Bucket ids `(B, H, rounds, L)` of queries `(B, H, L, d)`; L a multiple of the chunk.

        Args:
            valid: `(B, L)`; other positions get the extra bucket.
            seed: of the rotations in training.
        """
        num_buckets = self.buckets_for(queries.shape[-2])
        if self.rotations is not None:
            rotations = self.rotations.to(queries.device)
        elif not self.training:
            rotations = self.fixed_rotations(num_buckets)
        else:
            rotations = draw_rotations(
                self.head_dim, self.rounds, num_buckets, batch=len(queries),
                heads=self.num_heads, sharing=self.rules.sharing, seed=seed,
                device=queries.device,
            )  # fmt: skip
        return hash_vectors(queries, rotations, num_buckets, valid)

    def windows(self, buckets: Tensor, valid: Tensor | None = None) -> Windows:
        """Who sees whom, given bucket ids `(B, H, rounds, L)`."""
        rules = self.rules
        return Windows(
            buckets.shape[-1], self.chunk, buckets.shape[-2], rules.before, rules.after,
            sorted=sort_by_bucket(buckets), valid=_as_rows(valid, self.num_heads),
            causal=self.causal, same_bucket=rules.same_bucket, union=rules.count == "union",
            self_penalty=rules.self_penalty, hidden=rules.hidden,
        )  # fmt: skip

    def forward(
        self, x: Tensor, valid: Tensor | None = None, buckets: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`(B, L, C)` and the bucket ids, to be given back where a pass is repeated.

        Args:
            valid: `(B, L)` bool, False for padding, which is hidden as key.
            buckets: ids of an earlier pass: nothing is hashed.

        Raises:
            ValueError: no tokens, or a mask of another shape.
        """
        self.check(x, valid)
        batch, length, _ = x.shape
        queries, values = self.heads(self.to_qk(x)), self.heads(self.to_v(x))
        rate, seed = self.rate()
        if self.rules.dense_up_to_chunk and length <= self.chunk:
            out = shared_qk_attention(
                queries, values, self.rules, self.causal, valid=valid, dropout=rate
            )
            return self.merged(out), None
        valid = padded_mask(valid, batch, length, self.multiple, x.device)
        queries, values = padded(queries, self.multiple), padded(values, self.multiple)
        if buckets is None:
            buckets = self.hash(queries, valid, seed)
            buckets = small_ids(buckets, self.buckets_for(queries.shape[-2]))
        out = chunked_attention(
            queries.flatten(0, 1), self.rules.keys(queries).flatten(0, 1),
            values.flatten(0, 1), self.windows(buckets, valid),
            dropout=rate, seed=seed, shared_dropout=self.rules.shared_dropout,
        )  # fmt: skip
        out = out.unflatten(0, (batch, self.num_heads))[..., :length, :]
        return self.merged(out), buckets


class LocalAttention(_Heads):
    """Attention within neighbouring chunks of tokens in their own order: no hashing, no sharing.

    The chunks lie on a ring, as in the authors' code: without `causal` the first chunk sees the
    last one as its neighbour. One chunk or less is attended to in full.

    Args:
        before, after: neighbouring chunks that are seen.
    """

    projections = ("to_q", "to_k", "to_v")

    def __init__(self, *args, before: int = 1, after: int = 0, **options) -> None:
        super().__init__(*args, **options)
        self.before, self.after = before, after

    def forward(
        self, x: Tensor, valid: Tensor | None = None, buckets: None = None
    ) -> tuple[Tensor, None]:
        """As `LSHAttention.forward`; there are no buckets."""
        self.check(x, valid)
        batch, length, _ = x.shape
        query, key, value = (self.heads(getattr(self, one)(x)) for one in self.projections)
        key = key * self.head_dim**-0.5
        rate, seed = self.rate()
        if length <= self.chunk:
            bias = _dense_bias(range(length), length, x, self.causal, valid, None, -1e9)
            out = F.scaled_dot_product_attention(query, key, value, bias, rate, scale=1.0)
            return self.merged(out), None
        valid = padded_mask(valid, batch, length, self.chunk, x.device)
        rows = (padded(one, self.chunk).flatten(0, 1) for one in (query, key, value))
        windows = Windows(
            length + -length % self.chunk, self.chunk, 1, self.before, self.after,
            valid=_as_rows(valid, self.num_heads), causal=self.causal,
        )  # fmt: skip
        out = chunked_attention(*rows, windows, dropout=rate, seed=seed)
        return self.merged(out.unflatten(0, (batch, self.num_heads))[..., :length, :]), None


class FullAttention(_Heads):
    """Full attention with shared queries and keys: what LSH attention approximates.

    Args:
        rules: score and self penalty, as in LSH attention.
    """

    def __init__(self, *args, rules: str | Rules = "trax_v2", **options) -> None:
        super().__init__(*args, **options)
        self.rules = get_rules(rules)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, buckets: None = None
    ) -> tuple[Tensor, None]:
        """As `LSHAttention.forward`; there are no buckets."""
        self.check(x, valid)
        queries, values = self.heads(self.to_qk(x)), self.heads(self.to_v(x))
        rate, _ = self.rate()
        out = shared_qk_attention(
            queries, values, self.rules, self.causal, valid=valid, dropout=rate
        )
        return self.merged(out), None


def shared_qk_attention(
    queries: Tensor,
    values: Tensor,
    rules: Rules,
    causal: bool = False,
    *,
    valid: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Dense attention with shared queries and keys: `(B, H, L, dv)`, torch's fused kernel.

    Long sequences go through in sections of queries, which changes nothing: what is added to
    the scores then stays small.

    Args:
        queries: `(B, H, L, d)`; values: `(B, H, L, dv)`.
        valid: `(B, L)`; other positions are hidden as keys.
    """
    length, keys = queries.shape[-2], rules.keys(queries).to(queries.dtype)
    step = max(1, DENSE_BIAS // length)
    sections = []
    for first in range(0, length, step):
        last = min(first + step, length)
        seen = last if causal else length
        bias = _dense_bias(
            range(first, last), seen, queries, causal, valid, rules.self_penalty, rules.hidden
        )
        sections.append(
            F.scaled_dot_product_attention(
                queries[..., first:last, :], keys[..., :seen, :], values[..., :seen, :], bias,
                dropout, scale=1.0,
            )
        )  # fmt: skip
    return sections[0] if len(sections) == 1 else torch.cat(sections, -2)


def _dense_bias(
    asked: range,
    length: int,
    like: Tensor,
    causal: bool,
    valid: Tensor | None,
    self_penalty: float | None,
    hidden: float,
) -> Tensor | None:
    """What is added to the scores of the queries `asked` with `length` keys; None for nothing.

    It broadcasts to `(B, H, len(asked), length)`. Where half precision cannot hold the numbers,
    hidden keys get its lowest one, and a query itself half of that: it must come before them.
    """
    if not causal and valid is None and self_penalty is None:
        return None
    key = torch.arange(length, device=like.device)
    query = torch.arange(asked.start, asked.stop, device=like.device)[:, None]
    gone = torch.zeros(1, 1, len(asked), length, dtype=torch.bool, device=like.device)
    if causal:
        gone = gone | (key > query)
    if valid is not None:
        gone = gone | ~valid.bool()[:, None, None, :length]
    bias = torch.zeros(gone.shape, dtype=like.dtype, device=like.device)
    lowest = torch.finfo(like.dtype).min
    bias.masked_fill_(gone, max(hidden, lowest))
    if self_penalty is not None:
        bias.masked_fill_(key == query, max(self_penalty, lowest / 2))
    return bias
