"""The reference rows: timm's models under our names, and `vit_micro`.

timm is the implementation of record here: nothing is rebuilt. Which of its models stands behind a
row is said in `paper.yaml` (`args: {timm_model: ...}`).
"""

from __future__ import annotations

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from harness.patches import ImageSize, patch_grid


def reference(
    num_classes: int,
    image_size: ImageSize,
    timm_model: str,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """A timm model with random weights: `(B, 3, H, W) -> (B, num_classes)`.

    The distilled DeiTs average the logits of their two heads, also in training mode, unless
    `set_distilled_training(True)` is called; then training mode gives the pair.

    Args:
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: an empty image, or one that a transformer cannot cut into its patches.
    """
    patch_grid(image_size, 1, timm_model)
    needs_size = timm.get_pretrained_cfg(timm_model).fixed_input_size  # transformers do
    model = timm.create_model(
        timm_model,
        num_classes=num_classes,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        **({"img_size": image_size} if needs_size else {}),
    )
    if needs_size:
        patch_grid(image_size, model.patch_embed.patch_size[0], timm_model)
    return model


def vit_micro(
    num_classes: int,
    image_size: ImageSize,
    patch_size: int = 4,
    embed_dim: int = 64,
    depth: int = 6,
    num_heads: int = 4,
    mlp_ratio: float = 3.0,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> VisionTransformer:
    """The plain ViT of the small tracks: pre-norm, class token, learned positions, no frills.

    As it stands, 0.26 M parameters and 19.4 M multiply-adds at 32x32: 64 patches of 4x4 and the
    class token. It is an ordinary `timm` VisionTransformer, so that what works on any of those
    (token pruning, slimming, distillation) works on it.

    Args:
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: the image does not divide into patches, or the width into heads.
    """
    patch_grid(image_size, patch_size, "vit_micro")
    if embed_dim % num_heads:
        raise ValueError(f"vit_micro: embed_dim {embed_dim} does not divide into {num_heads} heads")
    return VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        num_classes=num_classes,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        weight_init="jax",  # Xavier: std 0.02, for wide models, starts a width of 64 too slowly
    )
