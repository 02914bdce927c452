"""Peak memory against allocations of known size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import ReplivitError
from harness.measurement import memory
from harness.measurement.memory import inference_memory, measure_peak, training_memory

MIB = 2**20


class Holder(nn.Module):
    """A linear head; each forward pass holds `mib` MiB for a moment."""

    def __init__(self, mib: int, features: int = 4):
        super().__init__()
        self.mib = mib
        self.head = nn.Linear(features, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.ones(self.mib * MIB, dtype=torch.uint8)
        return self.head(x)


# above 32 MiB, where the C library always returns a freed block to the system at once
@pytest.mark.parametrize("mib", [64, 128])
def test_inference_peak_is_what_the_model_held(mib):
    model = Holder(mib).eval()
    use = inference_memory(model, [torch.zeros(1, 4)] * 3, model)
    assert use.work == pytest.approx(mib * MIB, abs=6 * MIB)  # once, not three times
    assert use.weights == (4 * 10 + 10) * 4
    assert use.peak == use.weights + use.work
    assert use.exact_peak


def test_training_holds_gradients_and_two_moments():
    model = nn.Linear(1024, 4096)  # 16 MiB of weights
    use = training_memory(model, [torch.zeros(1, 1024)] * 2)
    # the optimizer's own step is the peak: two temporaries beside gradient and moments
    assert use.work == pytest.approx((3 + 2) * 16 * MIB, rel=0.1)
    assert model.weight.grad is None


def test_training_takes_every_head_and_frozen_weights():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 10), nn.Linear(4, 3)

        def forward(self, x):
            return self.one(x), self.two(x)

    model = Heads().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training_memory(model, [torch.randn(6, 4)] * 2)
    changed = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    assert changed == set(before)


def test_batch_norm_on_one_image_is_a_sentence():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    with pytest.raises(ReplivitError, match="use a larger batch"):
        training_memory(model, [torch.zeros(1, 4)] * 2)


def test_peak_that_cannot_be_reset_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path)  # a folder cannot be written
    use = measure_peak(lambda: None, nn.Identity(), "cpu")
    assert not use.exact_peak
    assert use.detail() == {"weights": 0, "work": use.work, "exact_peak": False}


def test_a_system_without_proc_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "missing")
    with pytest.raises(ReplivitError, match="/proc"):
        measure_peak(lambda: None, nn.Identity(), "cpu")
