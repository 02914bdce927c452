"""How an image is cut into patches: the check that every patch model makes, written once."""

from __future__ import annotations

ImageSize = int | tuple[int, int]


def patch_grid(image_size: ImageSize, patch_size: int, name: str = "the model") -> tuple[int, int]:
    """Rows and columns of the patches of one image.

    An incomplete patch is refused: a convolution of that stride would drop its pixels unseen.

    Args:
        image_size: pixels along both sides, or `(height, width)`.
        patch_size: pixels along the side of a patch.
        name: who refuses, in the error.

    Raises:
        ValueError: an empty image, or one that does not divide into patches.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"{name}: image_size must be positive, not {image_size}")
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"{name} cuts images into patches of {patch_size}x{patch_size}: image_size must be a "
            f"multiple of {patch_size}, not {image_size}"
        )
    return height // patch_size, width // patch_size
