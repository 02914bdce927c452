"""Students and the small teacher.

The method changes no network: a student is a plain DeiT, before and after. The teacher of the small
tracks is ours: a transformer of the student's grid, with a convolutional stem.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers import ConvNormAct, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import harness
from harness.patches import ImageSize, patch_grid

#: Of the stem's convolutions; together the strides are those of patches of 4.
STEM_WIDTHS, STEM_STRIDES = (32, 32, 64, 64), (2, 1, 2, 1)


def student(
    num_classes: int,
    image_size: ImageSize,
    base: str,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """A network of the bench under a name of its own: `(B, 3, H, W) -> (B, num_classes)`.

    Args:
        base: the variant that it is.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the authors train without.

    Raises:
        ValueError: an image that the base cannot cut into patches.
    """
    return harness.build(
        base, num_classes, image_size, drop_rate=drop_rate, drop_path_rate=drop_path_rate
    )


class ConvStem(PatchEmbed):
    """3x3 convolutions in place of one projection of 4x4 patches: `(B, 3, H, W) -> (B, N, C)`."""

    def __init__(
        self, embed_dim: int, in_chans: int = 3, widths: Sequence[int] = STEM_WIDTHS, **others: Any
    ) -> None:
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, **others)
        layers = []
        for width, stride in zip(widths, STEM_STRIDES, strict=True):
            layers.append(ConvNormAct(in_chans, width, 3, stride=stride, act_layer=nn.GELU))
            in_chans = width
        self.proj = nn.Sequential(*layers, nn.Conv2d(in_chans, embed_dim, 1))


def teacher_micro(
    num_classes: int,
    image_size: ImageSize,
    embed_dim: int = 64,
    depth: int = 6,
    num_heads: int = 4,
    mlp_ratio: float = 3.0,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> VisionTransformer:
    """A small transformer that learns faster than `vit_micro`, to teach it.

    Patches stand for the same 4x4 pixels, and there is a class token, but a stem of convolutions
    makes them.

    Args:
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: the image does not divide into patches, or the width into heads.
    """
    patch_grid(image_size, 4, "the micro teacher")
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(
            f"the micro teacher: embed_dim {embed_dim} does not divide into {num_heads} heads"
        )
    return VisionTransformer(
        img_size=image_size,
        patch_size=4,
        num_classes=num_classes,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        embed_layer=ConvStem,
        weight_init="jax",  # as vit_micro: the default starts narrow models too slowly
    )
