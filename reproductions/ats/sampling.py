"""Which tokens a stage keeps: significance scores, their CDF, and the samples drawn from it.

Everything here works on patch tokens `(..., N)` of single images or of padded batches; a padding
token has score 0, stands behind the live ones, and is never hit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def significance(row: Tensor, values: Tensor) -> Tensor:
    """How much each token matters to the class token, not yet normalised (Sec. 3.1).

    The attention that the class token pays to a token, summed over heads, times the length of the
    token's value vector, heads joined (official code: `score_assignment_step`).

    Args:
        row: attention of the class token `(..., H, N)`, rows of the softmax.
        values: `(..., H, N, d)`.

    Returns:
        `(..., N)`.
    """
    return row.sum(-2) * torch.linalg.vector_norm(values, dim=(-3, -1))


def significance_by_head(row: Tensor, values: Tensor) -> Tensor:
    """As `significance`, but each head's attention times the length of its own value."""
    return (row * torch.linalg.vector_norm(values, dim=-1)).sum(-2)


def cumulative(scores: Tensor) -> Tensor:
    """The CDF of the normalised scores `(..., N)`, in the order of the tokens.

    In double precision: a choice hangs on differences of this sum, and float32 would let the
    order of summation decide more of them.
    """
    summed = scores.double().cumsum(-1)
    return summed / summed[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)


def sample_counts(cdf: Tensor, limit: int) -> Tensor:
    """How often each token is hit by `limit` evenly spaced samples, `(..., N)` int64.

    The samples are the midpoints `(2k - 1) / (2 limit)`, k = 1 .. limit; each takes the token
    whose CDF is nearest (the first one of two). That token is the j-th exactly if the sample lies
    between the points halfway to its neighbours' CDFs, so counting the samples below each of these
    points says everything, and nothing has to be searched.

    Where the CDF is not a number, the last token takes all samples: a network that has diverged
    shall answer with what it has become, and not fail for want of tokens.
    """
    below = ((cdf[..., :-1] + cdf[..., 1:]) * (limit / 2) + 0.5).floor().nan_to_num(0.0)
    return (F.pad(below, (0, 1), value=limit) - F.pad(below, (1, 0))).long()


def sampled(scores: Tensor, limit: int) -> Tensor:
    """The distinct tokens that the paper's sampling hits (Sec. 3.2), bool `(..., N)`."""
    return sample_counts(cumulative(scores), limit) > 0


def sampled_by_tokenreduction(scores: Tensor, limit: int) -> Tensor:
    """The second implementation's choice (TokenReduction: `AdaptiveTokenSampling`).

    Its grid ends one sample early (`limit - 1` of them), the sum of the scores gets 1e-6, and a
    removed token, whose score is 0, is pushed off by adding 0.1 to its place in the CDF.
    """
    cdf = scores.cumsum(-1) / (scores.sum(-1, keepdim=True) + 1e-6) + 0.1 * (scores == 0)
    samples = torch.arange(1, 2 * limit - 2, 2, device=scores.device, dtype=cdf.dtype) / (2 * limit)
    nearest = (samples[:, None] - cdf[..., None, :]).abs().argmin(-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, nearest, True)


def top_scores(scores: Tensor, limit: int) -> Tensor:
    """The rival: the `limit` tokens of the largest scores, bool `(..., N)`."""
    best = scores.topk(min(limit, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def first_places(mask: Tensor, size: int) -> Tensor:
    """The positions of the true entries of each row of `mask` `(B, N)`, in order: `(B, size)`.

    A row with fewer is filled up with 0. No row may have more than `size`.
    """
    place = (mask.cumsum(1) - 1).where(mask, size)  # what is false lands behind the end
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return positions.new_zeros(len(mask), size + 1).scatter(1, place, positions)[:, :size]
