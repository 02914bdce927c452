"""The variants: networks to be searched, and networks of a searched network's shape."""

from __future__ import annotations

from pathlib import Path

from timm.models.vision_transformer import VisionTransformer

import harness
from harness.patches import ImageSize
from reproductions.vit_slim.files import read_kept
from reproductions.vit_slim.masks import check_model, make_searchable
from reproductions.vit_slim.selection import Kept, choose, constant_scores, random_scores
from reproductions.vit_slim.slimming import slim_to

HERE = Path(__file__).parent


def searchable(
    num_classes: int,
    image_size: ImageSize,
    base: str,
    head_search: bool = False,
    uniform_search: bool = False,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> VisionTransformer:
    """A vision transformer of the bench with soft masks: `(B, 3, H, W) -> (B, num_classes)`.

    Train it with `method.SparsitySearch`, then cut it with `slimming.slim`.

    Args:
        base: the variant to search; a timm VisionTransformer. Its weights fit under the same names.
        head_search: one gate per head instead of one per head and dimension.
        uniform_search: gates per dimension that all heads of a layer share.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: a base that is no such transformer, an image it cannot cut, or both layouts.
    """
    model = _built(base, num_classes, image_size, drop_rate, drop_path_rate)
    return make_searchable(model, head_search, uniform_search)


def slimmed(
    num_classes: int,
    image_size: ImageSize,
    base: str,
    attention: float = 1.0,
    mlp: float = 1.0,
    tokens: float = 1.0,
    mode: str = "exact",
    kept: str | Kept | None = None,
    seed: int = 0,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> VisionTransformer:
    """A network of the shape that budgets leave: `(B, 3, H, W) -> (B, num_classes)`.

    The masks that the authors found were not released, so unless `kept` says which gates are left,
    they are drawn at random under the budgets. How many there are, and with all tokens kept also
    what they cost, does not depend on which; how they spread over heads and layers does.

    Args:
        base: the variant that is cut; a timm VisionTransformer.
        attention, mlp, tokens: budgets in (0, 1].
        mode: what becomes of dropped tokens: exact, drop or masked (see `slimming`).
        kept: kept sets, or their file (YAML), in this directory or by path; then budgets play no
            role.
        seed: of the random choice, whatever the seed of the weights.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: a budget outside (0, 1], an unknown mode, or a base that is no such transformer.
        ReplivitError: the file of kept sets cannot be read.
    """
    model = _built(base, num_classes, image_size, drop_rate, drop_path_rate)
    if kept is not None:
        kept = kept if isinstance(kept, Kept) else read_kept(HERE / str(kept))
        return slim_to(model, kept, mode)
    attn, hidden = model.blocks[0].attn, model.blocks[0].mlp.fc1.out_features
    count = model.patch_embed.num_patches + model.num_prefix_tokens
    layout = constant_scores(len(model.blocks), (attn.num_heads, attn.head_dim), hidden, count)
    return slim_to(model, choose(random_scores(layout, seed), attention, mlp, tokens), mode)


def _built(
    base: str, num_classes: int, image_size: ImageSize, drop_rate: float, drop_path_rate: float
) -> VisionTransformer:
    model = harness.build(
        base, num_classes, image_size, drop_rate=drop_rate, drop_path_rate=drop_path_rate
    )
    check_model(model)
    return model
