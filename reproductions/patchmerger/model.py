"""Networks with mergers: any timm ViT of the bench, and the paper's layout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import harness
from harness.patches import ImageSize, patch_grid
from reproductions.patchmerger.insertion import check_model, insert_merger

#: Output tokens of the paper's main experiments.
NUM_OUTPUTS = 8


def merged(
    num_classes: int,
    image_size: ImageSize,
    base: str,
    layers: int | Sequence[int] | None = None,
    num_outputs: int | Sequence[int] | None = None,
    keep_ratio: float | None = None,
    norm: bool = True,
    scale: bool = False,
    init_std: float | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> VisionTransformer:
    """A vision transformer of the bench with mergers: `(B, 3, H, W) -> (B, num_classes)`.

    By default one merger with 8 outputs in the middle, as in the paper. With `keep_ratio` r, three
    mergers after each quarter of the depth leave r, r^2 and r^3 of the patches (official code of
    the comparison in *Which Tokens to Use?*: `PatchMergerVisionTransformer`). The class token
    bypasses them and is what the classifier reads.

    Args:
        base: variant to put mergers into; a timm VisionTransformer.
        layers: the blocks (from 0) that mergers stand before.
        num_outputs: tokens that leave each merger, class token not counted.
        keep_ratio: instead of `num_outputs`, in (0, 1].
        norm, scale, init_std: of `PatchMerger`.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: an image the base cannot cut, a base that is no such transformer, a block that
            does not exist, fewer than one output, or a keep ratio outside (0, 1].
    """
    model = harness.build(
        base, num_classes, image_size, drop_rate=drop_rate, drop_path_rate=drop_path_rate
    )
    check_model(model)
    if layers is None:
        layers = spread_layers(len(model.blocks), 1 if keep_ratio is None else 3)
    if keep_ratio is not None:
        if num_outputs is not None:
            raise ValueError("give num_outputs or keep_ratio, not both")
        stages = len(layers) if isinstance(layers, Sequence) else 1
        num_outputs = kept(keep_ratio, model.patch_embed.num_patches, stages)
    return insert_merger(
        model, layers, NUM_OUTPUTS if num_outputs is None else num_outputs,
        norm=norm, scale=scale, init_std=init_std,
    )  # fmt: skip


def spread_layers(depth: int, count: int) -> list[int]:
    """`count` layers at equal distances: one is the middle, three are the quarters."""
    return [depth * (number + 1) // (count + 1) for number in range(count)]


def kept(keep_ratio: float, num_patches: int, stages: int) -> list[int]:
    """Tokens after each of several stages: `keep_ratio ** s` of the patches, rounded down.

    Raises:
        ValueError: the ratio is outside (0, 1], or so small that nothing is left.
    """
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, Real) or not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must lie in (0, 1], not {keep_ratio!r}")
    counts = [int(num_patches * keep_ratio ** (stage + 1)) for stage in range(stages)]
    if 0 in counts:
        raise ValueError(
            f"keep_ratio {keep_ratio} leaves none of {num_patches} patches after {stages} mergers; "
            f"the least is {num_patches ** (-1 / stages):.3f}"
        )
    return counts


class NormedPatchEmbed(PatchEmbed):
    """Patches as vectors, normalised before and after their projection.

    Official code: none; vit-pytorch `ViT.to_patch_embedding`. A patch's vector runs over rows, then
    columns, then colours.
    """

    def __init__(
        self, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768, **others: Any
    ):
        norm = partial(nn.LayerNorm, eps=1e-5)
        super().__init__(
            patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, norm_layer=norm, **others
        )
        pixels = in_chans * patch_size**2
        self.norm_pixels = norm(pixels)
        self.proj = nn.Linear(pixels, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 3, H, W) -> (B, N, C)`."""
        height, width = self.patch_size
        x = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, 3, rows, h, columns, w)
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return self.norm(self.proj(self.norm_pixels(x)))


class PooledViT(VisionTransformer):
    """A ViT without class token that classifies the mean of its last tokens.

    Official code: none; vit-pytorch `vit_with_patch_merger.ViT`, with its position table: one row
    more than there are patches, never read.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            global_pool="avg", class_token=False, fc_norm=False, qkv_bias=False,
            norm_layer=partial(nn.LayerNorm, eps=1e-5), embed_layer=NormedPatchEmbed, **options,
        )  # fmt: skip
        rows = self.patch_embed.num_patches + 1
        self.pos_embed = nn.Parameter(torch.empty(1, rows, self.embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def _pos_embed(self, x: Tensor) -> Tensor:
        return self.pos_drop(x + self.pos_embed[:, : x.shape[1]])


def pooled_vit(
    num_classes: int,
    image_size: ImageSize,
    embed_dim: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    mlp_ratio: float = 4.0,
    patch_size: int = 16,
    layers: int | Sequence[int] | None = None,
    num_outputs: int | Sequence[int] = NUM_OUTPUTS,
    norm: bool = True,
    scale: bool = True,
    init_std: float | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> PooledViT:
    """The layout nearest to the paper's that can be run: no class token, scaled scores.

    `layers=()` gives the dense parent. Arguments as in `merged`.

    Raises:
        ValueError: sides that do not divide into patches, a block that does not exist, or fewer
            than one output.
    """
    patch_grid(image_size, patch_size, "PatchMerger's ViT")
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim {embed_dim} does not divide into {num_heads} heads")
    model = PooledViT(
        img_size=image_size, patch_size=patch_size, num_classes=num_classes, embed_dim=embed_dim,
        depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
    )  # fmt: skip
    layers = spread_layers(depth, 1) if layers is None else layers
    return insert_merger(model, layers, num_outputs, norm=norm, scale=scale, init_std=init_std)
