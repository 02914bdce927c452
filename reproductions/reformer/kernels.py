"""Attention of queries on their windows of keys, forward and backward, with its log-sum-exp.

Rounds of hashing are merged by their log-sum-exp, which torch's public attention does not return;
its kernel does. Backward needs no log-sum-exp gradient of its own: see `chunked.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _fused(query: Tensor, value: Tensor, keep: Tensor | None) -> bool:
    """Whether torch's kernel takes it: it has no dropout and one width for keys and values."""
    return keep is None and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`softmax(q k^T + bias) v` and the log-sum-exp of the scores.

    Args:
        query: `(R, C, m, d)`; key, value: `(R, C, w, d)` and `(R, C, w, dv)`, views are fine.
        bias: broadcasts to `(R, C, m, w)`.
        keep: factors of dropout that broadcast likewise: 0, or 1 / (1 - p). Dropout comes after
            the log-sum-exp, so that it does not enter the weights of rounds.

    Returns:
        `(R, C, m, dv)` and `(R, C, m)`.
    """
    if _fused(query, value, keep):
        return _FORWARD(query, key, value, attn_mask=bias, scale=1.0)
    scores = query @ key.transpose(-1, -2) + bias
    total = scores.logsumexp(-1)
    share = (scores - total[..., None]).exp_()
    return (share if keep is None else share * keep) @ value, total


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    bias: Tensor,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value.

    Args:
        grad, output, total: of the whole attention; where the window is a part of it (one round
            of several), these are those of all rounds together.
    """
    if _fused(query, value, keep):
        return _BACKWARD(
            grad, query, key, value, output, total, 0.0, False, attn_mask=bias, scale=1.0
        )
    share = (query @ key.transpose(-1, -2) + bias - total[..., None]).exp_()
    kept = share if keep is None else share * keep
    grad_value = kept.transpose(-1, -2) @ grad
    grad_share = grad @ value.transpose(-1, -2)
    if keep is not None:
        grad_share = grad_share * keep
    grad_scores = share * (grad_share - (grad * output).sum(-1, keepdim=True))
    return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, grad_value
