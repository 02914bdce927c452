"""DynamicSwin (journal version): Swin whose third stage has two speeds."""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from harness.patches import ImageSize, patch_grid
from reproductions.dynamicvit.schedule import Ratios
from reproductions.dynamicvit.two_speed import TwoSpeed, fast_path

#: size -> (width, depths, heads, default blocks) (official code: AdaSwinTransformer, main.py).
SIZES = {
    "t": (96, (2, 2, 6, 2), (3, 6, 12, 24), (1, 2, 3)),
    "s": (96, (2, 2, 18, 2), (3, 6, 12, 24), (2, 4, 6)),
    "b": (128, (2, 2, 18, 2), (4, 8, 16, 32), (2, 4, 6)),
}
EPS = 1e-5


class DynamicSwin(TwoSpeed, SwinTransformer):
    """Attention in windows reaches every position; then the MLP or the fast path.

    Args as in `dynamicvit_swin`; `config` goes to timm's `SwinTransformer`.
    """

    branches_add_to_mix = True

    def __init__(
        self,
        image_size: ImageSize,
        keep_ratio: Ratios,
        pruning_loc: int | Sequence[int],
        **config,
    ) -> None:
        patch_grid(image_size, 32, type(self).__name__)
        super().__init__(img_size=image_size, window_size=7, **config)
        dim = self.third_stage[0].dim
        self.add_predictors(image_size, keep_ratio, pruning_loc, dim, EPS)
        for block in self.two_speed_blocks:
            block.fast_path = fast_path(dim, EPS)

    @property
    def third_stage(self) -> nn.Sequential:
        return self.layers[2].blocks

    def before(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        return self.layers[2].downsample(self.layers[1](self.layers[0](x)))

    def after(self, x: Tensor) -> Tensor:
        return self.norm(self.layers[3](x))

    def plain(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    def mix(self, block: nn.Module, x: Tensor) -> Tensor:
        return x + block.drop_path1(block._attn(block.norm1(x)))

    def slow(self, block: nn.Module, x: Tensor) -> Tensor:
        return block.drop_path2(block.mlp(block.norm2(x)))

    def fast(self, block: nn.Module, x: Tensor) -> Tensor:
        return block.drop_path2(block.fast_path(x))

    def describe(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the normalised features `(B, 49, C)`."""
        return self.forward_head(features), features.flatten(1, 2)


def dynamicvit_swin(
    num_classes: int,
    image_size: ImageSize,
    size: str = "t",
    keep_ratio: Ratios = 0.7,
    pruning_loc: int | Sequence[int] | None = None,
    drop_path_rate: float = 0.0,
) -> DynamicSwin:
    """DynamicSwin: `(B, 3, H, W) -> (B, num_classes)`.

    Args:
        size: t, s or b.
        keep_ratio: one ratio r (r, r - 0.2 and r - 0.4 of the positions are slow), or one per
            prediction module.
        pruning_loc: blocks of the third stage before which positions are chosen, from 0; default
            1, 2, 3 (t) or 2, 4, 6; `[]` is the plain Swin.
        drop_path_rate: stochastic depth of the last block; the authors train with 0.2, b with 0.5.

    Raises:
        ValueError: unknown size, impossible ratio or block; an image size that is no multiple of
            32.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, not {size!r}")
    width, depths, heads, blocks = SIZES[size]
    return DynamicSwin(
        image_size, keep_ratio, blocks if pruning_loc is None else pruning_loc,
        num_classes=num_classes, embed_dim=width, depths=depths, num_heads=heads,
        drop_path_rate=drop_path_rate,
    )  # fmt: skip
