"""Parameters and multiply-adds of a configuration by formula, without building it."""

from __future__ import annotations

from harness.patches import ImageSize, patch_grid
from reproductions.autoformer.space import Config, Space
from reproductions.autoformer.subnet import Options

DEFAULT = Options()


def _inner_dims(space: Space, config: Config, options: Options) -> list[tuple[int, int]]:
    """Q-K-V dimension and head size of each layer."""
    if not options.change_qkv:
        return [(space.super_dim, space.super_dim // heads) for heads in config.num_heads]
    return [(heads * space.head_dim, space.head_dim) for heads in config.num_heads]


def params_of(
    space: Space,
    config: Config,
    num_classes: int = 1000,
    image_size: ImageSize = 224,
    options: Options = DEFAULT,
) -> int:
    """Parameters of a subnet; exactly those of the dense network.

    Official code: `get_sampled_params_numel`.
    """
    height, width = patch_grid(image_size, space.patch_size, "AutoFormer")
    dim = config.embed_dim
    total = dim * (3 * space.patch_size**2 + 1)  # patch embedding
    total += dim  # class token
    total += dim * (height * width + 1) if options.absolute_position else 0
    total += 2 * dim if options.pre_norm else 0  # the last norm
    total += num_classes * (dim + 1) if num_classes else 0
    inner_dims = _inner_dims(space, config, options)
    for (inner, head_dim), hidden in zip(inner_dims, config.hidden_dims, strict=True):
        total += 3 * inner * dim + (3 * inner if options.qkv_bias else 0) + inner * dim + dim
        total += 4 * dim + dim * hidden + hidden + hidden * dim + dim
        if options.relative_position:
            total += 4 * (2 * space.max_distance + 2) * head_dim
    return total


def complexity_of(
    space: Space,
    config: Config,
    num_classes: int = 1000,
    image_size: ImageSize = 224,
    options: Options = DEFAULT,
) -> float:
    """The paper's "FLOPs", as the official counter adds them (official code: `get_complexity`).

    It counts 198 tokens in the blocks of a 224-pixel image instead of 197, the head for every
    token, and the relative positions as 28.5 per pair of tokens; no final norm, softmax or biases.
    Without absolute positions the released counter fails; here their half addition is left out.
    """
    height, width = patch_grid(image_size, space.patch_size, "AutoFormer")
    patches, dim = height * width, config.embed_dim
    tokens = patches + 2  # the counter adds the class token twice
    total = dim + patches * dim * 3 * space.patch_size**2
    total += dim * (patches + 1) / 2 if options.absolute_position else 0
    inner_dims = _inner_dims(space, config, options)
    for (inner, _), hidden in zip(inner_dims, config.hidden_dims, strict=True):
        total += 2 * tokens * dim + tokens * (3 * inner * dim + inner * dim + 2 * dim * hidden)
        total += 2 * tokens**2 * inner
        if options.relative_position:
            total += 2 * space.max_distance * tokens**2 + tokens**2 / 2 + tokens * inner / 2
    return total + (patches + 1) * dim * num_classes
