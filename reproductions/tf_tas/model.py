"""The subnets that TF-TAS found in AutoFormer's spaces, as dense networks.

Space, supernet and subnets are AutoFormer's; only the way of finding is TF-TAS's own. The networks
of its second space are in `pit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.patches import ImageSize
from reproductions.autoformer.space import Config, get_space
from reproductions.autoformer.subnet import Subnet

#: Parameters in M that the micro search allows, as AutoFormer's: up to the size of `vit_micro`.
MICRO_WINDOW = (0.235, 0.2586)
#: Official code: `experiments/subnet_autoformer`. The micro one was found here (`tf_tas/pick`).
FOUND = {
    "t": Config(13, 192, (3.5, 4, 3.5, 3.5, 4, 3.5, 3.5, 3.5, 4, 4, 4, 4, 3.5),
                (4, 3, 3, 3, 3, 4, 4, 3, 3, 3, 4, 3, 3)),
    "s": Config(14, 384, (4, 4, 4, 3, 4, 3, 3, 3.5, 4, 3.5, 3.5, 4, 3, 3.5),
                (6, 6, 6, 6, 7, 6, 5, 7, 5, 5, 5, 7, 6, 7)),
    "b": Config(15, 576, (3, 3.5, 4, 4, 3, 4, 3, 3, 3.5, 3, 3, 3.5, 4, 3, 4),
                (9, 10, 10, 10, 10, 10, 10, 9, 9, 10, 9, 9, 9, 9, 9)),
    "micro": Config(6, 64, (3, 2, 2.5, 2.5, 3, 3), (4, 4, 4, 3, 4, 4)),
}  # fmt: skip


def tf_tas(
    num_classes: int,
    image_size: ImageSize,
    space: str = "t",
    config: Config | Mapping[str, Any] | None = None,
    global_pool: bool = True,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Subnet:
    """A subnet of an AutoFormer space: `(B, 3, H, W) -> (B, num_classes)`.

    Args:
        space: t, s, b or micro.
        config: another subnet than the one found, e.g. `{"depth": 12, "embed_dim": 192,
            "num_heads": 3, "mlp_ratios": 3.5}`. It may lie outside the space's choices, not
            outside its supernet.
        global_pool: features are the mean over patches, not the class token.
        drop_rate, attn_drop_rate, drop_path_rate: of the supernet's width and last layer.

    Raises:
        ValueError: no such space, a configuration that its supernet is too small for, or an image
            that does not divide into patches.
    """
    if space not in FOUND:
        raise ValueError(f"TF-TAS has no subnet for space {space!r}; it has {', '.join(FOUND)}")
    chosen = FOUND[space] if config is None else Config.of(config)
    return Subnet(
        get_space(space), chosen, num_classes, image_size, global_pool=global_pool,
        drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate,
    )  # fmt: skip
