"""How the paper counts: the repository's `count_flops`, its "FLOPs"."""

from __future__ import annotations

from harness.patches import ImageSize, patch_grid
from reproductions.autoformer.subnet import Subnet


def count_flops(model: Subnet, image_size: ImageSize) -> int:
    """Multiply-adds by the released formula, rounded down where it has halves.

    It counts the patches without the class token everywhere, the head for every patch, relative
    positions as 28.5 per pair of patches and half an operation per query channel; neither the
    patch embedding nor norms. In a supernet that was another subnet before, the release also counts
    blocks beyond the depth; that is not repeated.

    Official code: `lib/flops.py`.
    """
    rows, columns = patch_grid(image_size, model.space.patch_size)
    patches, config = rows * columns, model.config
    dim = config.embed_dim
    total = patches * model.num_classes * dim
    for heads, hidden in zip(config.num_heads, config.hidden_dims, strict=True):
        inner = heads * model.space.head_dim
        total += 4 * patches * inner * dim + 2 * patches**2 * inner  # projections, products
        total += 2 * model.space.max_distance * patches**2 + (patches**2 + patches * inner) / 2
        total += 2 * patches * dim * hidden
    return int(total)
