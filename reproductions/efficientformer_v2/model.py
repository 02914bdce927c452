"""EfficientFormerV2 (Li et al., ICCV 2023): the network and its published sizes.

Everything stays a map `(B, C, H, W)`. Blocks are local feed-forward networks; the last few of
stages 3 and 4 hold an attention in front, which in stage 3 runs on a strided copy of the map.
Sub-module names are timm's, so its checkpoints load as they are; `convert.py` takes the authors'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from harness.deployment import batch_norm_affine, fold_before
from reproductions.efficientformer_v2.attention import Size
from reproductions.efficientformer_v2.blocks import FFN, AttnFFN, Embedding, Stem
from reproductions.efficientformer_v2.layers import init_feed_forward_


@dataclass(frozen=True)
class Architecture:
    """What the search chooses, and the few sizes that it leaves alone.

    Attributes:
        depths: blocks of each stage.
        widths: channels of each stage.
        expansions: hidden width of each block's feed-forward network, in multiples of the width.
        attention_blocks: how many blocks of stage 3 and of stage 4 are global; they are the last.
        num_heads, attn_ratio: of every attention; values have `attn_ratio * key_dim` channels.
        key_dim: channels of a query per head in a block; the down-sampler has half as many.
        stem_stride: 4, or 2 for images of 32 pixels.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    expansions: tuple[tuple[float, ...], ...]
    attention_blocks: tuple[int, int]
    num_heads: int = 8
    key_dim: int = 32
    attn_ratio: float = 4
    stem_stride: int = 4

    def __post_init__(self) -> None:
        """Accept lists (YAML, command line); raise `ValueError` on sizes that do not fit."""
        for name in ("depths", "widths", "attention_blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "expansions", tuple(map(tuple, self.expansions)))
        if not len(self.depths) == len(self.widths) == len(self.expansions) == 4:
            raise ValueError("depths, widths and expansions each need four stages")
        for stage, (depth, ratios) in enumerate(zip(self.depths, self.expansions, strict=True), 1):
            if len(ratios) != depth:
                raise ValueError(f"stage {stage} has {depth} blocks but {len(ratios)} expansions")
        if len(self.attention_blocks) != 2 or any(
            not 0 <= count <= depth
            for count, depth in zip(self.attention_blocks, self.depths[2:], strict=True)
        ):
            raise ValueError(
                f"attention_blocks {self.attention_blocks} must be two numbers, "
                f"at most the depths {self.depths[2:]} of stages 3 and 4"
            )

    @property
    def size_multiple(self) -> int:
        """Both sides of an image must be a multiple of this, so that every map halves evenly."""
        return 8 * self.stem_stride


def _published(
    depths: Sequence[int],
    widths: Sequence[int],
    attention: int,
    stage3: Sequence[int],
    stage4: Sequence[int],
) -> Architecture:
    """A released size: the expansion is 4 in stages 1 and 2, and in 3 and 4 as listed."""
    early = tuple((4,) * depth for depth in depths[:2])
    return Architecture(depths, widths, (*early, stage3, stage4), (attention, attention))


#: Official code: `EfficientFormer_depth`, `EfficientFormer_width`, `expansion_ratios_*`.
ARCHITECTURES = {
    "s0": _published((2, 2, 6, 4), (32, 48, 96, 176), 2, (4, 3, 3, 3, 4, 4), (4, 3, 3, 4)),
    "s1": _published(
        (3, 3, 9, 6), (32, 48, 120, 224), 2, (4, 4, *[3] * 4, 4, 4, 4), (4, 4, 3, 3, 4, 4)
    ),
    "s2": _published(
        (4, 4, 12, 8), (32, 64, 144, 288), 4, (4, 4, *[3] * 6, *[4] * 4), (4, 4, *[3] * 4, 4, 4)
    ),
    "l": _published(
        (5, 5, 15, 10), (40, 80, 192, 384), 6, (*[4] * 4, *[3] * 7, *[4] * 4),
        (4, 4, 4, *[3] * 4, 4, 4, 4),
    ),
    # ours, for 32x32 images: every ingredient, on maps of 16, 8, 4 and 2 pixels
    "micro": Architecture(
        (1, 2, 3, 2), (32, 48, 80, 112), ((3,), (4, 3), (4, 3, 4), (3, 3)), (1, 1),
        num_heads=4, key_dim=16, attn_ratio=2, stem_stride=2,
    ),
}  # fmt: skip

#: Stochastic depth of the released sizes; none for the others.
DROP_PATH_RATES = {"s2": 0.02, "l": 0.1}


class Stage(nn.Module):
    """Down-sampling (except in the first stage), then the blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class EfficientFormerV2(nn.Module):
    """`(B, 3, H, W) -> (B, num_classes)`.

    There are two classifiers, one for labels and one for a teacher's decisions. In evaluation mode
    the output is their mean; in training mode it is the pair, unless
    `set_distilled_training(False)` was called.

    Args:
        architecture: depths, widths and expansions.
        num_classes: 0 returns the pooled features.
        image_size: side or (height, width); multiples of 32 (of 16 with the small stem).
        distillation: False leaves the teacher's classifier out.
        drop_path_rate: of the last block; rates rise linearly from 0.
        layer_scale_init: 1e-5 in the paper.
        stride_attention: False lets stage 3 attend at full resolution (an ablation of the paper).

    Raises:
        ValueError: the image size does not fit (the message names sizes that do).
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int = 1000,
        image_size: int | Size = 224,
        *,
        distillation: bool = True,
        drop_path_rate: float = 0.0,
        layer_scale_init: float = 1e-5,
        stride_attention: bool = True,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.image_size = self._checked(image_size)
        self.num_classes = num_classes
        self.distillation = distillation
        self.distilled_training = True
        self.num_features = self.head_hidden_size = architecture.widths[-1]
        arch = architecture

        self.stem = Stem(arch.widths[0], arch.stem_stride)
        heads = {"num_heads": arch.num_heads, "attn_ratio": arch.attn_ratio}
        size = tuple(side // arch.stem_stride for side in self.image_size)
        stages = []
        for stage, (depth, dim) in enumerate(zip(arch.depths, arch.widths, strict=True)):
            downsample: nn.Module = nn.Identity()
            if stage > 0:
                dual = {"key_dim": arch.key_dim // 2, **heads} if stage == 3 else {}
                downsample = Embedding(
                    arch.widths[stage - 1], dim, size, dual_path=stage == 3, **dual
                )
                size = tuple(side // 2 for side in size)
            before = sum(arch.depths[:stage])
            first_global = depth - arch.attention_blocks[stage - 2] if stage >= 2 else depth
            blocks = []
            for block in range(depth):
                common = {
                    "mlp_ratio": arch.expansions[stage][block],
                    "drop_path": drop_path_rate * (before + block) / (sum(arch.depths) - 1),
                    "layer_scale_init": layer_scale_init,
                }
                if block < first_global:
                    blocks.append(FFN(dim, **common))
                    continue
                stride = 2 if stage == 2 and stride_attention else 1
                blocks.append(
                    AttnFFN(dim, size, stride=stride, key_dim=arch.key_dim, **heads, **common)
                )
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = nn.BatchNorm2d(self.num_features)
        self.reset_classifier(num_classes)

    def _checked(self, image_size: int | Size) -> Size:
        size = tuple(int(side) for side in to_2tuple(image_size))
        multiple = self.architecture.size_multiple
        if len(size) != 2 or any(side <= 0 or side % multiple for side in size):
            below = max(min(size) // multiple, 1) * multiple
            raise ValueError(
                f"image size {'x'.join(map(str, size))} does not work: the maps must halve evenly, "
                f"so each side must be a multiple of {multiple} (such as {below} or "
                f"{below + multiple})"
            )
        return size

    def reset_classifier(self, num_classes: int) -> None:
        """New classifiers for `num_classes`; 0 removes them."""
        self.num_classes = num_classes
        weight = self.stem.conv1.conv.weight
        for name in ("head", "head_dist") if self.distillation else ("head",):
            head: nn.Module = nn.Identity()
            if num_classes > 0:
                head = nn.Linear(
                    self.num_features, num_classes, device=weight.device, dtype=weight.dtype
                )
                init_feed_forward_(head)
            setattr(self, name, head)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The classifiers: for labels and, with distillation, for a teacher."""
        return (self.head, self.head_dist) if self.distillation else (self.head,)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether training mode returns both classifiers' outputs, or their mean."""
        self.distilled_training = enable

    def _checked_input(self, x: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` of the right size, in the memory format that suits the device."""
        if not torch.jit.is_tracing() and tuple(x.shape[-2:]) != self.image_size:
            raise ValueError(
                f"this model was built for images of {self.image_size[0]}x{self.image_size[1]}, "
                f"not {x.shape[-2]}x{x.shape[-1]}; build it with image_size="
            )
        if x.device.type == "cpu":  # depthwise convolutions are several times as fast so
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, 3, H, W) -> (B, C4, H / 32, W / 32)`, normalised."""
        return self.norm(self.stages(self.stem(self._checked_input(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Average pool and classify: `(B, C4, h, w) -> (B, num_classes)`."""
        x = x.mean(dim=(2, 3))
        if pre_logits or self.num_classes == 0:
            return x
        if not self.distillation:
            return self.head(x)
        both = self.head(x), self.head_dist(x)
        if self.training and self.distilled_training:
            return both
        return (both[0] + both[1]) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def deploy_(self) -> None:
        """One classifier: the mean of both, with the final norm folded in."""
        if isinstance(self.norm, nn.Identity) or self.num_classes == 0:
            return
        if self.distillation:
            self.head.weight.add_(self.head_dist.weight).div_(2)
            self.head.bias.add_(self.head_dist.bias).div_(2)
            self.distillation = False
            del self.head_dist
        fold_before(self.head, *batch_norm_affine(self.norm))
        self.norm = nn.Identity()


def efficientformer_v2(
    num_classes: int = 1000,
    image_size: int | Size = 224,
    *,
    size: str = "s0",
    architecture: dict[str, Any] | Architecture | None = None,
    distillation: bool = True,
    drop_path_rate: float | None = None,
    layer_scale_init: float = 1e-5,
    stride_attention: bool = True,
) -> EfficientFormerV2:
    """Build a size of the paper, or any `architecture` (such as one that the search found).

    `drop_path_rate=None` takes the released size's own. Errors as in `EfficientFormerV2`.
    """
    if architecture is None:
        if size not in ARCHITECTURES:
            raise ValueError(f"no size {size!r}; there are {', '.join(ARCHITECTURES)}")
        architecture = ARCHITECTURES[size]
        drop_path_rate = (
            DROP_PATH_RATES.get(size, 0.0) if drop_path_rate is None else drop_path_rate
        )
    elif isinstance(architecture, dict):
        architecture = Architecture(**architecture)
    return EfficientFormerV2(
        architecture,
        num_classes,
        image_size,
        distillation=distillation,
        drop_path_rate=drop_path_rate or 0.0,
        layer_scale_init=layer_scale_init,
        stride_attention=stride_attention,
    )
