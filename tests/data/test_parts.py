"""Images held out of training."""

from __future__ import annotations

import numpy as np
import pytest

from harness.data import hold_out, load_split
from harness.data.images import DataError


@pytest.fixture(scope="module")
def whole():
    return load_split("fashion_mini", "train")


def test_parts_are_disjoint_complete_and_even(whole):
    rest, held = hold_out(whole, 205)
    assert sorted([*rest.indices, *held.indices]) == list(range(len(whole)))
    counts = np.bincount(held.labels)
    assert counts.sum() == 205 and counts.max() - counts.min() == 1
    assert held.classes == whole.classes and held.track is whole.track


def test_parts_hold_the_same_images(whole):
    _, held = hold_out(whole, 20)
    for index in (0, 19):
        image, label = held[index]
        expected, same_label = whole[int(held.indices[index])]
        assert label == same_label
        assert np.array_equal(np.asarray(image), np.asarray(expected))
        assert np.array_equal(np.asarray(held.decode(index)), np.asarray(expected))
    assert held.source.where(0) == whole.source.where(int(held.indices[0]))


def test_the_choice_is_fixed_and_named(whole):
    (rest, held), (_, again), (_, other) = (hold_out(whole, 50, seed) for seed in (0, 0, 1))
    assert np.array_equal(held.indices, again.indices)
    assert not np.array_equal(held.indices, other.indices)
    assert held.fingerprint == again.fingerprint
    assert len({one.fingerprint for one in (whole, rest, held, other)}) == 4
    assert "50 held out of train" in repr(held)


@pytest.mark.parametrize("count", [0, -1, 10_000])
def test_a_count_that_leaves_nothing_is_a_sentence(whole, count):
    with pytest.raises(DataError, match="at least 1 and at most 9,999 can"):
        hold_out(whole, count)
