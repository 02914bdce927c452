"""SepViT (Li et al., arXiv 2203.15380): the network, its sizes, and the pyramid for dense tasks.

Four stages, each an overlapping patch embedding and blocks; a convolutional position encoder stands
behind the first block of a stage. No class token, no tables of positions. Maps are `(B, H, W, C)`.
Sub-modules have the authors' names, so that their checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

from harness.deployment import fold_before
from harness.patches import ImageSize
from reproductions.sepvit.block import BlockOptions, SepViTBlock
from reproductions.sepvit.layers import PatchEmbed, PositionEncoder, init_weights_
from reproductions.sepvit.windows import Windows


@dataclass(frozen=True)
class Architecture:
    """Sizes of a network, by stage; every field is an option of the builder.

    Attributes:
        windows: side of the windows of a stage's blocks, repeated over its depth: (7, 14) is a
            block with windows of 7x7 tokens, then one of grouped attention, and so on.
        stem_kernel, stem_stride: of the first patch embedding; the others are 3 and 2.
        native: side in pixels of the square images that the windows were chosen for.
        drop_path_rate: stochastic depth of the last block; rates rise linearly from 0.
        init_std: of linear layers' weights at the start.
    """

    embed_dims: Sequence[int]
    num_heads: Sequence[int]
    depths: Sequence[int]
    windows: Sequence[Sequence[int]] = ((7,), (7, 14), (7, 14), (7,))
    mlp_ratio: float = 4.0
    stem_kernel: int = 7
    stem_stride: int = 4
    native: int = 224
    drop_path_rate: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        """Accept lists (YAML, command line); raise `ValueError` on sizes that do not fit."""
        for name in ("embed_dims", "num_heads", "depths"):
            object.__setattr__(self, name, _whole_numbers(name, getattr(self, name)))
        if not isinstance(self.windows, Iterable):
            raise ValueError(f"windows must be a list of sides for each stage, not {self.windows}")
        windows = tuple(_whole_numbers("windows of a stage", one) for one in self.windows)
        object.__setattr__(self, "windows", windows)
        stages = {
            name: len(getattr(self, name))
            for name in ("embed_dims", "num_heads", "depths", "windows")
        }
        if len(set(stages.values())) > 1:
            given = ", ".join(f"{count} {name}" for name, count in stages.items())
            raise ValueError(f"stages do not agree: {given}")
        _whole_numbers("stem_kernel and stem_stride", (self.stem_kernel, self.stem_stride))
        for name in ("mlp_ratio", "init_std"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not value > 0:
                raise ValueError(f"{name} must be positive, not {value!r}")
        rate = self.drop_path_rate
        if not isinstance(rate, Real) or not 0 <= rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), not {rate!r}")

    def sides(self, stage: int) -> tuple[int, ...]:
        """Side of the windows of each block of a stage."""
        pattern = self.windows[stage]
        return tuple(pattern[block % len(pattern)] for block in range(self.depths[stage]))

    def maps(self, image_size: ImageSize) -> list[tuple[int, int]]:
        """Height and width of each stage's map.

        Raises:
            ValueError: an image that is no image, or too small for the stem.
        """
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        least = self.stem_kernel if self.stem_kernel in (4, 2) else 1
        if len(size) != 2 or min(size) < least:
            raise ValueError(
                f"SepViT takes images of at least {least}x{least} pixels, not {image_size}"
            )
        maps = []
        for stage in range(len(self.depths)):
            kernel, stride = (3, 2) if stage else (self.stem_kernel, self.stem_stride)
            around = 0 if kernel in (4, 2) else 2 * (kernel // 2)
            size = tuple((side + around - kernel) // stride + 1 for side in size)
            maps.append(size)
        return maps

    def window_counts(self, image_size: ImageSize) -> list[list[int]]:
        """Number of windows of each block, by stage.

        An image that the released network takes, whose counts are those of the native size, is
        treated as there: a block that has one window then attends to the whole map, also to that
        of a rectangle. For all others the counts follow from the maps.
        """
        native, wanted = self.maps(self.native), self.maps(image_size)
        released = [
            [Windows.of_side(*found, side).count for side in self.sides(stage)]
            for stage, found in enumerate(native)
        ]
        as_released = all(
            count == 1 or Windows.of_side(*found, side).fits(count)
            for stage, found in enumerate(wanted)
            for side, count in zip(self.sides(stage), released[stage], strict=True)
        )
        if as_released:
            return released
        return [
            [Windows.of_side(*found, side).count for side in self.sides(stage)]
            for stage, found in enumerate(wanted)
        ]


def _whole_numbers(name: str, given: Any) -> tuple[int, ...]:
    values = tuple(given) if isinstance(given, Iterable) else ()
    if not values or any(not isinstance(one, Integral) or one < 1 for one in values):
        raise ValueError(f"{name} must be positive whole numbers, not {given!r}")
    return values


#: The released sizes (official code: `SepViT_Lite` ...) and one for 32x32 images. The rates of
#: stochastic depth are those of the README (T) and of the dense backbones (S, B).
ARCHITECTURES = {
    "lite": Architecture((32, 64, 128, 256), (1, 2, 4, 8), (1, 2, 6, 2)),
    "tiny": Architecture((96, 192, 384, 768), (3, 6, 12, 24), (1, 2, 6, 2), drop_path_rate=0.2),
    "small": Architecture((96, 192, 384, 768), (3, 6, 12, 24), (1, 2, 14, 2), drop_path_rate=0.3),
    "base": Architecture((128, 256, 512, 1024), (4, 8, 16, 32), (1, 2, 14, 2), drop_path_rate=0.5),
    # ours: stages 2 to 4 of the published network with their 16/4, 4/1 and 1 windows. Such narrow
    # layers start near Xavier's deviation; the released 0.02 is one for wide layers.
    "micro": Architecture(
        (32, 64, 96), (1, 2, 3), (2, 2, 1), windows=((4, 8), (4, 8), (4,)), stem_kernel=3,
        stem_stride=2, native=32, init_std=0.08,
    ),
}  # fmt: skip


class Stages(nn.Module):
    """What classifier and pyramid share.

    Args:
        window_counts: of each block, by stage; None for the dense form (`SepViTBlock`).
    """

    def __init__(
        self,
        architecture: Architecture,
        window_counts: list[list[int]] | None,
        options: BlockOptions,
    ) -> None:
        super().__init__()
        arch = self.architecture = architecture
        dims = arch.embed_dims
        rates = torch.linspace(0, arch.drop_path_rate, sum(arch.depths), device="cpu").tolist()
        self.patch_embeds, self.pos_block = nn.ModuleList(), nn.ModuleList()
        self.blocks = nn.ModuleList()
        self.pos_drop = nn.Dropout(options.drop_rate)
        for stage, depth in enumerate(arch.depths):
            before = sum(arch.depths[:stage])
            embed = (dims[stage - 1], dims[stage], 3, 2)
            if stage == 0:
                embed = (3, dims[0], arch.stem_kernel, arch.stem_stride)
            self.patch_embeds.append(PatchEmbed(*embed))
            self.pos_block.append(PositionEncoder(dims[stage]))
            self.blocks.append(
                nn.ModuleList(
                    SepViTBlock(
                        dims[stage], arch.num_heads[stage], side,
                        window_counts[stage][block] if window_counts else None,
                        mlp_ratio=arch.mlp_ratio, drop_path=rates[before + block],
                        shift=side // 2 if options.shift and block % 2 else 0, options=options,
                    )
                    for block, side in zip(range(depth), arch.sides(stage), strict=True)
                )
            )  # fmt: skip

    def stage_maps(self, images: Tensor, norms: nn.ModuleList | None = None) -> Iterator[Tensor]:
        """`(B, 3, H, W)` -> the map `(B, h, w, C)` that leaves each stage, behind its norm."""
        # the layout in which convolutions are fastest, and in which all maps stay
        x = images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        for stage, blocks in enumerate(self.blocks):
            x = self.pos_drop(self.patch_embeds[stage](x))
            for number, block in enumerate(blocks):
                x = block(x)
                if number == 0:
                    x = self.pos_block[stage](x)
            if norms is not None:
                x = norms[stage](x)
            yield x


class SepViT(Stages):
    """The classifier: `(B, 3, H, W) -> (B, num_classes)`.

    Window tokens are bound to the number of windows, so a network is built for an image size. It
    also runs on others that give the same numbers: 221 to 224 pixels, or 112x448, for that of 224.

    Args:
        architecture: widths, depths and windows.
        num_classes: 0 returns the pooled features.
        image_size: pixels, one side or (height, width). Maps that do not divide into windows are
            padded, and the padding is masked; the released code refuses them.

    Raises:
        ValueError: no such image, or options that do not fit.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int = 1000,
        image_size: ImageSize = 224,
        options: BlockOptions | None = None,
    ) -> None:
        counts = architecture.window_counts(image_size)
        super().__init__(architecture, counts, options or BlockOptions())
        self.image_size = image_size
        self.num_features = self.head_hidden_size = architecture.embed_dims[-1]
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.head: nn.Module = nn.Identity()
        self.apply(partial(init_weights_, std=architecture.init_std))
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier for `num_classes`; 0 removes it."""
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            like = self.blocks[0][0].norm1.weight
            self.head = nn.Linear(
                self.num_features, num_classes, device=like.device, dtype=like.dtype
            )
            init_weights_(self.head, self.architecture.init_std)

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, 3, H, W) -> (B, h, w, C4)`, normalised."""
        *_, last = self.stage_maps(x)
        return self.norm(last)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the map, then classify: `(B, h, w, C4) -> (B, num_classes)`."""
        x = x.mean(dim=(1, 2))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def deploy_(self) -> None:
        """The affine part of the last norm moves through the mean into the classifier."""
        if self.norm.elementwise_affine and self.num_classes > 0:
            fold_before(self.head, self.norm.weight, self.norm.bias)
            self.norm = nn.LayerNorm(self.num_features, eps=1e-6, elementwise_affine=False)


class SepViTPyramid(Stages):
    """The backbone for detection and segmentation: `(B, 3, H, W)` -> each stage's `(B, C, h, w)`.

    It takes any image. As in the released code, window tokens are constant zeros, every block has
    an attention between windows, and padding is not masked. Each map has a norm of its own and goes
    on to the next stage normalised. The classifier's `norm` and `head` are there, so that
    checkpoints fit, and are not used.

    Args:
        out_indices: stages whose maps are returned.

    Raises:
        ValueError: options of the classifier's window tokens, or stages that do not exist.
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int = 1000,
        options: BlockOptions | None = None,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        options = options or BlockOptions()
        if replace(options, summary="learned", token_init="zeros") != options:
            raise ValueError("the pyramid's window tokens are constant zeros: no summary, no init")
        super().__init__(architecture, None, options)
        dims = architecture.embed_dims
        stages = range(len(dims))
        given = stages if out_indices is None else out_indices
        self.out_indices = tuple(given) if isinstance(given, Iterable) else ()
        if not self.out_indices or any(one not in stages for one in self.out_indices):
            raise ValueError(f"out_indices {given}: a list of stages, which are 0 to {stages[-1]}")
        self.num_classes, self.num_features = num_classes, dims[-1]
        self.norm_list = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims)
        self.norm: nn.Module = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(dims[-1], num_classes)
        self.apply(partial(init_weights_, std=architecture.init_std))
        stride = architecture.stem_stride
        self.feature_info = FeatureInfo(
            [
                {"num_chs": dim, "reduction": stride * 2**stage, "module": f"blocks.{stage}"}
                for stage, dim in enumerate(dims)
            ],
            self.out_indices,
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = enumerate(self.stage_maps(x, self.norm_list))
        return [x.permute(0, 3, 1, 2) for stage, x in maps if stage in self.out_indices]

    def deploy_(self) -> None:
        """What is not used goes."""
        self.norm, self.head = nn.Identity(), nn.Identity()


def sepvit(
    num_classes: int = 1000,
    image_size: ImageSize = 224,
    *,
    size: str = "tiny",
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    embed_dims: Sequence[int] | None = None,
    num_heads: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    windows: Sequence[Sequence[int]] | None = None,
    mlp_ratio: float | None = None,
    stem_kernel: int | None = None,
    stem_stride: int | None = None,
    drop_path_rate: float | None = None,
    init_std: float | None = None,
    pointwise: bool = True,
    shift: bool = False,
    summary: str = "learned",
    token_init: str = "zeros",
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
) -> SepViT | SepViTPyramid:
    """Build a size of the paper; what is None comes from the size (`Architecture`).

    Args:
        size: lite, tiny, small, base or micro.
        features_only: the pyramid for dense tasks, with `out_indices`, in place of the classifier.
        pointwise, shift, summary, token_init: for ablations (`BlockOptions`).

    Raises:
        ValueError: an unknown size, or what does not fit together (the message says what does).
    """
    if size not in ARCHITECTURES:
        raise ValueError(f"no size {size!r}; there are {', '.join(ARCHITECTURES)}")
    changes = {
        "embed_dims": embed_dims, "num_heads": num_heads, "depths": depths, "windows": windows,
        "mlp_ratio": mlp_ratio, "stem_kernel": stem_kernel, "stem_stride": stem_stride,
        "drop_path_rate": drop_path_rate, "init_std": init_std,
    }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    architecture = replace(ARCHITECTURES[size], **changes)
    options = BlockOptions(
        pointwise, shift, summary, token_init, qkv_bias, qk_scale, drop_rate, attn_drop_rate
    )
    if features_only:
        return SepViTPyramid(architecture, num_classes, options, out_indices)
    if out_indices is not None:
        raise ValueError("out_indices choose maps of the pyramid: they need features_only=True")
    return SepViT(architecture, num_classes, image_size, options)
