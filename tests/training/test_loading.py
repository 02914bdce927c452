"""The order of images is a pure function of seed, epoch and step, on any number of processes."""

from __future__ import annotations

import pytest
import torch

from harness.data import get_track, load_split
from harness.errors import ReplivitError
from harness.training.loading import Batches, Order, create_mixup
from harness.training.recipe import Recipe

SMALL = Recipe(batch_size=16, augment="crop_flip")


def test_an_epoch_shows_every_image_once():
    order = Order(64, SMALL, seed=3)
    first, second = order.epoch(0), order.epoch(1)
    assert first.shape == (4, 16)
    assert sorted(first.flatten().tolist()) == list(range(64))
    assert not torch.equal(first, second)
    assert torch.equal(first, Order(64, SMALL, seed=3).epoch(0))
    assert not torch.equal(first, Order(64, SMALL, seed=4).epoch(0))


def test_what_fills_no_batch_is_left_out_anew_each_epoch():
    order = Order(70, SMALL, seed=0)
    left_out = [set(range(70)) - set(order.epoch(epoch).flatten().tolist()) for epoch in range(3)]
    assert all(len(one) == 6 for one in left_out)
    assert len(set.union(*left_out)) > 6


def test_repeated_augmentation():
    order = Order(64, SMALL.changed(repeats=3), seed=0)
    places = order.epoch(0)
    assert places.shape == (4, 16)
    index, copy = places.flatten() % 64, places.flatten() // 64
    seen, counts = torch.unique(index, return_counts=True)
    assert len(seen) == 22 and counts.sort().values.tolist() == [1] + 21 * [3]
    assert copy[:6].tolist() == [0, 1, 2, 0, 1, 2]
    assert index[:3].unique().numel() == 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_processes_share_each_batch(accumulation):
    recipe = SMALL.changed(accumulation=accumulation)
    parts = [Order(64, recipe, 0, process, 4).passes(0) for process in range(4)]
    assert parts[0].shape == (4 * accumulation, 4 // accumulation)
    together = torch.stack([part.reshape(4, -1) for part in parts], dim=2)
    assert torch.equal(together.reshape(4, 16), Order(64, recipe, 0).epoch(0))


def test_copies_of_an_image_go_to_different_processes():
    recipe = SMALL.changed(repeats=2)
    for process in range(2):
        mine = Order(64, recipe, 0, process, 2).passes(0)
        assert (mine % 64).unique().numel() == mine.numel()


@pytest.mark.parametrize(
    ("recipe", "processes", "words"),
    [
        (SMALL.changed(batch_size=128), 1, "128 is more than the 64 images"),
        (SMALL, 3, "split over 3 processes"),
        (SMALL.changed(mixup=0.8, batch_size=15), 1, "pairs images, but a pass has 15"),
    ],
)
def test_a_batch_that_does_not_fit(recipe, processes, words):
    with pytest.raises(ReplivitError, match=words):
        Order(64, recipe, seed=0, processes=processes)


def batches(toy_data: str, recipe: Recipe, seed: int = 0) -> Batches:
    dataset = load_split(toy_data, "train")
    order = Order(len(dataset), recipe, seed)
    return Batches(dataset, order, get_track("cifar10").input, (16, 16), torch.device("cpu"))


@pytest.mark.parametrize("augment", ["crop_flip", "rand-m9-mstd0.5-inc1"])
def test_an_epoch_can_be_entered_anywhere(toy_data, augment):
    recipe = SMALL.changed(augment=augment, repeats=2)
    whole = list(batches(toy_data, recipe)(epoch=2))
    later = list(batches(toy_data, recipe)(epoch=2, first_step=4))
    assert len(whole) == 6 and len(later) == 2
    for (images, labels), (same_images, same_labels) in zip(whole[4:], later, strict=True):
        assert images.shape == (16, 3, 16, 16)
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)
    other_epoch = next(iter(batches(toy_data, recipe)(epoch=3)))
    assert not torch.equal(whole[0][0], other_epoch[0])


def test_copies_of_an_image_are_augmented_differently(toy_data):
    images, labels = next(iter(batches(toy_data, SMALL.changed(repeats=2))(0)))
    assert torch.equal(labels[::2], labels[1::2])
    same = [torch.equal(one, two) for one, two in zip(images[::2], images[1::2], strict=True)]
    assert sum(same) <= 2  # 5 x 5 crops and a flip coincide now and then


def test_workers_change_nothing(toy_data):
    alone = list(batches(toy_data, SMALL)(0))
    helped = list(batches(toy_data, SMALL.changed(workers=1))(0))
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(alone, helped, strict=True)
    )


def test_loading_leaves_the_global_generators_alone(toy_data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(batches(toy_data, SMALL)(0))
    assert torch.equal(before, torch.get_rng_state())


def test_mixup_smooths_and_mixes_targets():
    assert create_mixup(SMALL, 4) is None
    mixup = create_mixup(SMALL.changed(mixup=0.8, label_smoothing=0.1), 4)
    _, targets = mixup(torch.randn(16, 3, 8, 8), torch.arange(16) % 4)
    assert targets.shape == (16, 4)
    assert torch.allclose(targets.sum(1), torch.ones(16))
    assert targets.min() >= 0.1 / 4 - 1e-6
