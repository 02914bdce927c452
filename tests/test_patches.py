"""The check that an image divides into patches."""

import pytest

from harness.patches import patch_grid


@pytest.mark.parametrize(
    ("image_size", "grid"), [(224, (14, 14)), ((32, 64), (2, 4)), (16, (1, 1))]
)
def test_rows_and_columns(image_size, grid):
    assert patch_grid(image_size, 16) == grid


@pytest.mark.parametrize("image_size", [8, 225, (224, 230)])
def test_an_incomplete_patch_is_refused(image_size):
    with pytest.raises(ValueError, match=r"some model cuts.*16x16.*must be a multiple of 16"):
        patch_grid(image_size, 16, "some model")


@pytest.mark.parametrize("image_size", [0, -16, (0, 224)])
def test_an_empty_image_is_refused(image_size):
    with pytest.raises(ValueError, match="image_size must be positive"):
        patch_grid(image_size, 16)
