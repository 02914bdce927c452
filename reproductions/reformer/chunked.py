"""Chunked attention, forward and backward, with nothing of the size of the scores kept.

**Rounds.** With `s` a score and `Z_r` the log-sum-exp of round r, the merged output is one softmax
over the windows of all rounds: `out = sum_r exp(Z_r - Z) out_r`, `Z = logsumexp_r Z_r` (Eq. 6, 7).
Hence the gradient of a score is `exp(s - Z) (dP - out . dout)` in every round: the backward pass of
ordinary fused attention, given the merged `out` and `Z`. No gradient of `Z_r` is needed.

**Memory.** Work goes through in blocks that fit the cache (`blocks.py`). Rounds are merged as they
come, so that memory does not grow with their number; the backward pass gathers and masks again
instead of keeping n sorted copies.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from reproductions.reformer.blocks import Block, Rows, groups
from reproductions.reformer.kernels import attend, attend_backward
from reproductions.reformer.windows import Windows


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

    def factors(self, query: Tensor, width: int) -> Tensor | None:
        """Of scores `(lanes, C, m, w)` of queries `(lanes, C, m, d)`; None for no dropout."""
        if not self.rate:
            return None
        if self.mask is not None:
            return self.mask
        if self.generator is None:
            self.generator = torch.Generator(query.device).manual_seed(self.seed)
        shape = (*query.shape[:-1], width)[2 if self.shared else 0 :]
        drawn = torch.rand(shape, generator=self.generator, device=query.device)
        mask = (drawn >= self.rate).to(query) / (1 - self.rate)
        if self.shared:
            self.mask = mask
        return mask


def _joined(blocks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    if len(blocks) == 1:
        return blocks[0]
    return tuple(torch.cat(one) for one in zip(*blocks, strict=True))


def _forward(
    windows: Windows, dropout: _Dropout, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Merged output `(R, L, dv)` of query, key and value `(R, L, ...)`; log-sum-exp and weight.

    The weight `(R, L)` is the sum of the rounds' shares: 1 but for tokens that see only themselves.
    Near -1e5 a log-sum-exp is rounded to 1/128, so theirs is 1.0035 in 4 rounds and 0.998 in 2. The
    authors' outputs and gradients have it, and so have these.
    """
    merged = []
    for some in groups(windows, query, key, value):
        sums = _Merged(windows)
        for rounds in some.rounds():
            shape = (some.lanes(rounds), windows.per_round, windows.chunk)
            output, total = query.new_empty(*shape, value.shape[-1]), query.new_empty(shape)
            for block in some.blocks(rounds):
                own_output, own_total = output[:, block.chunks], total[:, block.chunks]
                for at, bias in block.parts():
                    query_at, key_at, value_at = block.at(at)
                    keep = dropout.factors(query_at, windows.width)
                    own_output[:, at], own_total[:, at] = attend(
                        query_at, key_at, value_at, bias, keep
                    )
            sums.add(some.unsorted(output, rounds), some.unsorted(total, rounds))
        merged.append(sums.result())
    return _joined(merged)


class _Merged:
    """The sum of the rounds' outputs, each weighed by `exp(Z_r - Z)`, as they come.

    Until all are there they are weighed relative to the largest `Z_r` so far.
    """

    def __init__(self, windows: Windows) -> None:
        self.windows, self.totals = windows, []
        self.sum = self.weight = self.top = None

    def add(self, output: Tensor, total: Tensor) -> None:
        """Some rounds' outputs `(R, p, L, dv)`, which are overwritten, and `Z_r` `(R, p, L)`."""
        self.totals.append(total)
        if self.windows.rounds == 1:
            self.sum = output[:, 0]
            return
        before, self.top = self.top, total.amax(1)
        if before is not None:
            self.top = torch.maximum(before, self.top)
        share = _shares(self.windows, total, self.top)
        own, weight = _sum_of_rounds(output.mul_(share[..., None])), _sum_of_rounds(share)
        if before is not None:
            less = (before - self.top).exp_()
            own += self.sum.mul_(less[..., None])
            weight += self.weight * less
        self.sum, self.weight = own, weight

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Merged output `(R, L, dv)`; `Z` and the sum of the shares `(R, L)`."""
        total = torch.cat(self.totals, 1)
        if self.windows.rounds == 1:
            return self.sum, total[:, 0], torch.ones_like(total[:, 0])
        whole = total.logsumexp(1)
        factor = (self.top - whole).exp_()
        return self.sum.mul_(factor[..., None]), whole, self.weight * factor


def _sum_of_rounds(values: Tensor) -> Tensor:
    return values[:, 0] if values.shape[1] == 1 else values.sum(1)


def _shares(windows: Windows, total: Tensor, whole: Tensor) -> Tensor:
    """What each round weighs, `(R, n, L)`: `exp(Z_r - Z)` for a whole Z `(R, L)`.

    Of a token that sees only itself, `Z_r` is the penalty plus the logarithm of how often, of
    which rounding leaves little; from its score itself the share is what the authors' code has.
    """
    whole, penalty = whole[:, None], windows.self_penalty
    share = (total - whole).exp_()
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
            for some in groups(windows, query, key, value):
                rows = some.rows
                mean = output[rows] / weight[rows, :, None] if windows.rounds > 1 else output[rows]
                found.append(_backward(some, dropout, grad[rows], mean, total[rows]))
        return (*_joined(found), None, None, None, None)


def _backward(
    some: Rows, dropout: _Dropout, grad: Tensor, output: Tensor, total: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of some rows' query, key and value, `(R, L, ...)` each."""
    windows, found = some.windows, None
    for rounds in some.rounds():
        lanes, chunks = some.lanes(rounds), windows.per_round
        of_query = grad.new_empty(lanes, chunks, windows.chunk, some.query.shape[-1])
        chunks += windows.parts - 1  # neighbours
        of_windows = [
            grad.new_zeros(lanes, chunks, windows.chunk, one.shape[-1])
            for one in (some.key, some.value)
        ]
        for block in some.blocks(rounds):
            asked = [block.sorted(one) for one in (grad, output, total)]
            for at, bias in block.parts():
                given, merged, whole = (one[:, at] for one in asked)
                inputs = block.at(at)
                keep = dropout.factors(inputs[0], windows.width)
                own, *others = attend_backward(given, *inputs, merged, whole, bias, keep)
                first, last = block.chunks.start + at.start, block.chunks.start + at.stop
                of_query[:, first:last] = own
                for sums, part in zip(of_windows, others, strict=True):
                    part = part.unflatten(2, (windows.parts, windows.chunk))
                    for step in range(windows.parts):  # a chunk is a neighbour in `parts` windows
                        sums[:, first + step : last + step] += part[:, :, step]
        more = [_sum_of_rounds(some.unsorted(of_query, rounds))]
        more += [_by_token(some, rounds, one) for one in of_windows]
        if found is None:
            found = more
        else:
            found = [one.add_(new) for one, new in zip(found, more, strict=True)]
    return tuple(found)


def _by_token(some: Rows, rounds: slice, lanes: Tensor) -> Tensor:
    """Sums `(R, L, ...)` of some rounds' chunks and their neighbours `(R p, b + C + a, m, ...)`."""
    windows = some.windows
    own = _sum_of_rounds(some.unsorted(lanes, rounds, windows.before)).contiguous()
    edges = (
        (-windows.before, 0, lanes[:, : windows.before]),
        (windows.per_round, windows.per_round + windows.after, lanes[:, -windows.after :]),
    )
    starts = torch.arange(own.shape[0], dtype=torch.int32, device=own.device) * windows.length
    for first, last, edge in edges:  # tokens of other rounds, next on the ring
        if first < last:
            index = (some.tokens_of(rounds, first, last) + starts[:, None]).flatten()
            own.flatten(0, 1).index_add_(0, index, edge.reshape(-1, *own.shape[2:]))
    return own


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
    rounds, chunks = slice(0, windows.rounds), slice(0, windows.per_round)
    some = Rows(windows, slice(0, query.shape[0]), query, key, key)
    block = Block(some, rounds, chunks)
    scores = block.query @ block.key.transpose(-1, -2)
    scores += some.biases.of(rounds, 0, windows.per_round, block.own_scores(chunks))
    total = scores.logsumexp(-1)
    inside = (scores - total[..., None]).exp()
    merged = some.unsorted(total, rounds).logsumexp(1)
    share = (scores - block.sorted(merged)[..., None]).exp()
    count, length = query.shape[:2]
    asked = some.tokens.unflatten(1, (-1, windows.chunk))[..., None].long()
    near = some.tokens_of(rounds, -windows.before, windows.per_round + windows.after)
    seen = windows.unfold(near.reshape(count * windows.rounds, -1))
    seen = seen.reshape(count, windows.chunks, 1, windows.width).long()
    whole = query.new_zeros(count, length**2)
    whole.scatter_add_(1, (asked * length + seen).flatten(1), share.reshape(count, -1))
    return inside.unflatten(0, (count, -1)).flatten(1, 2), whole.unflatten(1, (length, length))
