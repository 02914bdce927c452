"""Classical weight sharing: the baseline that weight entanglement is compared with (Sec. 3.2).

Every candidate block of a layer has weights of its own, one set for each choice of dimension, heads
and ratio, and so have the parts outside the blocks for each dimension. A training step touches only
the drawn candidates, so each of them is trained as many times less as there are choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from torch import Tensor, nn

from harness.patches import ImageSize
from reproductions.autoformer.space import Config, Space
from reproductions.autoformer.subnet import DENSE, Block, Options, Subnet


class ClassicalSupernet(nn.Module):
    """All candidates of a space with weights of their own: `(B, 3, H, W) -> (B, num_classes)`.

    The interface is the entangled supernet's: `space`, `config`, `set_config`, `extract`.
    """

    def __init__(
        self, space: Space, num_classes: int = 10, image_size: ImageSize = 32, **options: Any
    ) -> None:
        super().__init__()
        self.space, self.options, self.num_classes = space, Options(**options), num_classes
        # A stem holds what is outside the blocks. Its own blocks are not used, so it has one.
        self.stems = nn.ModuleDict(
            {
                str(dim): Subnet(space, self._single(dim), num_classes, image_size, **options)
                for dim in space.embed_dims
            }
        )
        for stem in self.stems.values():
            stem.blocks = nn.ModuleList()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    _key(dim, heads, ratio): self._block(index, dim, heads, ratio)
                    for dim, heads, ratio in product(
                        space.embed_dims, space.num_heads, space.mlp_ratios
                    )
                }
            )
            for index in range(space.super_depth)
        )
        self.set_config(space.largest())

    def _single(self, dim: int) -> Config:
        return Config(1, dim, (self.space.mlp_ratios[0],), (self.space.num_heads[0],))

    def _block(self, index: int, dim: int, heads: int, ratio: float) -> Block:
        depth = self.space.super_depth
        config = Config(depth, dim, (ratio,) * depth, (heads,) * depth)
        block = Block(self.space, config, index, self.options, DENSE)
        return block.apply(self.stems[str(dim)]._init_weights)

    def set_config(self, config: Config | Mapping[str, Any]) -> ClassicalSupernet:
        """Activate a subnet.

        Raises:
            ValueError: it is not a candidate of the space: others have no weights here.
        """
        self.config = self.space.check(Config.of(config))
        return self

    def _blocks(self, config: Config) -> list[Block]:
        genes = zip(config.num_heads, config.mlp_ratios, strict=True)
        return [
            self.layers[index][_key(config.embed_dim, heads, ratio)]
            for index, (heads, ratio) in enumerate(genes)
        ]

    def extract(self, config: Config | None = None) -> Subnet:
        """A subnet as a dense network with copied weights."""
        config = self.config if config is None else self.space.check(Config.of(config))
        stem = self.stems[str(config.embed_dim)]
        subnet = Subnet(self.space, config, self.num_classes, stem.image_size, **vars(self.options))
        subnet.load_state_dict(stem.state_dict(), strict=False)
        for block, source in zip(subnet.blocks, self._blocks(config), strict=True):
            block.load_state_dict(source.state_dict())
        like = stem.cls_token
        return subnet.to(like.device, like.dtype).train(self.training)

    def no_weight_decay(self) -> set[str]:
        return {f"stems.{dim}.{name}" for dim in self.stems for name in ("pos_embed", "cls_token")}

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stems[str(self.config.embed_dim)]
        return stem.forward_head(stem.forward_features(x, self._blocks(self.config)))


def _key(dim: int, heads: int, ratio: float) -> str:
    return f"{dim}_{heads}_{ratio:g}".replace(".", "p")  # a name of a module has no dots
