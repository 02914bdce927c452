"""UniNet (Liu et al., ECCV 2022): stages of one operator each, with a chosen module between two.

stem -> stage 0 -> DSM -> stage 1 -> ... -> DSM -> stage 5 -> head. What the paper searches for is
an `Architecture`; the seven published networks are a table of them. This is the paper of arXiv
2207.05420; a withdrawn one of the same title (2110.04035) has other networks under these names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil, isfinite
from typing import Any

import torch
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from harness.deployment import fold_batch_norms
from reproductions.uninet.blocks import AttentionBlock, ConvBlock, DWConvBlock, MlpBlock
from reproductions.uninet.downsampling import (
    GlobalDSM,
    LocalDSM,
    LocalGlobalDSM,
    PoolDSM,
    StridedDSM,
)
from reproductions.uninet.layers import (
    OverwritingGELU,
    Size,
    SqueezeExcite,
    pack_pointwise,
)

#: Operators by name. `dw` (MBConv) and `attn` are released; `conv` and `mlp` are ours.
OPERATORS = {"dw": DWConvBlock, "attn": AttentionBlock, "conv": ConvBlock, "mlp": MlpBlock}
#: Down-sampling modules by name. `l` and `lg` are released; the others are ours.
DOWNSAMPLERS = {
    "l": LocalDSM, "lg": LocalGlobalDSM, "g": GlobalDSM, "strided": StridedDSM, "pool": PoolDSM,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A network, stage by stage.

    Attributes:
        block_ops: the operator of each stage, of `OPERATORS`.
        ds_ops: the module before each stage but the first, of `DOWNSAMPLERS`.
        repeats, channels, expansion: blocks of each stage, their width, and the width inside them
            in multiples of it.
        strides: of the modules; that of stage 0, which has none, is not used.
        stem_dim: channels after the stem, which halves the image.
        final_head_dim: channels that are pooled and classified.
        head_dim: channels of an attention head.

    Raises:
        ValueError: stages do not fit together, or a name or size is impossible.
    """

    block_ops: tuple[str, ...] = ("dw", "dw", "dw", "dw", "attn", "attn")
    ds_ops: tuple[str, ...] = ("l", "l", "l", "lg", "lg")
    repeats: tuple[int, ...] = (1, 2, 4, 4, 4, 8)
    channels: tuple[int, ...] = (24, 48, 80, 128, 128, 256)
    expansion: tuple[float, ...] = (1, 4, 6, 3, 2, 5)
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2)
    stem_dim: int = 32
    final_head_dim: int = 1280
    head_dim: int = 32

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, one.name, tuple(value))  # lists of YAML, command line
        for name in ("block_ops", "ds_ops"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name} must be a list of names, not {getattr(self, name)!r}")
        stages = len(self.block_ops)
        for name in ("repeats", "channels", "expansion", "strides"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != stages:
                raise ValueError(f"{name} must have one entry per operator ({stages}): {values}")
            if any(not _is_size(one, whole=name != "expansion") for one in values):
                raise ValueError(f"{name} must be positive numbers, not {values}")
        for name in ("stem_dim", "final_head_dim", "head_dim"):
            if not _is_size(getattr(self, name)):
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        if len(self.ds_ops) != stages - 1:
            raise ValueError(
                f"{stages} stages have {stages - 1} down-sampling modules between them, "
                f"not {len(self.ds_ops)}"
            )
        for what, names, known in (
            ("operator", self.block_ops, OPERATORS),
            ("down-sampling module", self.ds_ops, DOWNSAMPLERS),
        ):
            for name in names:
                if not isinstance(name, str) or name not in known:
                    raise ValueError(f"no {what} {name!r}; there are {', '.join(known)}")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as options of the builder and records keep them."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {key: list(one) if isinstance(one, tuple) else one for key, one in found.items()}

    def grids(self, image_size: Size) -> list[Size]:
        """Height and width of each stage's map."""
        size = tuple(ceil(side / 2) for side in image_size)
        grids = []
        for stage, stride in enumerate(self.strides):
            size = tuple(ceil(side / stride) for side in size) if stage else size
            grids.append(size)
        return grids


def _is_size(value: Any, whole: bool = True) -> bool:
    return _is_number(value) and value > 0 and (isinstance(value, int) or not whole)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


_BASE = Architecture()
#: Published networks. The code's comments give 320 pixels to b5 and b6, but it builds 384 and 448.
ARCHITECTURES = {
    "b0": _BASE,  # 160 pixels
    "b1": _BASE,  # 224
    "b2": replace(_BASE, repeats=(2, 3, 6, 6, 6, 12)),  # 256
    "b3": replace(  # 288
        _BASE, repeats=(2, 3, 7, 7, 7, 14), channels=(24, 56, 96, 160, 160, 288)
    ),
    "b4": replace(  # 320
        _BASE, repeats=(2, 4, 9, 9, 9, 18), channels=(32, 64, 112, 192, 192, 352)
    ),
    "b5": replace(  # 384
        _BASE, repeats=(3, 5, 10, 10, 10, 20), channels=(32, 64, 112, 224, 224, 448)
    ),
    "b6": replace(  # 448
        _BASE, repeats=(4, 6, 12, 12, 12, 24), channels=(48, 96, 160, 256, 256, 512)
    ),
    # ours, for 32 x 32 images: the found pattern in four stages
    "micro": Architecture(
        block_ops=("dw", "dw", "attn", "attn"), ds_ops=("l", "lg", "lg"), repeats=(1, 2, 2, 2),
        channels=(24, 48, 64, 96), expansion=(1, 3, 2, 3), strides=(1, 2, 1, 2), stem_dim=24,
        final_head_dim=256,
    ),
}  # fmt: skip


class UniNet(nn.Module):
    """Classifier `(B, 3, H, W) -> (B, num_classes)`; maps of any size and aspect. With 0 classes
    it gives what would be classified, `(B, C)`.

    Only the MLP operator ties a network to `image_size`.

    Args:
        init_values: where layer scales start (1e-6 in the paper); -1 for none, in which case
            convolution blocks do not start as their residual either.
        drop_path_rate: of the last block; it rises linearly from 0 over all blocks.
        drop_rate: of the dropout before the classifier.

    Raises:
        ValueError: a size that cannot be built, an empty image, or a rate that is none.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int = 1000,
        image_size: int | Size = 224,
        *,
        init_values: float = 1e-6,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        arch = self.architecture = architecture
        self.image_size = tuple(to_2tuple(image_size))
        if min(self.image_size) < 1:
            raise ValueError(f"image_size must be positive, not {image_size}")
        for name, value in (
            ("init_values", init_values),
            ("drop_path_rate", drop_path_rate),
            ("drop_rate", drop_rate),
        ):
            if not _is_number(value):
                raise ValueError(f"{name} must be a number, not {value!r}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must lie in [0, 1), not {drop_path_rate}")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = arch.final_head_dim
        self.stem = nn.Sequential(
            nn.Conv2d(3, arch.stem_dim, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(arch.stem_dim),
            OverwritingGELU(),
        )
        count = sum(arch.repeats)
        rates = [drop_path_rate * index / max(count - 1, 1) for index in range(count)]
        grids, dim, blocks = arch.grids(self.image_size), arch.stem_dim, []
        for stage, operator in enumerate(arch.block_ops):
            out_dim = arch.channels[stage]
            if stage:
                downsample = DOWNSAMPLERS[arch.ds_ops[stage - 1]]
                blocks.append(downsample(dim, out_dim, arch.strides[stage], head_dim=arch.head_dim))
                dim = out_dim
            for _ in range(arch.repeats[stage]):
                blocks.append(
                    OPERATORS[operator](
                        dim, out_dim, arch.expansion[stage], head_dim=arch.head_dim,
                        drop_path=rates.pop(0), init_values=init_values, grid=grids[stage],
                    )
                )  # fmt: skip
                dim = out_dim
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            nn.Conv2d(dim, arch.final_head_dim, 1, bias=False),
            nn.BatchNorm2d(arch.final_head_dim),
            OverwritingGELU(),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(drop_rate)
        self.classifier = self._classifier()
        self._init_linear(self)

    def _classifier(self) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes) if self.num_classes else nn.Identity()

    @staticmethod
    def _init_linear(module: nn.Module) -> None:
        """Truncated normal of 0.02 and zero bias, but for what the authors write as convolution."""
        if isinstance(module, SqueezeExcite):
            return
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        for child in module.children():
            UniNet._init_linear(child)

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier for `num_classes`; 0 removes it."""
        self.num_classes = num_classes
        self.classifier = self._classifier().to(self.head[0].weight)
        self._init_linear(self.classifier)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.classifier

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, 3, H, W) -> (B, C, H / 32, W / 32)`, what the last block returns."""
        # In evaluation 1x1 and depthwise convolutions are several times as fast channels-last. In
        # training torch sums such a map's statistics one value after the other, which in float32
        # costs a digit.
        if x.device.type == "cpu" and not self.training:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.blocks(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """1x1 convolution, average pool and classifier: `(B, C, h, w) -> (B, num_classes)`."""
        x = self.drop(self.pool(self.head(x)).flatten(1))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def deploy_(self) -> None:
        """Fold the norms, then run 1x1 convolutions as linear layers with packed weights."""
        images = torch.zeros(1, 3, *self.image_size, dtype=self.stem[0].weight.dtype)
        fold_batch_norms(self, [images])
        pack_pointwise(self)


def uninet(
    num_classes: int = 1000,
    image_size: int | Size = 224,
    *,
    size: str = "b1",
    architecture: Mapping[str, Any] | Architecture | None = None,
    block_ops: Sequence[str] | None = None,
    ds_ops: Sequence[str] | None = None,
    repeats: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    expansion: Sequence[float] | None = None,
    strides: Sequence[int] | None = None,
    stem_dim: int | None = None,
    final_head_dim: int | None = None,
    head_dim: int | None = None,
    init_values: float = 1e-6,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
) -> UniNet:
    """Build a published size, one with single fields changed, or any `architecture`.

    The fields are those of `Architecture`; errors as there and in `UniNet`.
    """
    if not isinstance(size, str) or size not in ARCHITECTURES:
        raise ValueError(f"no size {size!r}; there are {', '.join(ARCHITECTURES)}")
    if architecture is None:
        architecture = ARCHITECTURES[size]
    elif not isinstance(architecture, Architecture):
        known = [one.name for one in fields(Architecture)]
        if not isinstance(architecture, Mapping) or not set(architecture) <= set(known):
            raise ValueError(f"an architecture has {', '.join(known)}, not {architecture!r}")
        architecture = Architecture(**architecture)
    changes = {
        "block_ops": block_ops, "ds_ops": ds_ops, "repeats": repeats, "channels": channels,
        "expansion": expansion, "strides": strides, "stem_dim": stem_dim,
        "final_head_dim": final_head_dim, "head_dim": head_dim,
    }  # fmt: skip
    architecture = replace(
        architecture, **{key: value for key, value in changes.items() if value is not None}
    )
    return UniNet(
        architecture, num_classes, image_size, init_values=init_values,
        drop_path_rate=drop_path_rate, drop_rate=drop_rate,
    )  # fmt: skip
