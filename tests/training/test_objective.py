"""Objectives: the losses, and the hook for methods that do their own passes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from training_tools import Flat

from harness.errors import ReplivitError
from harness.training import (
    Callback,
    CrossEntropy,
    Distillation,
    Objective,
    cross_entropy,
    only_logits,
    train,
)
from harness.training.distillation import load_teacher

RECIPE = {"batch_size": 24, "warmup_epochs": 0, "epochs": 1}


def test_cross_entropy_is_timms():
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    soft = torch.softmax(torch.randn(6, 5), dim=1)
    smooth = LabelSmoothingCrossEntropy(0.1)(logits, labels)
    assert torch.allclose(cross_entropy(logits, labels, 0.1), smooth)
    # mixed targets are smoothed already
    assert torch.allclose(cross_entropy(logits, soft, 0.1), SoftTargetCrossEntropy()(logits, soft))


def test_two_heads_answer_with_their_mean():
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(only_logits((a, b)), (a + b) / 2)
    assert only_logits(SimpleNamespace(logits=a, features=b)) is a
    with pytest.raises(ReplivitError, match="dict, not with logits"):
        only_logits({"logits": a})


def test_identity_holds_plain_settings_only():
    class Mine(CrossEntropy):
        def __init__(self):
            self.alpha, self._hidden, self.table = 0.5, 3, [1]

    told = Mine().identity()
    assert told.pop("class").endswith("Mine")
    assert told == {"alpha": 0.5}


class TwoHeads(nn.Module):
    """Two heads in training, their mean in evaluation."""

    def __init__(self):
        super().__init__()
        self.head, self.head_dist = nn.Linear(768, 4), nn.Linear(768, 4)

    def forward(self, images):
        flat = images.flatten(1)
        both = self.head(flat), self.head_dist(flat)
        return both if self.training else sum(both) / 2


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation_trains_both_heads_and_not_the_teacher(toy_data, tmp_path, net, kind):
    torch.manual_seed(0)
    student, teacher = TwoHeads(), net()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    start = student.head_dist.weight.clone()
    run = train(
        student, toy_data, RECIPE, image_size=16, out=tmp_path, quiet=True,
        objective=Distillation(teacher, kind, tau=2.0),
    )  # fmt: skip
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not torch.equal(start, student.head_dist.weight)
    row = run.history[0]
    assert row["loss"] == pytest.approx(0.5 * row["base"] + 0.5 * row["teacher"], rel=1e-5)
    told = run.records[0].detail["objective"]
    assert (told["kind"], told["tau"]) == (kind, 2.0)
    assert len(told["teacher_sha256"]) == 64
    assert run.records[0].detail["recipe"]["distillation_alpha"] == 0.5


def test_a_teacher_for_other_classes_is_refused(toy_data, tmp_path, net):
    with pytest.raises(ReplivitError, match="teacher answers for 7 classes, the model for 4"):
        train(
            net(), toy_data, RECIPE, image_size=16, out=tmp_path, quiet=True,
            objective=Distillation(nn.Sequential(nn.Flatten(), nn.Linear(768, 7)), "soft"),
        )  # fmt: skip


def test_how_to_distil_must_be_said(toy_data, tmp_path, net):
    with pytest.raises(ReplivitError, match="does not say how to distil"):
        train(
            net(), toy_data, RECIPE, image_size=16, out=tmp_path, quiet=True,
            objective=Distillation(net()),
        )  # fmt: skip


def test_a_teacher_of_another_normalisation_is_refused(toy_data, tmp_path, net):
    teacher = net()
    teacher.pretrained_cfg = {
        "input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic", "crop_pct": 1.0,
    }  # fmt: skip
    with pytest.raises(ReplivitError, match=r"teacher wants images of mean \(0.5, 0.5, 0.5\)"):
        train(
            net(), toy_data, RECIPE, image_size=16, out=tmp_path, quiet=True,
            objective=Distillation(teacher, "hard"),
        )  # fmt: skip


def test_a_recipe_that_distils_needs_a_teacher(toy_data, net):
    with pytest.raises(ReplivitError, match="needs a teacher"):
        train(net(), toy_data, {**RECIPE, "distillation": "hard"}, image_size=16)


def test_teachers_come_from_the_registry_or_from_timm(toy_paper, tmp_path):
    from harness import build
    from harness.checkpoints import save_weights

    torch.manual_seed(1)
    original = build("toy_net")
    save_weights(original, tmp_path / "teacher.safetensors")
    teacher = load_teacher("toy_net", "fashion_mini", 4, 16, tmp_path / "teacher.safetensors")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(teacher(images), original.eval()(images))
    assert not teacher.training
    with pytest.raises(ReplivitError, match="ships no weights"):
        load_teacher("toy_net", "fashion_mini", 4)
    with pytest.raises(ReplivitError, match="no variant and no timm model 'regnety_61'"):
        load_teacher("regnety_61", "imagenet", 1000)


class Halves(Objective):
    """A step of its own: two backwards, each on half of the batch."""

    def step(self, model, images, targets, context):
        losses = []
        for half in (slice(None, 12), slice(12, None)):
            with context.autocast():
                loss = cross_entropy(model(images[half]), targets[half]) / 2
            context.backward(loss)
            losses.append(loss)
        return {"loss": sum(losses)}


class Whole(Objective):
    def loss(self, model, images, targets, context):
        return cross_entropy(model(images), targets)


def test_a_step_of_ones_own_adds_gradients_up(toy_data, tmp_path):
    weights = {}
    for name, objective, accumulation in (
        ("whole", Whole(), 1), ("halves", Halves(), 1), ("passes", Whole(), 2),
    ):  # fmt: skip
        torch.manual_seed(0)
        recipe = {**RECIPE, "optimizer": "sgd", "lr": 0.1, "accumulation": accumulation}
        run = train(
            Flat(), toy_data, recipe, image_size=16, out=tmp_path / name, quiet=True,
            objective=objective, evaluate=False,
        )  # fmt: skip
        weights[name] = run.model[1].weight.detach()
        assert run.history[0]["loss"] > 0
    torch.manual_seed(0)
    assert not torch.allclose(weights["whole"], Flat()[1].weight, atol=1e-3)
    assert torch.allclose(weights["whole"], weights["halves"], rtol=1e-4, atol=1e-6)
    assert torch.allclose(weights["whole"], weights["passes"], rtol=1e-4, atol=1e-6)


class Scaled(Objective):
    """Logits times a learned factor that lives in the objective."""

    def __init__(self):
        self.factor = nn.Parameter(torch.tensor(2.0))

    def parameters(self):
        return [{"params": [self.factor], "lr": 0.5}]

    def loss(self, model, images, targets, context):
        return {"loss": cross_entropy(self.factor * model(images), targets), "factor": self.factor}


def test_an_objective_may_train_parameters_of_its_own(toy_data, tmp_path):
    torch.manual_seed(0)
    objective = Scaled()
    rates = []

    class Watch(Callback):
        def on_step_end(self, context):
            rates.append([group["lr"] for group in context.optimizer.param_groups])

    run = train(
        Flat(), toy_data, {**RECIPE, "lr": 1e-3, "scheduler": "constant"}, image_size=16,
        out=tmp_path, quiet=True, objective=objective, callbacks=[Watch()], evaluate=False,
    )  # fmt: skip
    assert rates == 4 * [[1e-3, 1e-3, 0.5]]
    assert abs(objective.factor.item() - 2.0) > 0.1
    assert run.history[0]["factor"] > 0
