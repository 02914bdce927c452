"""Models timed in alternation: the same images for all, threads put back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from harness.errors import ReplivitError
from harness.measurement.side_by_side import time_images, time_models

EFFORT = {"budget_s": 0.05, "min_rounds": 2, "palindromes": 1, "block_s": 1e-4, "warm_up_s": 0.0,
          "warm_up_limit_s": 0.01}  # fmt: skip


class Work(nn.Module):
    """So many matrix products per image; remembers what it saw."""

    def __init__(self, products: int) -> None:
        super().__init__()
        self.products, self.seen, self.threads = products, [], set()
        self.register_buffer("matrix", torch.eye(64))

    def forward(self, images):
        self.seen.append(float(images[0, 0, 0, 0]))
        self.threads.add(torch.get_num_threads())
        x = self.matrix
        for _ in range(self.products):
            x = x @ self.matrix
        return x


def test_ratios_are_to_the_first_and_batches_take_turns():
    models = {"small": Work(20), "large": Work(400)}
    batches = [torch.full((2, 3, 4, 4), float(value)) for value in (1, 2, 3)]
    before = torch.get_num_threads()
    timings = time_models(models, batches, threads=1, **EFFORT)
    assert list(timings) == ["small", "large"]
    assert timings["small"].ratio == 1 and timings["large"].ratio > 2
    for model in models.values():
        assert model.seen[:6] == [1, 2, 3, 1, 2, 3] and model.threads == {1}
    assert torch.get_num_threads() == before


def test_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        time_models({"broken": nn.Linear(5, 5)}, [torch.zeros(1, 3, 4, 4)], threads=before + 1)
    assert torch.get_num_threads() == before


def test_nothing_to_time():
    with pytest.raises(ReplivitError, match="at least one batch"):
        time_models({"one": Work(1)}, [])
    with pytest.raises(ReplivitError, match="nothing to time"):
        time_models({}, [torch.zeros(1, 3, 4, 4)])
    with pytest.raises(ValueError, match="at least one image"):
        time_images(Work(1), torch.zeros(0, 3, 4, 4))
    with pytest.raises(ValueError, match="one repeat"):
        time_images(Work(1), torch.zeros(1, 3, 4, 4), repeats=0)


class Hard(Work):
    """Spends more on image 1."""

    def forward(self, images):
        self.products = 600 if images[0, 0, 0, 0] == 1 else 20
        return super().forward(images)


def test_single_images_keep_their_place_in_every_order():
    images = torch.arange(3.0)[:, None, None, None].expand(3, 3, 4, 4)
    model = Hard(0)
    seconds = time_images(model, images, repeats=4)
    assert seconds.shape == (4, 3) and (seconds > 0).all()
    assert np.median(seconds, axis=0).argmax() == 1
    orders = np.array(model.seen[3:]).reshape(4, 3)  # after three calls to warm up
    assert all(sorted(order) == [0, 1, 2] for order in orders.tolist())
    assert len({tuple(order) for order in orders.tolist()}) > 1, "each repeat has its own order"
