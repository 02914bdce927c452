"""The authors' checkpoints -> ours.

Released files hold whole supernets, under the names that we use as well. A variant that is one
subnet takes its slices; a file that already holds the dense subnet is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from reproductions.autoformer.space import PUBLISHED, SPACES, Config, Space
from reproductions.autoformer.supernet import slice_state

State = dict[str, Tensor]


def to_t(state: Mapping[str, Tensor]) -> State:
    """AutoFormer-T out of the supernet's checkpoint."""
    return take_subnet(state, SPACES["t"], PUBLISHED["t"])


def to_s(state: Mapping[str, Tensor]) -> State:
    """AutoFormer-S out of the supernet's checkpoint."""
    return take_subnet(state, SPACES["s"], PUBLISHED["s"])


def to_b(state: Mapping[str, Tensor]) -> State:
    """AutoFormer-B out of the supernet's checkpoint."""
    return take_subnet(state, SPACES["b"], PUBLISHED["b"])


def to_supernet(state: Mapping[str, Tensor]) -> State:
    """A supernet's checkpoint; the names are the same."""
    return dict(state)


def take_subnet(state: Mapping[str, Tensor], space: Space, config: Config) -> State:
    """The slices of `config`.

    Raises:
        KeyError: no such checkpoint, or one of another supernet (its sizes are named).
    """
    if "cls_token" not in state:
        raise KeyError("there is no cls_token")
    dim, depth = state["cls_token"].shape[-1], _depth(state)
    if (dim, depth) == (config.embed_dim, config.depth):
        return dict(state)
    if (dim, depth) != (space.super_dim, space.super_depth):
        raise KeyError(
            f"it holds a network of dimension {dim} and depth {depth}; the supernet of "
            f"{space.name} has {space.super_dim} and {space.super_depth}"
        )
    return slice_state(state, space, config)


def _depth(state: Mapping[str, Tensor]) -> int:
    return 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
                   default=-1)  # fmt: skip


def resize_positions(state: Mapping[str, Tensor], grid: tuple[int, int]) -> State:
    """The state dict with its position embedding resampled (bicubic) to another grid of patches.

    The relative tables stay as they are. This is what the maintainers advise for other image
    sizes; the class token's position is kept.

    Args:
        grid: rows and columns of patches of the new image size.

    Raises:
        ValueError: the embedding there is does not belong to a square grid.
    """
    positions = state["pos_embed"]
    first, patches = positions[:, :1], positions[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    if side * side != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} positions do not form a square grid")
    maps = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
    resized = first.new_empty(1, 1 + grid[0] * grid[1], first.shape[-1])
    resized[:, :1], resized[:, 1:] = first, maps.flatten(2).transpose(1, 2)
    return {**state, "pos_embed": resized}
