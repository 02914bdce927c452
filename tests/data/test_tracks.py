"""Tracks: what the protocol says, and that it is true of the embedded data."""

from __future__ import annotations

import numpy as np
import pytest

import harness
from harness.data import TRACKS, get_track, input_spec, load_split
from harness.errors import ReplivitError
from harness.training.recipe import default_recipe


def test_tracks():
    assert set(TRACKS) == {"fashion_mini", "cifar10", "imagenet"}
    assert [get_track(name).num_classes for name in TRACKS] == [10, 10, 1000]
    assert [get_track(name).image_size for name in TRACKS] == [32, 32, 224]
    with pytest.raises(ReplivitError, match="no track 'fashion'; did you mean fashion_mini"):
        get_track("fashion")


def test_imagenet_classes_are_the_sorted_wnids():
    classes = get_track("imagenet").classes
    assert len(set(classes)) == 1000
    assert list(classes) == sorted(classes)
    assert (classes[0], classes[-1]) == ("n01440764", "n15075141")


@pytest.mark.parametrize(
    ("track", "epochs", "peak", "batch", "augment"),
    [
        ("fashion_mini", 12, 1e-3, 128, "crop_flip"),
        ("cifar10", 30, 1e-3, 128, "crop_flip"),
        ("imagenet", 300, 1e-3, 1024, "rand-m9-mstd0.5-inc1"),
    ],
)
def test_protocol_is_a_recipe(track, epochs, peak, batch, augment):
    recipe = default_recipe(None, get_track(track).protocol)
    assert (recipe.epochs, recipe.batch_size, recipe.augment) == (epochs, batch, augment)
    assert recipe.peak_lr == pytest.approx(peak)
    assert (recipe.weight_decay, recipe.label_smoothing) == (0.05, 0.1)
    assert recipe.scheduler == "cosine"
    assert get_track("fashion_mini").protocol["seeds"] == [0, 1, 2]


def test_mean_and_std_are_those_of_the_training_images():
    track = get_track("fashion_mini")
    pixels = load_split("fashion_mini", "train").pixels
    values, counts = np.unique(pixels, return_counts=True)
    mean = np.average(values / 255, weights=counts)
    std = np.sqrt(np.average((values / 255 - mean) ** 2, weights=counts))
    np.testing.assert_allclose(track.mean, mean, atol=5e-5)
    np.testing.assert_allclose(track.std, std, atol=5e-5)


def test_input_spec_prefers_the_variant_on_its_own_track_only():
    variant = harness.get_variant("efficientformer_l1")
    assert variant.track == "imagenet"
    own = variant.spec.input.model_dump(exclude_none=True)
    spec = input_spec(variant)
    imagenet = get_track("imagenet").input.model_dump()
    assert spec.model_dump() == {**imagenet, **own}
    changed = variant.spec.model_copy(
        update={"input": variant.spec.input.model_copy(update={"crop_pct": 0.9})}
    )
    other = type(variant)(variant.name, variant.paper, changed)
    assert input_spec(other).crop_pct == 0.9
    assert input_spec(other).interpolation == imagenet["interpolation"]
    assert input_spec(other, "cifar10") == get_track("cifar10").input
