"""The released code's behaviour, for comparison: an approximate softmax, policies, batch effects.

What differs from the paper is kept: every block has a softmax with a small constant, the CDF is
that of sorted scores stretched to [0, 1], the grid has as many points as the image has patches,
and removed tokens either stay as zeros or are cut off at the longest image of the batch. Then the
padding of the shorter images takes part in their choice, so an image's result depends on its batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproductions.ats.sampling import first_places, significance

#: The constant in the softmax (official code: `softmax_with_policy`).
EPS = 1e-6


def masked_softmax(logits: Tensor, policy: Tensor) -> Tensor:
    """Attention of live queries on keys of which some are removed.

    For a removed query the released code also lets it see itself; what it gets is multiplied by
    zero soon after, so that part is left out.

    Args:
        logits: `(B, H, M, N)`.
        policy: 1 for live keys, 0 for removed ones, `(B, N)`.
    """
    logits = logits.float()
    live = (logits - logits.amax(-1, keepdim=True)).exp() * policy[:, None, None]
    return (live + EPS / logits.shape[-1]) / (live.sum(-1, keepdim=True) + EPS)


def sample_grid(cdf: Tensor, points: int) -> Tensor:
    """`points` samples from the smallest non-zero entry of the CDF to 1, evenly: `(B, points)`."""
    start = cdf.where(cdf > 0, 1.0).amin(1, keepdim=True)
    steps = torch.linspace(0, 1, points, device=cdf.device, dtype=cdf.dtype)
    return start + steps * (1 - start)


def sampled_sorted(scores: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """The released choice among the patches' scores `(B, N)`.

    Returns:
        The order of ascending significance, and in that order which are hit, both `(B, N)`.
    """
    scores, order = (scores / scores.sum(1, keepdim=True)).sort(dim=1)
    cdf = scores.cumsum(1)
    low, high = cdf[:, :1], cdf[:, -1:]
    cdf = (cdf - low) / (high - low).clamp_min(torch.finfo(cdf.dtype).tiny)
    halfway = (cdf[:, :-1] + cdf[:, 1:]) / 2
    nearest = torch.searchsorted(halfway.contiguous(), sample_grid(cdf, points))
    return order, torch.zeros_like(order, dtype=torch.bool).scatter(1, nearest, True)


def heads(attn: nn.Module, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `(B, H, N, d)` of normalised tokens `(B, N, D)`."""
    qkv = attn.qkv(y).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    return attn.q_norm(q), attn.k_norm(k), v


def plain_block(block: nn.Module, x: Tensor, policy: Tensor) -> Tensor:
    """A block without sampling: tokens `(B, N, D)`, policy `(B, N)`."""
    q, k, v = heads(block.attn, block.norm1(x))
    attention = masked_softmax(q @ k.mT * block.attn.scale, policy).to(v)
    return _rest_of_block(block, x, attention @ v, policy)


def sampling_block(
    block: nn.Module, x: Tensor, policy: Tensor, points: int, drop: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A block that samples (official code: `ATSBlock`); the class token is the first.

    Args:
        policy: `(B, N)`.
        points: of the grid, the number of patches of the image.
        drop: cut the sequence at the longest image, else keep its length.

    Returns:
        Tokens `(B, M, D)`, policy `(B, M)`, and the incoming positions `(B, M)` of the outgoing
        tokens: the class token, then ascending significance.
    """
    q, k, v = (part * policy[:, None, :, None] for part in heads(block.attn, block.norm1(x)))
    scale = block.attn.scale
    row = masked_softmax(q[:, :, :1] @ k.mT * scale, policy)[:, :, 0]
    order, hit = sampled_sorted(significance(row, v)[:, 1:], points)
    counts = hit.sum(1) + 1
    size = int(counts.max()) if drop else x.shape[1]
    places = first_places(hit, size - 1)
    index = F.pad(order.gather(1, places) + 1, (1, 0))  # the class token stays in front
    policy_out = (torch.arange(size, device=x.device) < counts[:, None]).to(x)
    # the rows of the chosen queries; the released code computes all rows, then gathers
    q = q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    attention = masked_softmax(q @ k.mT * scale, policy).to(v)
    x = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return _rest_of_block(block, x, attention @ v, policy_out), policy_out, index


def _rest_of_block(block: nn.Module, x: Tensor, mixed: Tensor, policy: Tensor) -> Tensor:
    """From the heads' results `(B, H, M, d)` to the block's output `(B, M, D)`."""
    policy = policy[..., None]
    out = block.attn.proj(mixed.transpose(1, 2).flatten(2))
    x = (x + block.drop_path1(block.ls1(block.attn.proj_drop(out)))) * policy
    return (x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))) * policy
