"""What an image costs, from the number of tokens it has in each block.

The paper reports averages over images. Two rules stand here: multiply-adds that this
implementation spends, and those that fvcore counts on the released code (the paper's counter is
not in its repository; on that code this rule gives fvcore's count exactly).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from harness.evaluation import variant_of
from harness.measurement.counting import image_pack

#: Operations per element of a layer norm, as fvcore counts them.
LAYER_NORM = 5


def tokens_in_blocks(model: VisionTransformer, kept: Sequence[Tensor]) -> np.ndarray:
    """Tokens of each image, prefix included, in front of each block and behind the last one.

    Args:
        kept: of `forward_with_tokens`.

    Returns:
        `(B, depth + 1)` int64.
    """
    prefix = model.num_prefix_tokens
    counts = np.full((len(kept[0]), len(model.blocks) + 1), model.patch_embed.num_patches + prefix)
    for stage, positions in zip(sorted(model.ats.limits), kept, strict=True):
        counts[:, stage + 1 :] = ((positions >= 0).sum(1) + prefix).cpu().numpy()[:, None]
    return counts


def macs_of_counts(
    model: VisionTransformer, counts: np.ndarray, released: bool = False
) -> np.ndarray:
    """Multiply-adds of images whose tokens are known; the dense parent's for constant counts.

    A block with N tokens in and M out: qkv 3ND², products MND twice, projection MD², MLP 2MDh.
    Blocks that sample score all tokens first, ND. The released code multiplies all N rows in both
    products, and fvcore adds the norms; that is `released`.

    Args:
        counts: `(..., depth + 1)`, see `tokens_in_blocks`.

    Returns:
        `(...)`, integers for integers.
    """
    dim, hidden = model.embed_dim, model.blocks[0].mlp.fc1.out_features
    before, after = counts[..., :-1], counts[..., 1:]
    total = 3 * before * dim**2 + after * dim**2 + 2 * after * dim * hidden
    total += 2 * before * (before if released else after) * dim
    if released:
        total += LAYER_NORM * dim * (before + after)
    else:
        samples = np.array([block in model.ats.limits for block in range(len(model.blocks))])
        total += before * dim * samples
    embed, patches = model.patch_embed.proj, model.patch_embed.num_patches
    rest = patches * embed.weight.numel() + dim * model.num_classes
    norm = LAYER_NORM * dim * counts[..., -1] if released else 0
    return total.sum(-1) + rest + norm


def dense_macs(model: VisionTransformer) -> int:
    """Multiply-adds of the same network without sampling."""
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    total = macs_of_counts(model, np.full(len(model.blocks) + 1, tokens))
    return int(total) - len(model.ats.limits) * tokens * model.embed_dim


def macs(module: VisionTransformer, image_size: int | tuple[int, int]) -> int:
    """The paper's number: fvcore's count of the released code, averaged over real images.

    The images are those over which this project counts models whose cost depends on the image.
    """
    pack = image_pack(variant_of(module), image_size)
    with torch.no_grad():
        _, kept = module.forward_with_tokens(torch.stack(pack.images))
    counts = tokens_in_blocks(module, kept)
    return round(float(macs_of_counts(module, counts, released=True).mean()))
