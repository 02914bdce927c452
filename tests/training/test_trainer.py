"""The trainer: it learns, repeats itself, and says what went wrong."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from training_tools import RECIPE, same

from harness.checkpoints import file_sha256, read_state_dict
from harness.data import get_track
from harness.errors import ReplivitError
from harness.record import read_records
from harness.training import Callback, CrossEntropy, EvaluateEvery, TensorBoard, state, train
from harness.training.api import _recipe


def test_held_out_images_are_not_trained_on(fit):
    seen = []

    class Watch(CrossEntropy):
        def loss(self, model, images, targets, context):
            seen.append(images.flatten(1))
            return super().loss(model, images, targets, context)

    plain = {"augment": "none", "batch_size": 24}
    run = fit("part", objective=Watch(), recipe=plain | {"epochs": 1}, hold_out=48)
    assert len(torch.cat(seen).unique(dim=0)) == 48  # of 96
    assert run.records[0].detail["held_out"] == 48


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
    told = run.records[0].detail
    assert told["starts_trained"] and told["frozen"] == ["stem.*"] and "held_out" not in told
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
