"""Transforms: what a model sees, against a plain restatement with PIL."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform as timm_transform

from harness.data import PixelTransform, create_transform, get_track, preprocessing_sha256
from harness.errors import ReplivitError
from harness.paper import InputSpec

SPEC = get_track("imagenet").input
SMALL = get_track("cifar10").input


def photo(width, height, seed=0):
    """Smooth noise, so that resizing matters."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def normalised(image, spec):
    pixels = np.asarray(image, dtype=np.float64) / 255
    return torch.from_numpy((pixels - spec.mean) / spec.std).permute(2, 0, 1)


def test_evaluation_is_resize_crop_normalise():
    image = photo(300, 400)
    seen = create_transform(SPEC, 112)(image)
    resized = image.resize((128, int(128 * 400 / 300)), Image.Resampling.BICUBIC)  # 112 / 0.875
    top = round((resized.height - 112) / 2)
    cropped = resized.crop((8, top, 120, top + 112))
    torch.testing.assert_close(seen.double(), normalised(cropped, SPEC), atol=1e-5, rtol=1e-5)
    assert (seen.shape, seen.dtype) == ((3, 112, 112), torch.float32)


@pytest.mark.parametrize("field", ["interpolation", "crop_pct", "mean"])
def test_every_number_of_the_spec_counts(field):
    other = {"interpolation": "bilinear", "crop_pct": 0.9, "mean": (0.5, 0.5, 0.5)}[field]
    changed = SPEC.model_copy(update={field: other})
    image = photo(300, 400)
    assert not torch.equal(
        create_transform(SPEC, 112)(image), create_transform(changed, 112)(image)
    )
    assert preprocessing_sha256(SPEC, 112) != preprocessing_sha256(changed, 112)


def test_hash_tells_sizes_apart_and_nothing_else():
    assert preprocessing_sha256(SPEC, 224) == preprocessing_sha256(SPEC.model_copy(), (224, 224))
    assert preprocessing_sha256(SPEC, 224) != preprocessing_sha256(SPEC, (224, 192))


@pytest.mark.parametrize("size", [(32, 32), (40, 28), (28, 50)])
def test_uncropped_images_take_the_fast_way_to_the_same_pixels(size):
    transform = create_transform(SMALL, 32)
    assert isinstance(transform, PixelTransform)
    slow = timm_transform(
        32, crop_pct=1.0, interpolation=SMALL.interpolation, mean=SMALL.mean, std=SMALL.std
    )
    image = photo(*size)
    torch.testing.assert_close(transform(image), slow(image), atol=2e-6, rtol=1e-6)


def test_training_policies():
    image = photo(64, 64)
    for augment, words in (
        ("rand-m9-mstd0.5-inc1", "RandAugment"),
        ("", "RandomResizedCropAndInterpolation"),
        ("crop_flip", "padding 4"),
        ("none", "PixelTransform((32, 32))"),
    ):
        transform = create_transform(SMALL, 32, train=True, recipe={"augment": augment})
        assert words in repr(transform)
        assert transform(image).shape == (3, 32, 32)
    recipe = {
        "augment": "", "random_erasing": 1.0, "random_erasing_mode": "pixel",
        "crop_scale": (0.5, 1.0), "hflip": 0.0, "color_jitter": None,
    }  # fmt: skip
    text = repr(create_transform(SPEC, 64, train=True, recipe=recipe))
    assert "RandomErasing(p=1.0, mode=pixel" in text
    assert "scale=(0.5, 1.0)" in text
    assert "Flip" not in text


def test_recipe_may_be_an_object():
    from harness.training.recipe import Recipe

    recipe = Recipe(augment="crop_flip", hflip=0.0)
    transform = create_transform(SMALL, 32, train=True, recipe=recipe)
    assert (transform.padding, transform.flip) == (4, 0.0)


def test_mistakes():
    with pytest.raises(ReplivitError, match="unset fields"):
        create_transform(InputSpec(), 32)
    with pytest.raises(ReplivitError, match="timm knows no augmentation 'randy-m9'"):
        create_transform(SPEC, 32, train=True, recipe={"augment": "randy-m9"})


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n8-inc1", "original"])
def test_policies_survive_every_magnitude(policy):
    """timm reaches "posterize to 0 bits", which newer releases of Pillow refuse."""
    transform = create_transform(SPEC, 16, train=True, recipe={"augment": policy})
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    image = photo(24, 24)
    for _ in range(300):
        assert torch.isfinite(transform(image)).all()
