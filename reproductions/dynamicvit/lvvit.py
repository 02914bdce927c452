"""DynamicViT on LV-ViT: a convolutional stem, halved residuals, and a classifier on every token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from harness.patches import ImageSize
from reproductions.dynamicvit.model import DynamicViT
from reproductions.dynamicvit.predictor import Scorer
from reproductions.dynamicvit.schedule import Ratios

#: size -> (width, heads, depth); MLP ratio 3 (official code: LVViTDiffPruning).
SIZES = {"s": (384, 6, 16), "m": (512, 8, 20)}


class ConvStem(nn.Module):
    """Three convolutions at half resolution, then patches (official code: `PatchEmbed4_2`).

    Raises:
        ValueError: an image of another size than the network is built for.
    """

    def __init__(self, image_size: ImageSize, patch_size: int, dim: int, width: int = 64) -> None:
        super().__init__()
        square = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = tuple(square)
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.proj = nn.Conv2d(width, dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` to tokens `(B, N, C)`."""
        if tuple(x.shape[-2:]) != self.image_size:
            raise ValueError(
                f"the network is built for images of {self.image_size}, not {tuple(x.shape[-2:])}"
            )
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        x = self.act(self.bn3(self.conv3(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class DynamicLVViT(DynamicViT):
    """DynamicViT whose answer is the class token's plus half the best of the patches' (LV-ViT).

    Training uses the class token's logits for the classification losses, and the patches' logits
    as the features that are distilled.
    """

    feature_loss = "kl"

    def __init__(self, num_classes: int, *args, embed_dim: int, **kwargs) -> None:
        super().__init__(
            num_classes, *args, embed_dim=embed_dim, mlp_ratio=3.0, qkv_bias=False, norm_eps=1e-5,
            residual_scale=0.5, embed=ConvStem, **kwargs,
        )  # fmt: skip
        self.aux_head = self._classifier()
        if num_classes > 0:
            nn.init.trunc_normal_(self.aux_head.weight, std=0.02)
            nn.init.zeros_(self.aux_head.bias)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New, untrained classifiers; 0 classes leave the features."""
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = self._classifier()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `(B, K)` of `forward_features`' tokens, or the class token `(B, C)`."""
        if pre_logits:
            return x[:, 0]
        return self.head(x[:, 0]) + 0.5 * self.aux_head(x[:, 1:]).amax(dim=1)

    def describe(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The class token's logits, and the patches' logits for the distillation."""
        return self.head(features[:, 0]), self.aux_head(features[:, 1:])

    def deploy_(self) -> None:
        """Nothing to fold: the classifier reads every token of the last block."""


def dynamicvit_lvvit(
    num_classes: int,
    image_size: ImageSize,
    size: str = "s",
    keep_ratio: Ratios = 0.7,
    pruning_loc: int | Sequence[int] | None = None,
    drop_path_rate: float = 0.0,
    scorer: Scorer = "predictor",
) -> DynamicLVViT:
    """DynamicViT on LV-ViT: `(B, 3, H, W) -> (B, num_classes)`.

    Args:
        size: s (16 blocks) or m (20 blocks).
        keep_ratio: one ratio r (stages keep r, r^2, r^3, ... of all patches), or one per stage.
        pruning_loc: blocks before which patches are dropped, from 0; default a quarter, a half and
            three quarters of the depth; `[]` is the dense LV-ViT.
        drop_path_rate: stochastic depth of the last block.
        scorer: predictor, random or attention.

    Raises:
        ValueError: unknown size, impossible ratio, block or image size.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, not {size!r}")
    width, heads, depth = SIZES[size]
    if pruning_loc is None:
        pruning_loc = (depth // 4, depth // 2, 3 * depth // 4)
    return DynamicLVViT(
        num_classes, image_size, keep_ratio, pruning_loc, embed_dim=width, num_heads=heads,
        depth=depth, drop_path_rate=drop_path_rate, scorer=scorer,
    )  # fmt: skip
