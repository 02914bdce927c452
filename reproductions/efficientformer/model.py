"""EfficientFormer: a network of two kinds of blocks (NeurIPS 2022, arXiv 2206.01191).

Most of the network works on maps `(B, C, H, W)` with nothing but 1x1 convolutions, batch norms and
3x3 average pooling (`Meta4D`). It turns once into tokens `(B, N, C)`, and the last blocks are
transformer blocks with layer norms, linears and self-attention (`Meta3D`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .blocks import Embedding, Meta3D, Meta4D, Size, init_linear, stem, to_pair


class Flatten(nn.Module):
    """The one change of shape, map to tokens: `(B, C, H, W) -> (B, H*W, C)`."""

    def __init__(self, resolution: tuple[int, int]) -> None:
        super().__init__()
        self.resolution = resolution

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.resolution:
            raise ValueError(
                "attention was built for a map of {}x{}, the image gives {}x{}; build the model "
                "with image_size= the size of your images".format(*self.resolution, *x.shape[-2:])
            )
        return x.flatten(2).transpose(1, 2)


class Unflatten(nn.Module):
    """Tokens back to a map, where a searched network has 3D blocks before its last stage."""

    def __init__(self, resolution: tuple[int, int]) -> None:
        super().__init__()
        self.resolution = resolution

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, self.resolution)


class EfficientFormer(nn.Module):
    """The network of Fig. 3: stem, stages of blocks, a strided convolution between stages, heads.

    Args:
        depths: blocks per stage.
        widths: channels per stage.
        num_3d: how many of the last blocks are `Meta3D`; a sequence states it for each stage.
        image_size: any size; attention tables are built for its map of ceil(size / 32).
        distillation: a second head for the teacher's label. In training the model then returns
            both heads' logits (switch off with `set_distilled_training(False)`), else their mean.
        strides: of the two convolutions of the stem.
        drop_path_rate: rises linearly from 0 at the first block to this at the last.
        token_mixer: of the 4D blocks, see `TOKEN_MIXERS`.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        num_3d: int | Sequence[int] = 0,
        num_classes: int = 1000,
        image_size: Size = 224,
        *,
        distillation: bool = True,
        strides: tuple[int, int] = (2, 2),
        mlp_ratio: float = 4.0,
        pool_size: int = 3,
        key_dim: int = 32,
        num_heads: int = 8,
        attn_ratio: float = 4,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-5,
        token_mixer: str = "pool",
    ) -> None:
        super().__init__()
        last = len(depths) - 1
        counts = [0] * last + [num_3d] if isinstance(num_3d, int) else list(num_3d)
        if not len(depths) == len(widths) == len(counts):
            raise ValueError(f"{len(depths)} depths, {len(widths)} widths, {len(counts)} num_3d")
        if any(not 0 <= n <= depth for n, depth in zip(counts, depths, strict=True)):
            raise ValueError(f"num_3d {counts} must be between 0 and the depths {list(depths)}")
        size = to_pair(image_size)
        if min(size) < 1 or num_classes < 0:
            raise ValueError(f"image_size {image_size} and num_classes {num_classes} are too small")

        self.image_size = size
        self.depths, self.widths, self.num_3d = tuple(depths), tuple(widths), tuple(counts)
        self.num_features = self.head_hidden_size = widths[-1]
        self.distilled_training = True

        common = dict(mlp_ratio=mlp_ratio, act_layer=act_layer, drop=drop_rate,
                      layer_scale_init_value=layer_scale_init_value)  # fmt: skip
        size_3d = dict(key_dim=key_dim, num_heads=num_heads, attn_ratio=attn_ratio)
        total = sum(depths)
        rates = iter([drop_path_rate * block / max(total - 1, 1) for block in range(total)])

        self.patch_embed = stem(3, widths[0], strides)
        size = tuple(math.ceil(math.ceil(n / strides[0]) / strides[1]) for n in size)
        self.resolutions: list[tuple[int, int]] = []  # of each stage's map
        network: list[nn.Module] = []
        for index, (depth, width, tokens) in enumerate(zip(depths, widths, counts, strict=True)):
            self.resolutions.append(size)
            blocks: list[nn.Module] = []
            for block in range(depth):
                if block == depth - tokens:
                    blocks.append(Flatten(size))
                if block < depth - tokens:
                    extra = dict(pool_size=pool_size, token_mixer=token_mixer)
                    blocks.append(Meta4D(width, drop_path=next(rates), **common, **extra))
                else:
                    extra = dict(resolution=size, **size_3d)
                    blocks.append(Meta3D(width, drop_path=next(rates), **common, **extra))
            if tokens and index < last:
                blocks.append(Unflatten(size))
            network.append(nn.Sequential(*blocks))
            if index < last:
                network.append(Embedding(in_chans=width, embed_dim=widths[index + 1]))
                size = tuple(math.ceil(n / 2) for n in size)
        self.network = nn.ModuleList(network)

        self.norm = nn.LayerNorm(widths[-1])
        self.distillation = distillation
        self.reset_classifier(num_classes)
        self.apply(init_linear)

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, 3, H, W) -> (B, N, C)`: normed tokens."""
        if x.device.type == "cpu":  # pooling is 15 times faster there, and flattening is free
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.patch_embed(x)
        for part in self.network:
            x = part(x)
        if x.ndim == 4:  # a network without 3D blocks
            x = x.flatten(2).transpose(1, 2)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """`(B, N, C) -> (B, num_classes)`; two of them in distilled training."""
        x = x.mean(dim=1)
        if pre_logits:
            return x
        if self.dist_head is None:
            return self.head(x)
        logits, distilled = self.head(x), self.dist_head(x)
        if self.training and self.distilled_training:
            return logits, distilled
        return (logits + distilled) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def deploy_(self) -> None:
        """One head with the mean weights of both."""
        if self.dist_head is not None and self.num_classes > 0:
            self.head.weight.add_(self.dist_head.weight).div_(2)
            self.head.bias.add_(self.dist_head.bias).div_(2)
        self.dist_head = None

    # What timm's scripts ask of a model.

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head, or both."""
        return self.head if self.dist_head is None else (self.head, self.dist_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads; `num_classes=0` leaves the pooled features. The pooling is always the mean."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"EfficientFormer pools by the mean, not by {global_pool!r}")
        self.num_classes = num_classes
        width = self.num_features

        def head() -> nn.Module:
            return nn.Linear(width, num_classes) if num_classes else nn.Identity()

        self.head = head()
        self.dist_head = head() if self.distillation else None
        for one in (self.head, self.dist_head):
            if one is not None:
                init_linear(one)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether training returns both heads' logits (for a distillation loss) or their mean."""
        self.distilled_training = enable

    def no_weight_decay(self) -> set[str]:
        """Nothing beyond biases and 1-D tensors: the official recipe decays attention biases."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers in order, for layer-wise learning rates."""
        stage, block = r"^network\.(\d+)", r"^network\.(\d+)\.(\d+)"
        blocks = [(stage, None)] if coarse else [(block, None), (stage, (0,))]
        return dict(stem=r"^patch_embed", blocks=[*blocks, (r"^norm", (99999,))])
