"""Images in batches, and the parts of a training split that a search uses."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import DataLoader

from harness.data import SearchImages, batches_of, create_transform, load_split
from harness.training import read_recipe


def labels_of(batches) -> list[int]:
    return torch.cat([labels for _, labels in batches]).tolist()


def test_all_images_in_order_and_as_often_as_one_likes():
    test = load_split("fashion_mini", "test")
    batches = batches_of(test, 32)
    assert labels_of(batches) == labels_of(batches) == test.labels.tolist()
    assert {len(one) for one, _ in batches} == {250}
    images, _ = next(iter(batches))
    assert images.shape == (250, 3, 32, 32)
    transform = create_transform(test.track.input, 32)
    torch.testing.assert_close(images[7], transform(test[7][0]), rtol=0, atol=0)


def test_a_few_images_are_spread_evenly():
    test = load_split("fashion_mini", "test")
    (images, labels), last = batches_of(test, 32, limit=6, batch_size=4)
    chosen = np.linspace(0, len(test) - 1, 6).astype(int)
    assert [*labels.tolist(), *last[1].tolist()] == test.labels[chosen].tolist()
    assert len(images) == 4 and len(last[0]) == 2
    assert len(labels_of(batches_of(test, 32, limit=10**6))) == len(test)


def test_training_images_are_augmented_by_the_recipe():
    train = load_split("fashion_mini", "train")
    recipe = read_recipe("small_track")
    ((plain, labels),) = batches_of(train, 32, limit=20)
    ((augmented, same),) = batches_of(train, 32, limit=20, recipe=recipe)
    ((again, _),) = batches_of(train, 32, limit=20, recipe=recipe)
    assert labels.tolist() == same.tolist() and torch.equal(augmented, again)
    assert (augmented - plain).abs().amax(dim=(1, 2, 3)).gt(0.1).sum() > 5


def test_large_images_are_not_kept():
    test = load_split("fashion_mini", "test")
    batches = batches_of(test, 65, limit=3, workers=2)
    assert isinstance(batches, DataLoader) and batches.num_workers == 2
    assert isinstance(batches_of(test, 64, limit=3, workers=2), list)


def test_images_of_a_search_are_apart():
    images = SearchImages("fashion_mini", 32, search_images=50)
    seen, held = images.parts
    assert images.held_out == len(held) == 50 and images.num_classes == 10
    assert not set(seen.indices) & set(held.indices)
    assert labels_of(images.search_batches()) == held.labels.tolist()
    assert labels_of(images.test_batches()) == images.test_split.labels.tolist()


def test_images_of_a_short_search():
    whole = len(load_split("fashion_mini", "train"))
    few = SearchImages("fashion_mini", 32, search_images=50, train_images=64, test_images=30)
    assert few.held_out == whole - 64 and len(few.parts[0]) == 64
    assert [len(labels_of(one)) for one in (few.search_batches(), few.test_batches())] == [50, 30]
    many = SearchImages("fashion_mini", 32, search_images=50, train_images=whole)
    assert many.held_out == 50, "those that steer do not train"
