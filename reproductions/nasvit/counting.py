"""What a configuration costs, by formula: a search asks for thousands, and builds none of them."""

from __future__ import annotations

from reproductions.nasvit.attention import SCALE_COLUMNS, VALUE_RATIO
from reproductions.nasvit.space import HEAD_DIM, Block, Config, Space


def macs_of(space: Space, config: Config, num_classes: int = 1000) -> int:
    """Multiply-adds of one image at the configuration's resolution.

    The released evaluation counts convolutions and linear layers by hooks, and transformer blocks
    by a formula that equals theirs. Norms, softmax, pools and activations cost nothing.
    """
    side = -(-config.resolution // 2)
    total = 27 * config.width[0] * side**2
    for block in space.blocks(config):
        total += _transformer_macs(block) if block.transformer else _bottleneck_macs(block)
    expanded = space.head_ratio * config.width[-2]
    total += config.width[-2] * expanded * block.side**2
    return total + expanded * config.width[-1] + config.width[-1] * num_classes


def _bottleneck_macs(block: Block) -> int:
    before, after = block.side_in**2, block.side**2
    expand = block.width_in * block.hidden * before if block.expands else 0
    depthwise = block.hidden * block.kernel**2 * after
    project = block.hidden * block.width_out * after
    squeeze = 2 * block.hidden * block.reduced
    changes = block.width_in != block.width_out
    return (
        expand
        + depthwise
        + squeeze
        + project
        + changes * (block.width_in * block.width_out * after)
    )


def _transformer_macs(block: Block) -> int:
    """`N (14 C^2 + 5 N C + 36 C) + 2 h^2 N^2`: linear, products, depthwise, talking heads."""
    dim, tokens = block.width_out, block.tokens
    linear = (2 + 2 * VALUE_RATIO + 4) * dim**2
    products = (1 + VALUE_RATIO) * tokens * dim
    return tokens * (linear + products + 9 * VALUE_RATIO * dim) + 2 * (block.heads * tokens) ** 2


def params_of(space: Space, config: Config, num_classes: int = 1000) -> int:
    """Parameters of the dense network."""
    total = 27 * config.width[0] + 2 * config.width[0]
    for block in space.blocks(config):
        if block.transformer:
            total += _transformer_params(block.width_out) + 2 * block.width_out
            total += _table_params(space, block.heads)
        else:
            changes = block.width_in != block.width_out
            total += _bottleneck_params(block) + changes * block.width_in * block.width_out
    return total + _head_params(space, config, num_classes)


def released_params(
    space: Space, config: Config, num_classes: int = 1000, leaves_only: bool = True
) -> int:
    """Parameters of a network as the authors' code extracts it.

    It keeps transformer blocks in the supernet's full width, and a projection in every shortcut.

    Args:
        leaves_only: count what their counter sees, modules without children; it misses the tables
            of relative positions and of layer scales.
    """
    total = 27 * config.width[0] + 2 * config.width[0]
    for block in space.blocks(config):
        if block.transformer:
            dim = max(space.stages[block.stage].widths)
            total += _transformer_params(dim)
            if not leaves_only:
                total += 2 * space.scale_rows * SCALE_COLUMNS * dim
                total += _table_params(space, dim // HEAD_DIM)
        else:
            total += _bottleneck_params(block) + block.width_in * block.width_out
    return total + _head_params(space, config, num_classes)


def _bottleneck_params(block: Block) -> int:
    """Without the shortcut's projection."""
    expand = block.expands * (block.width_in + 2) * block.hidden
    depthwise = (block.kernel**2 + 2) * block.hidden
    project = (block.hidden + 2) * block.width_out
    squeeze = bool(block.reduced) * (
        2 * block.hidden * block.reduced + block.hidden + block.reduced
    )
    return expand + depthwise + project + squeeze


def _transformer_params(dim: int) -> int:
    """Linear layers, depthwise convolution, norms and talking heads of a block."""
    heads, inner = dim // HEAD_DIM, VALUE_RATIO * dim
    attention = 2 * (dim + 1) * dim + (dim + 1) * inner + 9 * inner + (inner + 1) * dim
    return attention + 2 * (heads + 1) * heads + 6 * dim + 4 * (dim + 1) * dim


def _table_params(space: Space, heads: int) -> int:
    return (2 * space.window - 1) ** 2 * heads


def _head_params(space: Space, config: Config, num_classes: int) -> int:
    expanded = space.head_ratio * config.width[-2]
    mix = (config.width[-2] + 2) * expanded + expanded * config.width[-1]
    return mix + (config.width[-1] + 1) * num_classes
