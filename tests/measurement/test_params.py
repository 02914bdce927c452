"""Parameters: shared ones once, frozen ones apart, buffers beside them."""

import pytest
from torch import nn

from harness.measurement.params import count_params
from harness.meta import on_meta


def test_counts_are_the_closed_form():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 5))
    found = count_params(model)
    assert found.total == found.trainable == 3 * 8 * 9 + 2 * 8 + 8 * 5 + 5
    assert found.buffers == 8 + 8 + 1  # running mean and variance, number of batches


def test_shared_parameters_count_once():
    embedding, head = nn.Embedding(100, 16), nn.Linear(16, 100, bias=False)
    head.weight = embedding.weight
    assert count_params(nn.Sequential(embedding, head)).total == 1600


def test_frozen_parameters_are_not_trainable():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    found = count_params(model)
    assert (found.total, found.trainable) == (30, 10)


def test_meta_modules_count_and_lazy_ones_are_refused():
    with on_meta():
        assert count_params(nn.Linear(1000, 1000)).total == 1_001_000
    with pytest.raises(ValueError, match="before its first forward"):
        count_params(nn.LazyLinear(4))
