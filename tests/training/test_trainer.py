"""The trainer: it learns, repeats itself, survives being stopped, and says what went wrong."""

from __future__ import annotations

import csv
import json
import os

import numpy as np
import pytest
import torch
from torch import nn

from harness.checkpoints import file_sha256, read_state_dict
from harness.data import get_track
from harness.errors import ReplivitError
from harness.record import read_records
from harness.training import Callback, CrossEntropy, EvaluateEvery, TensorBoard, state, train
from harness.training.api import _recipe
from harness.training.objective import Objective, cross_entropy

RECIPE = {"batch_size": 24, "epochs": 3, "lr": 1e-2}  # 96 images: 4 steps per epoch


def same(a: dict, b: dict) -> bool:
    """Bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def fit(toy_data, tmp_path, net):
    """`fit(name, **changes)` trains the toy model into a directory of that name."""

    def run(name: str = "run", model: nn.Module | None = None, recipe: dict | None = None, **more):
        more = {"image_size": 16, "quiet": True, "evaluate": False, **more}
        return train(
            net() if model is None else model, toy_data, {**RECIPE, **(recipe or {})},
            out=tmp_path / name, **more,
        )  # fmt: skip

    return run


def test_held_out_images_are_not_trained_on(fit):
    seen = []

    class Watch(CrossEntropy):
        def loss(self, model, images, targets, context):
            seen.append(images.flatten(1))
            return super().loss(model, images, targets, context)

    plain = {"augment": "none", "batch_size": 24}
    fit("part", objective=Watch(), recipe=plain | {"epochs": 1}, hold_out=48)
    assert len(torch.cat(seen).unique(dim=0)) == 48  # of 96


def test_it_learns_and_records(fit, toy_data, tmp_path):
    run = fit(recipe={"epochs": 8}, evaluate=True)
    assert run.history[-1]["loss"] < run.history[0]["loss"] - 0.2
    assert run.value("top1") > 60  # four classes: chance is 25
    assert not run.model.training
    metrics = {record.metric: record for record in run.records}
    assert set(metrics) == {
        "top1",
        "train_time",
        "images_seen",
    }  # top-5 of four classes says nothing
    assert metrics["images_seen"].value == 8 * 96
    for record in run.records:
        assert record.variant == "net" and record.conditions.seed == 0
        assert record.conditions.weights_sha256 == file_sha256(run.weights)
    assert metrics["top1"].n == 40 and metrics["top1"].detail["training"]["recipe"]["lr"] == 1e-2
    assert same(read_state_dict(run.weights), run.model.state_dict())
    assert list(read_records(tmp_path / "run" / "records.jsonl")) == run.records


def test_logs_hold_every_epoch(fit, tmp_path):
    run = fit(callbacks=[EvaluateEvery(2, limit=8)])
    with open(tmp_path / "run" / "log.csv") as stream:
        table = list(csv.DictReader(stream))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert lines == run.history and len(table) == 3
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in run.history]
    assert ["top1" in row for row in run.history] == [False, True, False]
    assert table[0]["top1"] == "" and float(table[1]["top1"]) >= 0
    assert all(row["images_per_second"] > 0 and row["seconds"] > 0 for row in run.history)


def test_same_seed_same_bits(fit):
    first, again = fit("a").model.state_dict(), fit("b").model.state_dict()
    assert same(first, again)
    assert not same(first, fit("c", seed=1).model.state_dict())


def test_evaluation_in_between_changes_nothing(fit):
    plain = fit("plain").model.state_dict()
    assert same(plain, fit("watched", callbacks=[EvaluateEvery(1)]).model.state_dict())


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


class Explode(CrossEntropy):
    def loss(self, model, images, targets, context):
        loss = super().loss(model, images, targets, context)
        return loss * (float("nan") if context.updates == 6 else 1.0)


def test_a_loss_that_is_not_finite_stops(fit, tmp_path):
    with pytest.raises(ReplivitError) as caught:
        fit(objective=Explode())
    told = str(caught.value)
    assert "became nan in epoch 2, step 3 of 4" in told
    assert "learning rate" in told and "images " in told
    from harness.training.loading import Order
    from harness.training.recipe import Recipe

    wanted = Order(96, Recipe(batch_size=24), seed=0).images(1, 2)[:8]
    assert f"(batch of images {', '.join(map(str, wanted))}, ...)" in told
    kept = state.load_checkpoint(tmp_path / "run")
    assert (kept["epoch"], kept["step"]) == (1, 0)
    assert all(torch.isfinite(value.float()).all() for value in kept["model"].values())
    assert not (tmp_path / "run" / "records.jsonl").exists()


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


def test_frozen_parameters_stay(fit, net):
    run = fit(freeze=["stem.*"])
    start = net().state_dict()
    assert torch.equal(run.model.stem.weight, start["stem.weight"])
    assert not torch.equal(run.model.head.weight, start["head.weight"])
    with pytest.raises(ReplivitError, match=r"freeze: 'stm\.\*' matches no parameter"):
        fit("typo", freeze=["stm.*"])
    with pytest.raises(ReplivitError, match="every parameter is frozen"):
        fit("all", freeze=["*"])


def test_training_starts_from_given_weights(fit, net, capfd):
    parent = net(seed=7)
    state_dict = {key: value for key, value in parent.state_dict().items() if "head" not in key}
    run = fit(init=state_dict, freeze=["stem.*"], quiet=False)
    assert torch.equal(run.model.stem.weight, parent.stem.weight)
    assert "2 missing (head.weight, head.bias)" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(ReplivitError, match="nothing of the initial weights fits"):
        fit("none", init={"other": torch.ones(2)})


def test_averaged_weights(fit, tmp_path):
    raw = fit("raw", recipe={"ema_decay": 0.5})
    averaged = fit("averaged", recipe={"ema_decay": 0.5, "ema_final": True})
    beside = read_state_dict(tmp_path / "raw" / "weights_ema.safetensors")
    assert same(beside, averaged.model.state_dict())
    assert not same(beside, raw.model.state_dict())


class Rates(Callback):
    def __init__(self):
        self._rates = []

    def on_step_end(self, context):
        self._rates.append(context.lr)


def test_warm_up_and_cosine_by_step(fit):
    watch = Rates()
    fit(recipe={"warmup_lr": 0.0, "warmup_epochs": 1, "min_lr": 0.0}, callbacks=[watch])
    wanted = [0.01 * step / 4 for step in range(4)]
    wanted += [0.005 * (1 + np.cos(np.pi * step / 12)) for step in range(4, 12)]
    assert watch._rates == pytest.approx(wanted)


def test_gradients_are_clipped(fit):
    norms = []

    class Norm(Callback):
        def on_step_end(self, context):
            grads = [one.grad for one in context.model.parameters()]
            norms.append(torch.cat([one.flatten() for one in grads]).norm().item())

    fit("free", callbacks=[Norm()], epochs=1)
    free, norms = norms, []
    fit("clipped", callbacks=[Norm()], epochs=1, recipe={"clip": "norm", "clip_value": 0.05})
    assert min(free) > 0.05 and norms == pytest.approx([0.05] * 4, rel=1e-3)


def test_compiled(fit, monkeypatch):
    compiled = []

    def eager(network):
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", eager)
    assert same(fit("a").model.state_dict(), fit("b", recipe={"compile": True}).model.state_dict())
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": -1}, "a seed is 0 or more"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"recipe": {"optimizer": "adamx"}}, "optimizer: .*adamx"),
        ({"recipe": {"no_decay": ["pos"]}}, "no_decay: 'pos' matches no parameter"),
        ({"recipe": {"batch_size": 97}}, "97 is more than the 96 images"),
        ({"recipe": {"augment": "magic"}}, "augmentation 'magic'"),
        ({"image_size": None}, "say the image_size"),
    ],
)
def test_bad_input_is_one_sentence(fit, changes, words):
    with pytest.raises(ReplivitError, match=words):
        fit(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_said(fit):
    with pytest.raises(ReplivitError, match="no CUDA device"):
        fit(device="cuda")
    with pytest.raises(ReplivitError, match="fp16"):
        fit(recipe={"mixed_precision": "fp16"}, device="cpu")


def test_tensorboard_is_optional(fit, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ReplivitError, match="pip install tensorboard"):
        TensorBoard()


def test_variants_are_built_as_the_recipe_says(toy_paper, tmp_path, toy_data):
    with pytest.raises(ReplivitError, match="takes no option 'depth'; it takes: width"):
        train("toy_net", toy_data, RECIPE, options={"depth": 3})
    run = train("toy_net", toy_data, {**RECIPE, "extends": "small_track", "drop_path": 0.1},
                epochs=1, options={"width": 4}, quiet=True)  # fmt: skip
    assert run.model[0].out_channels == 4
    (top1,) = [one for one in run.records if one.metric == "top1"]
    assert (top1.variant, top1.paper, top1.conditions.options) == ("toy_net", "toy", {"width": 4})


def test_a_gpu_gets_the_longer_protocol(monkeypatch):
    about = get_track("cifar10")
    assert _recipe(None, None, "cifar10", about, None, "cpu").epochs == 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _recipe(None, None, "cifar10", about, None, "cpu").epochs == 30
    assert _recipe(None, None, "cifar10", about, None, None).epochs == 100
    assert _recipe(None, None, "cifar10", about, 7, None).epochs == 7


def test_deterministic_algorithms_are_restored(fit):
    assert not torch.are_deterministic_algorithms_enabled()
    fit(epochs=1)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
