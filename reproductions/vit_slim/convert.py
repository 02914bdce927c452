"""The authors' checkpoints -> ours.

Names are the same: a search checkpoint is a DeiT with three mask tensors per block. A retrained one
looks alike, dense weights with frozen masks; its 0/1 masks are not stored, so slim it with the
budgets it was retrained with. A plain DeiT checkpoint lacks the masks, which then keep the
constants they start from.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from reproductions.vit_slim.masks import TOKENS_START


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A search, retrained or plain DeiT state dict as that of a searchable model."""
    converted = dict(state)
    if any(key.endswith("zeta") for key in state):
        return converted
    for key, weight in state.items():
        if found := re.fullmatch(r"(blocks\.\d+)\.mlp\.fc1\.weight", key):
            block = found[1]
            converted[f"{block}.mlp.zeta"] = weight.new_ones(1, 1, len(weight))
            tokens = state["pos_embed"].shape[1]
            masks = torch.full((1, tokens, 1), TOKENS_START, dtype=weight.dtype)
            converted[f"{block}.attn.patch_zeta"] = masks
            width = weight.shape[1]
            heads = max(1, width // HEAD_DIM)
            converted[f"{block}.attn.zeta"] = weight.new_ones(1, 1, heads, 1, width // heads)
    return converted


#: Of every DeiT.
HEAD_DIM = 64
