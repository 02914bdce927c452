"""Augmentation is a pure function of (seed, epoch, index)."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from data_tools import small_cifar
from torch.utils.data import DataLoader

from harness.data import AugmentedDataset, create_transform, load_split

RECIPES = ["crop_flip", "rand-m9-mstd0.5-inc1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Forty images of noise, decoded in memory."""
    folder = tmp_path_factory.mktemp("data")
    data = load_split(small_cifar(folder), "train", folder)
    data.__dict__["pixels"] = np.random.default_rng(0).integers(
        0, 256, (40, 32, 32, 3), dtype=np.uint8
    )
    return data


def augmented(data, augment, seed=0, size=32):
    spec = data.track.input
    transform = create_transform(spec, size, train=True, recipe={"augment": augment})
    return AugmentedDataset(data, transform, seed)


def batches(data, order, workers=0, **options):
    loader = DataLoader(data, batch_sampler=order, num_workers=workers, **options)
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize("augment", RECIPES)
def test_order_batches_and_workers_change_nothing(photos, augment):
    data = augmented(photos, augment)
    data.set_epoch(3)
    one_by_one = torch.stack([data[index][0] for index in range(12)])
    order = [[7, 2, 11], [0, 1, 3, 4], [10, 9, 8, 6, 5]]
    places = [index for batch in order for index in batch]
    assert torch.equal(batches(data, order), one_by_one[places])
    assert torch.equal(batches(data, order, workers=2), one_by_one[places])
    assert [label for _, label in (data[i] for i in range(3))] == [0, 1, 2]
    again = augmented(photos, augment)
    again.set_epoch(3)
    again[25]  # what came before does not matter
    assert torch.equal(again[4][0], one_by_one[4])


@pytest.mark.parametrize("augment", RECIPES)
def test_seed_epoch_and_copy_each_change_the_image(photos, augment):
    data = augmented(photos, augment)
    seen = [torch.stack([data[index][0] for index in range(8)])]
    seen.append(torch.stack([data[(index, 1)][0] for index in range(8)]))
    data.set_epoch(1)
    seen.append(torch.stack([data[index][0] for index in range(8)]))
    other = augmented(photos, augment, seed=1)
    seen.append(torch.stack([other[index][0] for index in range(8)]))
    for first in range(4):
        for second in range(first):
            assert not torch.equal(seen[first], seen[second])
    data.set_epoch(0)
    assert torch.equal(data[(3, 0)][0], seen[0][3])


@pytest.mark.parametrize("augment", RECIPES)
def test_random_states_are_left_alone(photos, augment):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    def seed():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002

    data = augmented(photos, augment)
    seed()
    expected = draw()
    seed()
    data.__getitems__([1, 2, 3])
    assert draw() == expected


def test_persistent_workers_see_the_epoch(photos):
    data = augmented(photos, "crop_flip")
    order = [[0, 1, 2, 3], [4, 5, 6, 7]]
    loader = DataLoader(data, batch_sampler=order, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        epochs.append(torch.cat([images for images, _ in loader]))
        assert torch.equal(epochs[epoch], batches(data, order))
    assert not torch.equal(*epochs)


def test_crop_and_flip_do_what_they_say(photos):
    """Against one image at a time, cut out with slices."""
    data = augmented(photos, "crop_flip")
    transform = data.transform
    decisions = transform.draw(np.random.default_rng([0, 0, 0]), len(photos))
    assert (decisions.min(0).tolist(), decisions.max(0).tolist()) == ([0, 0, 0], [8, 8, 1])
    for index, (top, left, flipped) in enumerate(decisions):
        padded = np.zeros((40, 40, 3))
        padded[4:36, 4:36] = photos.pixels[index]
        crop = padded[top : top + 32, left : left + 32]
        crop = crop[:, ::-1] if flipped else crop
        expected = (crop / 255 - photos.track.mean) / photos.track.std
        np.testing.assert_allclose(
            data[index][0].permute(1, 2, 0).numpy(), expected, atol=3e-6, rtol=1e-5
        )


def test_other_sizes_are_fitted_first(photos):
    data = augmented(photos, "crop_flip", size=48)
    assert data[5][0].shape == (3, 48, 48)
    assert torch.equal(data.__getitems__([5, 6])[0][0], data[5][0])
