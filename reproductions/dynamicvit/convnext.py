"""DynamicCNN (journal version): ConvNeXt whose third stage has two speeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from harness.patches import ImageSize, patch_grid
from reproductions.dynamicvit.schedule import Ratios
from reproductions.dynamicvit.two_speed import TwoSpeed, fast_path

#: size -> (depths, widths, default blocks) (official code: AdaConvNeXt, main.py).
SIZES = {
    "t": ((3, 3, 9, 3), (96, 192, 384, 768), (1, 2, 3)),
    "s": ((3, 3, 27, 3), (96, 192, 384, 768), (3, 6, 9)),
    "b": ((3, 3, 27, 3), (128, 256, 512, 1024), (3, 6, 9)),
}
EPS = 1e-6
LAYER_SCALE = 1e-6  # initial


class DynamicConvNeXt(TwoSpeed, ConvNeXt):
    """The depthwise convolution reaches every position; then the MLP or the fast path.

    Args as in `dynamicvit_convnext`; `config` goes to timm's `ConvNeXt`.
    """

    branches_add_to_mix = False

    def __init__(
        self,
        image_size: ImageSize,
        keep_ratio: Ratios,
        pruning_loc: int | Sequence[int],
        **config,
    ) -> None:
        patch_grid(image_size, 32, type(self).__name__)
        super().__init__(norm_eps=EPS, ls_init_value=LAYER_SCALE, **config)
        dim = self.third_stage[0].gamma.numel()
        self.add_predictors(image_size, keep_ratio, pruning_loc, dim, EPS)
        for block in self.two_speed_blocks:
            block.fast_path = fast_path(dim, EPS)
            block.fast_path_gamma = nn.Parameter(torch.full((dim,), LAYER_SCALE))

    @property
    def third_stage(self) -> nn.Sequential:
        return self.stages[2].blocks

    def before(self, images: Tensor) -> Tensor:
        x = self.stages[1](self.stages[0](self.stem(images)))
        return self.stages[2].downsample(x).permute(0, 2, 3, 1)

    def after(self, x: Tensor) -> Tensor:
        return self.norm_pre(self.stages[3](x.permute(0, 3, 1, 2)))

    def plain(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def mix(self, block: nn.Module, x: Tensor) -> Tensor:
        return block.conv_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def slow(self, block: nn.Module, x: Tensor) -> Tensor:
        return block.drop_path(block.gamma * block.mlp(block.norm(x)))

    def fast(self, block: nn.Module, x: Tensor) -> Tensor:
        return block.drop_path(block.fast_path_gamma * block.fast_path(x))

    def describe(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the normalised features `(B, 49, C)`."""
        normalised = self.head.norm(features).flatten(2).transpose(1, 2)
        return self.forward_head(features), normalised

    def dense(self) -> nn.Module:
        blocks = len(self.two_speed_blocks)
        parent = super().dense()
        for block in parent.third_stage[-blocks:] if blocks else ():
            del block.fast_path_gamma
        return parent


def dynamicvit_convnext(
    num_classes: int,
    image_size: ImageSize,
    size: str = "t",
    keep_ratio: Ratios = 0.7,
    pruning_loc: int | Sequence[int] | None = None,
    drop_path_rate: float = 0.0,
) -> DynamicConvNeXt:
    """DynamicCNN on ConvNeXt: `(B, 3, H, W) -> (B, num_classes)`.

    Args:
        size: t, s or b.
        keep_ratio: one ratio r (r, r - 0.2 and r - 0.4 of the positions are slow), or one per
            prediction module.
        pruning_loc: blocks of the third stage before which positions are chosen, from 0; default
            1, 2, 3 (t) or 3, 6, 9; `[]` is the plain ConvNeXt.
        drop_path_rate: stochastic depth of the last block; the authors train with 0.2, b with 0.5.

    Raises:
        ValueError: unknown size, impossible ratio or block; an image size that is no multiple of
            32.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, not {size!r}")
    depths, widths, blocks = SIZES[size]
    return DynamicConvNeXt(
        image_size, keep_ratio, blocks if pruning_loc is None else pruning_loc,
        num_classes=num_classes, depths=depths, dims=widths, drop_path_rate=drop_path_rate,
    )  # fmt: skip
