"""How the authors count (official code: `get_params`, `get_flops`, models/), in exact integers.

Their FLOPs are multiply-adds with biases, norms and a softmax at 5 per element, of patches without
the class token. A slimmed network is charged, in each block, for as many tokens as the block
*before* it keeps, the class token included, and for all heads even where one has vanished.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from reproductions.vit_slim.selection import Kept


def params(module: nn.Module) -> int:
    """Weights without masks: `get_params` once `compress` has frozen those."""
    return sum(one.numel() for name, one in module.named_parameters() if "zeta" not in name)


def macs(module: nn.Module, image_size: int | tuple[int, int]) -> int:
    """`get_flops` of a slimmed network, or of the dense one where nothing was cut yet."""
    kept = getattr(module, "kept", None)
    return dense_macs(module) if kept is None else searched_macs(module, kept)


def dense_macs(model: nn.Module) -> int:
    """`get_flops()[0]`: the network before slimming, N patches in every block."""
    dim, count = model.embed_dim, model.patch_embed.num_patches
    total = _outside(model)
    for heads, width, hidden in _layers(model):
        total += _block(dim, heads, heads * width, hidden, count)
    return total


def searched_macs(model: nn.Module, kept: Kept) -> int:
    """`get_flops()[1]`: what is left under the kept sets; `model` may be slimmed or not."""
    total, tokens = _outside(model), model.patch_embed.num_patches
    dims, hidden = kept.head_dims.sum(1).tolist(), kept.hidden.tolist()
    for own, channels, after in zip(dims, hidden, kept.num_tokens.tolist(), strict=True):
        total += _block(model.embed_dim, kept.heads[0], own, channels, tokens)
        tokens = after
    return total


def searched_params(model: nn.Module, kept: Kept) -> int:
    """`get_params()[1]` of a searchable or dense model under kept sets, masks not counted."""
    dim, total = model.embed_dim, params(model)
    dims, hidden = kept.head_dims.sum(1).tolist(), kept.hidden.tolist()
    for (heads, width, full), own, channels in zip(_layers(model), dims, hidden, strict=True):
        total -= (heads * width - own) * (4 * dim + 3) + (full - channels) * (2 * dim + 1)
    return total


def remaining(model: nn.Module, kept: Kept) -> tuple[float, float, float]:
    """`get_remaining`: shares of head dimensions, channels and tokens that are left.

    As released: tokens are divided by the patches (all kept reads 1.005), and gates of a coarse
    layout, one per head or one for all heads, by the number of dimensions.
    """
    layers = len(kept.attention)
    gates = sum(int(one.sum()) for one in kept.attention)
    patches = layers * model.patch_embed.num_patches
    return (
        gates / (layers * int(np.prod(kept.heads))),
        kept.hidden.sum().item() / (layers * len(kept.mlp[0])),
        kept.num_tokens.sum().item() / patches,
    )


def matmul_macs(model: nn.Module, kept: Kept, dropped: bool = False) -> int:
    """What a counter of convolutions and matrix products sees of a slimmed network.

    Args:
        dropped: tokens that a layer does not keep are gone, else all are computed.
    """
    dim = model.embed_dim
    total = _outside(model)
    own, hidden, tokens = kept.head_dims.sum(1), kept.hidden, kept.num_tokens
    if not dropped:
        tokens = np.full_like(tokens, len(kept.tokens[0]))
    blocks = tokens * own * 4 * dim + 2 * tokens**2 * own + 2 * tokens * dim * hidden
    return total + int(blocks.sum())


def _layers(model: nn.Module) -> list[tuple[int, int, int]]:
    """Heads, head dimensions and hidden channels of each block of a model that is not slimmed."""
    return [
        (block.attn.num_heads, block.attn.head_dim, block.mlp.fc1.out_features)
        for block in model.blocks
    ]


def _outside(model: nn.Module) -> int:
    """Patch embedding and head (both of a distilled model); the final norm is not counted."""
    embedding = model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()
    heads = 1 if getattr(model, "head_dist", None) is None else 2
    return embedding + heads * model.embed_dim * model.num_classes


def _block(dim: int, heads: int, own: int, hidden: int, count: int) -> int:
    """One block with `own` head dimensions in all, `hidden` channels and `count` tokens."""
    norms = 2 * dim * count
    attention = 3 * count * dim * own + 3 * count * own  # q, k, v with their bias
    attention += 2 * count**2 * own + 6 * heads * count**2  # both products; scale, softmax
    attention += count * own * dim + count * dim  # projection
    return norms + attention + count * (2 * dim * hidden + dim + hidden)
