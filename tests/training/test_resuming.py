"""Runs that are stopped: taken up again in the same bits, read back, or refused."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn
from training_tools import RECIPE, same

from harness.checkpoints import read_state_dict
from harness.errors import ReplivitError
from harness.training import Callback, train
from harness.training.objective import Objective, cross_entropy


class Stop(Exception):
    """Stands in for being killed."""


class StopAt(Callback):
    def __init__(self, updates: int) -> None:
        self._updates = updates

    def on_step_end(self, context):
        if context.updates == self._updates:
            raise Stop

    def identity(self):
        return None


class Noisy(Objective):
    """Everything a method may do: draws, own parameters, own state, parts."""

    def __init__(self):
        self._scale = nn.Parameter(torch.ones(4))
        self._calls = 0

    def parameters(self):
        return [self._scale]

    def loss(self, model, images, targets, context):
        self._calls += 1
        noise = 0.1 * torch.randn_like(images) * float(np.random.rand()) / self._calls  # noqa: NPY002
        loss = cross_entropy(self._scale * model(images + noise), targets)
        return {"loss": loss, "scale": self._scale.mean()}

    def state_dict(self):
        return {"calls": self._calls}

    def load_state_dict(self, state):
        self._calls = state["calls"]


class Widening(Callback):
    """A schedule with state, that draws at the start of each epoch."""

    def __init__(self):
        self._drawn = []

    def on_epoch_start(self, context):
        del self._drawn[context.epoch :]
        self._drawn.append(float(torch.rand(())))
        context.model.drop.p = 0.4 * self._drawn[-1]

    def on_epoch_end(self, context):
        context.row["drawn"] = self._drawn[-1]

    def state_dict(self):
        return {"drawn": self._drawn}

    def load_state_dict(self, state):
        self._drawn = list(state["drawn"])


EVERYTHING = {
    "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "accumulation": 2, "repeats": 2,
    "ema_decay": 0.9, "clip": "agc", "clip_value": 0.05, "warmup_epochs": 1, "batch_size": 16,
    "mixed_precision": "bf16", "channels_last": True,
}  # fmt: skip


@pytest.mark.parametrize("updates", [1, 6, 11, 17])
def test_a_stopped_run_ends_in_the_same_bits(fit, tmp_path, updates):
    def start(name, *more):
        objective = Noisy()
        run = fit(
            name, recipe=EVERYTHING, objective=objective, callbacks=[Widening(), *more],
            checkpoint_steps=2,
        )  # fmt: skip
        return run, objective._scale.detach()

    whole, scale = start("whole")
    with pytest.raises(Stop):
        start("stopped", StopAt(updates))
    resumed, scale_again = start("stopped")
    assert same(whole.model.state_dict(), resumed.model.state_dict())
    assert torch.equal(scale, scale_again)
    averaged = [
        read_state_dict(tmp_path / n / "weights_ema.safetensors") for n in ("whole", "stopped")
    ]
    assert same(*averaged)
    speed = ("seconds", "images_per_second")
    strip = [
        [{key: value for key, value in row.items() if key not in speed} for row in run.history]
        for run in (whole, resumed)
    ]
    assert strip[0] == strip[1] and len(strip[0]) == 3
    assert resumed.value("images_seen") == whole.value("images_seen") == 3 * 6 * 16


def test_a_finished_run_is_read_back(fit, tmp_path):
    steps = []

    class Count(StopAt):
        def on_step_end(self, context):
            steps.append(context.step)

    assert {one.metric for one in fit(callbacks=[Count(0)]).records} == {
        "train_time",
        "images_seen",
    }
    first = fit(callbacks=[Count(0)], evaluate=True)  # trained already, scored now
    assert len(steps) == 12 and first.value("top1") is not None
    again = fit(callbacks=[Count(0)], evaluate=True)
    assert len(steps) == 12
    assert again.records == first.records and again.history == first.history
    assert same(again.model.state_dict(), first.model.state_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": {"lr": 1e-3}}, "recipe.lr = 0.01, asked for is 0.001"),
        ({"epochs": 5}, "recipe.epochs = 3, asked for is 5"),
        ({"seed": 1}, "seed = 0, asked for is 1"),
        ({"freeze": ["stem.*"]}, "frozen"),
        ({"objective": Noisy()}, "objective.class"),
        ({"callbacks": [Widening()]}, "callbacks"),
    ],
)
def test_another_run_in_the_same_directory_is_refused(fit, changes, words):
    fit()
    with pytest.raises(ReplivitError, match=words) as caught:
        fit(**changes)
    assert "choose another directory" in str(caught.value)


def test_another_model_or_other_data_are_refused(fit, net, toy_data, tmp_path):
    fit()
    with pytest.raises(ReplivitError, match="seed torch before you build"):
        fit(model=net(seed=3))
    with pytest.raises(ReplivitError, match=r"track = .*asked for is fashion_mini"):
        train(net(), "fashion_mini", RECIPE, image_size=16, out=tmp_path / "run")


def test_without_a_directory_every_run_has_its_own(toy_data, net, own_home):
    runs = [
        train(net(), toy_data, {**RECIPE, "lr": lr}, image_size=16, evaluate=False, quiet=True,
              epochs=1, name="mine")
        for lr in (1e-2, 1e-3, 1e-2)
    ]  # fmt: skip
    assert runs[0].directory == runs[2].directory != runs[1].directory
    assert runs[0].directory.parent.parent == own_home / "training" / "mine"
    assert runs[0].directory.name.startswith("seed0-")


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint_before(fit, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        fit(callbacks=[StopAt(6)])
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ReplivitError, match=r"cannot write .*checkpoint.pt: No space left"):
            fit()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))
    assert len(fit().history) == 3


def test_a_damaged_or_foreign_checkpoint_is_refused(fit, tmp_path):
    with pytest.raises(Stop):
        fit(callbacks=[StopAt(6)])
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ReplivitError, match="remove it to train from the start"):
        fit()
    torch.save({"epoch": os.system}, path)  # a function: refused, never called
    with pytest.raises(ReplivitError, match="cannot read"):
        fit()
