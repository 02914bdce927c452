"""Peak memory against allocations of known size."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from harness.errors import ReplivitError
from harness.measurement import memory
from harness.measurement.memory import MemoryUse, measure_peak, training_memory

MIB = 2**20
ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import json
from dataclasses import asdict
import torch
from torch import nn
from harness.measurement.memory import inference_memory, training_memory
"""


# a fresh process each, as in use: in a long-lived one, holes in the heap decide what comes back
def alone(script: str) -> dict[str, int]:
    """What the last line of `script`, run by a fresh interpreter, prints as JSON."""
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(script)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_inference_peak_is_what_the_model_held():
    uses = alone("""
        class Holder(nn.Module):
            def __init__(self, mib):
                super().__init__()
                self.mib, self.head = mib, nn.Linear(4, 10)

            def forward(self, x):
                torch.ones(self.mib * 2**20, dtype=torch.uint8)  # held for a moment
                return self.head(x)

        def use(mib):
            model = Holder(mib).eval()
            return asdict(inference_memory(model, [torch.zeros(1, 4)] * 3, model))

        print(json.dumps({str(mib): use(mib) for mib in (64, 128)}))
    """)
    for mib in (64, 128):
        use = uses[str(mib)]
        assert use["work"] == pytest.approx(mib * MIB, abs=6 * MIB)  # once, not three times
        assert use["weights"] == (4 * 10 + 10) * 4
        assert use["exact_peak"]


def test_peak_is_weights_and_work():
    assert MemoryUse(weights=3, work=4, exact_peak=True, method="").peak == 7


def test_training_holds_gradients_and_two_moments():
    use = alone("""
        model = nn.Linear(1024, 4096)  # 16 MiB of weights
        use = training_memory(model, [torch.zeros(1, 1024)] * 2)
        print(json.dumps(asdict(use) | {"freed": model.weight.grad is None}))
    """)
    # the optimizer's own step is the peak: two temporaries beside gradient and moments
    assert use["work"] == pytest.approx((3 + 2) * 16 * MIB, rel=0.1)
    assert use["freed"]


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


def test_training_takes_the_logits_of_an_answer_with_parts():
    class Answer(NamedTuple):
        logits: torch.Tensor
        features: torch.Tensor

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 10)

        def forward(self, x):
            return Answer(self.head(x), x[:, None].expand(-1, 7, -1))

    model = Net()
    before = model.head.weight.clone()
    training_memory(model, [torch.randn(6, 4)] * 2)
    assert (model.head.weight != before).any()


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
