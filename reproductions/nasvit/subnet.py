"""A network of the space: dense, with weights of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from harness.patches import ImageSize
from reproductions.nasvit.attention import TransformerBlock
from reproductions.nasvit.layers import DENSE, ConvNorm, Layers, MBConv
from reproductions.nasvit.space import Block, Config, Space


class Subnet(nn.Module):
    """One configuration of a space: `(B, 3, S, S) -> (B, num_classes)`.

    Images of any square size are taken; inside they are resized to the configuration's resolution
    (bicubic, not antialiased). Blocks are named after their stage and their place in it, so that a
    network and the supernet it is a part of use the same names.

    Args:
        image_size: side of the images that it is meant for; nothing is built from it.

    Raises:
        ValueError: a configuration outside the space, or images that are not square.
    """

    layers: Layers = DENSE

    def __init__(
        self,
        space: Space,
        config: Config | Mapping[str, Any],
        num_classes: int = 1000,
        image_size: ImageSize = 224,
    ) -> None:
        super().__init__()
        self.space, self.config = space, space.check(config)
        self.image_size = _square(image_size)
        self.num_classes = num_classes
        widths, layers = self.config.width, self.layers
        self.num_features = widths[-1]
        self.first_conv = ConvNorm(
            layers.conv(3, widths[0], 3, stride=2), layers.batch_norm(widths[0])
        )
        self.stages = nn.ModuleList(nn.ModuleList() for _ in space.stages)
        for block in space.blocks(self.config):
            self.stages[block.stage].append(self._block(block))
        expanded = space.head_ratio * widths[-2]
        self.final_expand = ConvNorm(layers.conv(widths[-2], expanded), layers.batch_norm(expanded))
        self.feature_mix = layers.linear(expanded, widths[-1], bias=False)
        self.classifier = self._classifier()

    def _block(self, block: Block) -> nn.Module:
        if block.transformer:
            return TransformerBlock(
                block.width_out, block.side, self.space.window, self.space.scale_init
            )
        return MBConv(block, block.width_in != block.width_out, self.layers)

    def _classifier(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return self.layers.linear(self.num_features, self.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The map before the pool, `(B, 6 C, h, w)`.

        Raises:
            ValueError: the images are not square.
        """
        height, width = x.shape[-2:]
        if height != width:
            raise ValueError(f"NASViT takes square images, not {height}x{width}")
        if width != self.config.resolution:
            size = (self.config.resolution,) * 2
            x = F.interpolate(x, size=size, mode="bicubic", align_corners=False)
        x = self.first_conv(x)
        for number in range(len(self.stages)):
            for block in self.active(number):
                x = block(x)
        return self.final_expand(x)

    def active(self, stage: int) -> nn.ModuleList:
        """The blocks of a stage that run."""
        return self.stages[stage]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, mix, classify."""
        x = F.silu(self.feature_mix(x.mean((2, 3))), inplace=True)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        """A new, untrained classifier; 0 classes for none."""
        self.num_classes = num_classes
        before = next(self.parameters())
        self.classifier = self._classifier().to(before.device, before.dtype)


def _square(image_size: ImageSize) -> int:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height != width or height < 1:
        raise ValueError(f"NASViT takes square images, not {height}x{width}")
    return height
