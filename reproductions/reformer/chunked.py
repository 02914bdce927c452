"""Chunked attention, forward and backward, with nothing of the size of the scores kept.

**Rounds.** With `s` a score and `Z_r` the log-sum-exp of round r, the merged output is one softmax
over the windows of all rounds: `out = sum_r exp(Z_r - Z) out_r`, `Z = logsumexp_r Z_r` (Eq. 6, 7).
Hence the gradient of a score is `exp(s - Z) (dP - out . dout)` in every round: the backward pass of
ordinary fused attention, given the merged `out` and `Z`. No gradient of `Z_r` is needed.

**Memory.** Rows (heads of examples) go through in blocks that fit the cache; the backward pass
gathers and masks again instead of keeping n sorted copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from reproductions.reformer.kernels import attend, attend_backward
from reproductions.reformer.windows import ACCELERATOR, Biases, Windows

#: Elements of one block's gathered queries, keys and values: what a cache holds.
ROW_ELEMENTS = 1 << 21


def take(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[r, index[r, k]]` as `(R, K, ...)` for rows `(R, L, ...)`: whole rows are copied."""
    count, length = rows.shape[:2]
    offsets = torch.arange(count, device=index.device, dtype=index.dtype) * length
    flat = (index + offsets[:, None]).flatten()
    return rows.flatten(0, 1).index_select(0, flat).unflatten(0, index.shape)


def _single_precision(like: Tensor) -> AbstractContextManager:
    """Without mixed precision: the backward pass, which computes scores again, has none either."""
    device = like.device.type
    mixed = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if mixed else nullcontext()


class _Dropout:
    """Factors of attention dropout, block after block, the same whenever it is made anew.

    Args:
        shared: one mask for all chunks, as the authors do, instead of one for each.
    """

    def __init__(self, rate: float, seed: int, shared: bool) -> None:
        self.rate, self.shared = rate, shared
        self.seed, self.generator, self.mask = seed, None, None

    def factors(self, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """Of a block of scores `(lanes, C, m, w)`; None where nothing is dropped."""
        if not self.rate:
            return None
        if self.mask is not None:
            return self.mask
        if self.generator is None:
            self.generator = torch.Generator(like.device).manual_seed(self.seed)
        shape = shape[-2:] if self.shared else shape
        drawn = torch.rand(shape, generator=self.generator, device=like.device)
        mask = (drawn >= self.rate).to(like) / (1 - self.rate)
        if self.shared:
            self.mask = mask
        return mask


class _Block:
    """Some rows' sorted queries, windows of keys and values, and biases.

    Attributes:
        places: tokens in sorted order `(R, n L)`.
        query: `(R n, C, m, d)`; key, value: `(R n, C, w, ...)`, views.
    """

    def __init__(
        self, windows: Windows, rows: slice, query: Tensor, key: Tensor, value: Tensor
    ) -> None:
        self.windows, self.rows = windows, rows
        self.places = windows.queries(rows, query.device)
        around = self.places[:, windows.ring(query.device).flatten()]
        self.query = self.sorted(query[rows])
        self.key, self.value = (self._windows_of(one[rows], around) for one in (key, value))

    def sorted(self, rows: Tensor) -> Tensor:
        """Values of tokens `(R, L, ...)` in sorted chunks `(R n, C, m, ...)`."""
        if self.windows.sorted is not None:
            rows = take(rows, self.places)
        chunks = (-1, self.windows.per_round, self.windows.chunk)
        return rows.reshape(*chunks, *rows.shape[2:])

    def _windows_of(self, rows: Tensor, around: Tensor) -> Tensor:
        near = take(rows, around)
        return self.windows.unfold(near.unflatten(1, (self.windows.rounds, -1)).flatten(0, 1))

    def unsorted(self, lanes: Tensor) -> Tensor:
        """Values of sorted chunks `(R n, C, m, ...)` of each round: `(R, n, L, ...)`."""
        count = self.places.shape[0]
        shape = (count, self.windows.rounds, self.windows.length)
        flat = lanes.reshape(count, -1, *lanes.shape[3:])
        if self.windows.sorted is not None:
            flat = take(flat, self.windows.sorted.undo[self.rows])
        return flat.reshape(*shape, *flat.shape[2:])

    def parts(self, dropout: _Dropout) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Ranges of chunks with their bias and their factors of dropout."""
        windows, biases = self.windows, Biases(self.windows, self.rows, self.places)
        for first, last, alike in windows.blocks(self.query.shape[0], self.query.device):
            at = slice(first, last)
            if alike:
                bias = windows.shared_bias(self.query)
            else:
                bias = biases.of(first, last, self.own_scores(at))
            shape = (self.query.shape[0], last - first, windows.chunk, windows.width)
            yield at, bias, dropout.factors(shape, self.query)

    def own_scores(self, at: slice) -> Tensor:
        """Each query's score with itself, of a range of chunks: `(R n, C, m)`."""
        start = self.windows.before * self.windows.chunk
        own_key = self.key[:, at, start : start + self.windows.chunk]
        return (self.query[:, at] * own_key).sum(-1)


def _row_blocks(windows: Windows, query: Tensor, value: Tensor) -> Iterator[slice]:
    size = windows.rounds * windows.length * (2 * query.shape[-1] + value.shape[-1])
    elements = ROW_ELEMENTS * (1 if query.device.type == "cpu" else ACCELERATOR)
    step, count = max(1, elements // size), query.shape[0]
    if torch.compiler.is_compiling():  # a program may be for any batch
        yield slice(0, count)
        return
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def _joined(blocks: list[tuple[Tensor, ...]], dim: int) -> tuple[Tensor, ...]:
    if len(blocks) == 1:
        return blocks[0]
    return tuple(torch.cat(one, dim) for one in zip(*blocks, strict=True))


def _forward(
    windows: Windows, dropout: _Dropout, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Merged output `(R, L, dv)` of query, key and value `(R, L, ...)`; log-sum-exp and weight.

    The weight `(R, L)` is the sum of the rounds' shares: 1 but for tokens that see only themselves.
    Near -1e5 a log-sum-exp is rounded to 1/128, so theirs is 1.0035 in 4 rounds and 0.998 in 2. The
    authors' outputs and gradients have it, and so have these.
    """
    merged = []
    for rows in _row_blocks(windows, query, value):
        block = _Block(windows, rows, query, key, value)
        found = [
            attend(block.query[:, at], block.key[:, at], block.value[:, at], bias, keep)
            for at, bias, keep in block.parts(dropout)
        ]
        output, total = (block.unsorted(one) for one in _joined(found, 1))
        if windows.rounds == 1:
            merged.append((output[:, 0], total[:, 0], torch.ones_like(total[:, 0])))
            continue
        whole = total.logsumexp(1)
        share = _shares(windows, total, whole[:, None])
        merged.append(((output * share[..., None]).sum(1), whole, share.sum(1)))
    return _joined(merged, 0)


def _shares(windows: Windows, total: Tensor, whole: Tensor) -> Tensor:
    """What each round weighs, `(R, n, L)`: `exp(Z_r - Z)`.

    Of a token that sees only itself, `Z_r` is the penalty plus the logarithm of how often, of
    which rounding leaves little; from its score itself the share is what the authors' code has.
    """
    share, penalty = (total - whole).exp_(), windows.self_penalty
    if penalty is None or windows.union:
        return share
    times = (total - penalty).exp_().round_()
    return torch.where(total < penalty / 2, times * (penalty - whole).exp_(), share)


class _ChunkedAttention(torch.autograd.Function):
    """Saves its inputs and merged outputs alone."""

    @staticmethod
    def forward(ctx, query, key, value, windows, rate, seed, shared):
        output, *others = _forward(windows, _Dropout(rate, seed, shared), query, key, value)
        ctx.save_for_backward(query, key, value, output, *others)
        ctx.windows, ctx.dropout = windows, (rate, seed, shared)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, output, total, weight = ctx.saved_tensors
        windows, dropout, found = ctx.windows, _Dropout(*ctx.dropout), []
        with _single_precision(query):
            for rows in _row_blocks(windows, query, value):
                block = _Block(windows, rows, query, key, value)
                mean = output[rows] / weight[rows, :, None] if windows.rounds > 1 else output[rows]
                found.append(_backward(block, dropout, grad[rows], mean, total[rows]))
        return (*_joined(found, 0), None, None, None, None)


def _backward(
    block: _Block, dropout: _Dropout, grad: Tensor, output: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a block's query, key and value, `(R, L, ...)` each."""
    windows = block.windows
    grad, output, total = (block.sorted(one) for one in (grad, output, total))
    of_query, near = [], []
    for of_windows in (block.key, block.value):
        shape = (windows.per_round + windows.parts - 1, windows.chunk, of_windows.shape[-1])
        near.append(grad.new_zeros(len(block.query), *shape))
    for at, bias, keep in block.parts(dropout):
        own, *others = attend_backward(
            grad[:, at], block.query[:, at], block.key[:, at], block.value[:, at], output[:, at],
            total[:, at], bias, keep,
        )  # fmt: skip
        of_query.append((own,))
        for whole, part in zip(near, others, strict=True):
            part = part.unflatten(2, (windows.parts, windows.chunk))
            for step in range(windows.parts):  # a chunk is a neighbour in `parts` windows
                whole[:, at.start + step : at.stop + step] += part[:, :, step]
    of_all = [*_joined(of_query, 1), *(_close_ring(windows, one) for one in near)]
    of_rounds = (block.unsorted(one) for one in of_all)
    return tuple(one[:, 0] if windows.rounds == 1 else one.sum(1) for one in of_rounds)


def _close_ring(windows: Windows, near: Tensor) -> Tensor:
    """Gradients of lanes with their neighbours, where each neighbour's goes to the chunk it is."""
    near = near.unflatten(0, (-1, windows.rounds))
    own = near[:, :, windows.before : windows.before + windows.per_round].flatten(1, 2)
    rounds = torch.arange(windows.rounds, device=near.device) * windows.per_round
    for place in (*range(windows.before), *range(near.shape[2] - windows.after, near.shape[2])):
        own[:, (rounds + place - windows.before) % windows.chunks] += near[:, :, place]
    return own.reshape(-1, windows.per_round, *own.shape[2:])


def chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: Windows,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    shared_dropout: bool = False,
) -> Tensor:
    """Attention within windows: `(R, L, dv)` of query, key `(R, L, d)` and value `(R, L, dv)`.

    Scores are `q . k` as given: any scale is the key's. Half precision is computed in single, since
    rounds are weighed by their log-sum-exps; mixed precision is off inside. Differentiable once.

    Args:
        dropout: rate; what is dropped is decided by `seed` alone.
        shared_dropout: one mask `(m, w)` for all chunks.
    """
    given = query.dtype
    kind = torch.float32 if given in (torch.float16, torch.bfloat16) else given
    query, key, value = (one.to(kind).contiguous() for one in (query, key, value))
    options = (dropout, seed, shared_dropout)
    with _single_precision(query):
        if torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value)):
            return _ChunkedAttention.apply(query, key, value, windows, *options).to(given)
        return _forward(windows, _Dropout(*options), query, key, value)[0].to(given)


@torch.no_grad()
def attention_maps(query: Tensor, key: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """For looking at: attention inside each window, and the whole of it.

    Returns:
        shares within a round `(R, n C, m, w)`, keys in the order before, own, after; and the merged
        attention `(R, L, L)` of tokens in their own order, rows adding up to 1.
    """
    rows, chunked = slice(0, len(query)), (len(query), windows.chunks, windows.chunk)
    block = _Block(windows, rows, query, key, key)
    everything = slice(0, windows.per_round)
    own = block.own_scores(everything)
    scores = block.query @ block.key.transpose(-1, -2)
    scores += Biases(windows, rows, block.places).of(0, windows.per_round, own)
    total = scores.logsumexp(-1)
    inside = (scores - total[..., None]).exp()
    merged = block.unsorted(total).logsumexp(1)
    share = (scores - block.sorted(merged)[..., None]).exp()
    asked = block.places.reshape(chunked)[..., None].long()
    seen = windows.unfold(windows.near(block.places)).reshape(*chunked[:2], 1, -1).long()
    whole = query.new_zeros(len(query), windows.length**2)
    whole.scatter_add_(1, (asked * windows.length + seen).flatten(1), share.reshape(len(query), -1))
    return inside.reshape(*chunked, -1), whole.unflatten(1, (windows.length, -1))
