"""The variants' builders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.patches import ImageSize
from reproductions.autoformer.space import PUBLISHED, Config, get_space
from reproductions.autoformer.subnet import Subnet
from reproductions.autoformer.supernet import Supernet


def supernet(
    num_classes: int,
    image_size: ImageSize,
    space: str,
    config: Config | Mapping[str, Any] | None = None,
    global_pool: bool = True,
    scale: bool = False,
    change_qkv: bool = True,
    relative_position: bool = True,
    absolute_position: bool = True,
    pre_norm: bool = True,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Supernet:
    """The supernet of a space: `(B, 3, H, W) -> (B, num_classes)` by the configuration in force.

    Args:
        space: t, s, b, b8 (base with 8, 9 or 10 heads) or micro.
        config: the subnet in force, e.g. `{"depth": 12, "embed_dim": 192, "num_heads": 3,
            "mlp_ratios": 3.5}`; by default the supernet itself, wider than any candidate in T and
            B. `set_config` changes it.
        global_pool, scale, change_qkv, relative_position, absolute_position, pre_norm, drop_rate,
        attn_drop_rate, drop_path_rate: see `Options`; the defaults are the released scripts'.

    Raises:
        ValueError: no such space, a configuration that the supernet is too small for, or an image
            that does not divide into patches.
    """
    net = Supernet(
        get_space(space), num_classes, image_size, global_pool=global_pool, scale=scale,
        change_qkv=change_qkv, relative_position=relative_position,
        absolute_position=absolute_position, pre_norm=pre_norm, drop_rate=drop_rate,
        attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate,
    )  # fmt: skip
    return net if config is None else net.set_config(config)


def subnet(
    num_classes: int,
    image_size: ImageSize,
    space: str,
    config: Config | Mapping[str, Any] | None = None,
    global_pool: bool = True,
    scale: bool = False,
    drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Subnet:
    """One subnet as a dense network: `(B, 3, H, W) -> (B, num_classes)`.

    Args:
        space: t, s, b, b8 or micro.
        config: another subnet than the published one; b8 and micro have none.
        global_pool, scale, drop_rate, attn_drop_rate, drop_path_rate: see `Options`.

    Raises:
        ValueError: no such space, a configuration that its supernet is too small for, or an image
            that does not divide into patches.
    """
    chosen = get_space(space)
    if config is None:
        if space not in PUBLISHED:
            raise ValueError(f"space {space} has no published subnet; give a config")
        config = PUBLISHED[space]
    return Subnet(
        chosen, Config.of(config), num_classes, image_size, global_pool=global_pool, scale=scale,
        drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate,
    )  # fmt: skip
