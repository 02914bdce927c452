"""What a model sees of an image: timm's transforms with the variant's own numbers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image
from timm.data import auto_augment
from timm.data import create_transform as timm_transform

from harness.data.augmentation import PixelTransform
from harness.errors import ReplivitError
from harness.paper import InputSpec

if TYPE_CHECKING:
    from torch import Tensor

#: Recipe field -> keyword of `timm.data.create_transform`; fields that are not set keep timm's own.
TIMM_FIELDS = {
    "hflip": "hflip",
    "color_jitter": "color_jitter",
    "random_erasing": "re_prob",
    "random_erasing_mode": "re_mode",
    "crop_scale": "scale",
    "crop_ratio": "ratio",
}


def create_transform(
    spec: InputSpec,
    image_size: int | tuple[int, int],
    train: bool = False,
    recipe: Mapping[str, Any] | Any | None = None,
) -> Callable[[Image.Image], Tensor]:
    """A callable from a PIL image to a normalised float32 tensor `(3, H, W)`.

    Args:
        spec: a resolved `InputSpec` (see `input_spec`).
        image_size: side in pixels, or `(height, width)`.
        train: augment; otherwise resize to `image_size / crop_pct` and crop the centre.
        recipe: a mapping or an object with the training recipe's fields. `augment` is

            - "crop_flip": a random crop after padding by an eighth of the side, and a flip: the
              small tracks';
            - "none": as in evaluation;
            - anything else: timm's random resized crop with that RandAugment or AutoAugment policy
              ("rand-m9-mstd0.5-inc1"; "" for no policy), and the fields of `TIMM_FIELDS`.

    Where no part of the image is cropped away, and for "crop_flip", the callable is a
    `PixelTransform`, which `AugmentedDataset` runs on whole batches.

    Raises:
        ReplivitError: `spec` is not resolved, or timm does not know the policy.
    """
    if None in (spec.mean, spec.std, spec.interpolation, spec.crop_pct):
        raise ReplivitError("the input specification has unset fields; make it with input_spec()")
    height, width = _pair(image_size)
    fields = _fields(recipe)
    augment = fields.get("augment", "crop_flip" if height <= 64 else "") if train else "none"
    numbers = {"mean": spec.mean, "std": spec.std}
    if augment == "crop_flip":
        return PixelTransform(
            (height, width), interpolation=spec.interpolation, **numbers,
            padding=height // 8, flip=fields.get("hflip", 0.5),
        )  # fmt: skip
    if augment == "none" and spec.crop_pct == 1 and height == width:
        return PixelTransform((height, width), interpolation=spec.interpolation, **numbers)
    numbers |= {"input_size": (3, height, width), "interpolation": spec.interpolation}
    if augment == "none":
        return timm_transform(is_training=False, crop_pct=spec.crop_pct, **numbers)
    options = {TIMM_FIELDS[name]: fields[name] for name in TIMM_FIELDS if name in fields}
    try:
        made = timm_transform(is_training=True, auto_augment=augment or None, **numbers, **options)
    except (AssertionError, KeyError, ValueError) as error:
        raise ReplivitError(f"timm knows no augmentation {augment!r}") from error
    _mend_posterize(made)
    return made


def _mend_posterize(made: Any) -> None:
    """Let "posterize to 0 bits" be black again in timm's policies.

    timm's increasing magnitudes reach 0 bits (about one image in 700 under rand-m9-mstd0.5-inc1);
    Pillow used to answer with a black image, newer releases raise.
    """
    for step in made.transforms:
        policies = [getattr(step, "ops", []), *getattr(step, "policy", [])]
        for operation in (one for policy in policies for one in policy):
            if getattr(operation, "aug_fn", None) is auto_augment.posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    if bits < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits, **options)


def preprocessing_sha256(spec: InputSpec, image_size: int | tuple[int, int]) -> str:
    """SHA-256 of everything that decides what a model sees of an image in evaluation."""
    height, width = _pair(image_size)
    facts = {
        "resize": [math.floor(side / spec.crop_pct) for side in (height, width)],
        "centre_crop": [height, width],
        "interpolation": spec.interpolation,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "library": "PIL, antialiased",
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _pair(image_size: int | tuple[int, int]) -> tuple[int, int]:
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def _fields(recipe: Mapping[str, Any] | Any | None) -> dict[str, Any]:
    """The recipe's fields that are set."""
    if recipe is None:
        return {}
    known = ("augment", *TIMM_FIELDS)
    if isinstance(recipe, Mapping):
        found = {name: recipe.get(name) for name in known}
    else:
        found = {name: getattr(recipe, name, None) for name in known}
    return {name: value for name, value in found.items() if value is not None}
