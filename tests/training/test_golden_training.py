"""The official training code of both EfficientFormers: losses, clipping, schedule, decay groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_tools import load_golden
from torch import nn

from harness.training import Recipe, distillation_loss
from harness.training.optim import Schedule, clip_gradients, weight_decay_groups

CASES = load_golden("efficientformer/training")["cases"]
RTOL = 1e-5


def cases(function: str) -> list:
    return [case for case in CASES if case["fn"] == function]


def normal(seed: int, shape: list[int], scale: float) -> torch.Tensor:
    values = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    return scale * torch.from_numpy(values)


def mixed_targets(labels: list[int], classes: int) -> torch.Tensor:
    """0.7 of the smoothed labels and 0.3 of the smoothed reversed labels, as mixup makes them."""
    smooth = 0.9 * nn.functional.one_hot(torch.tensor(labels), classes) + 0.1 / classes
    return 0.7 * smooth + 0.3 * smooth.flip(0)


@pytest.mark.parametrize("case", cases("distillation_loss"), ids=lambda case: case["in"]["type"])
def test_distillation_loss(case):
    given, wanted = case["in"], case["expected"]
    logits, logits_kd, teacher = (normal(seed, given["shape"], 2.0) for seed in (1, 2, 3))
    logits.requires_grad_()
    logits_kd.requires_grad_()
    if given["base"] == "soft_target":
        targets = mixed_targets(given["labels"], given["shape"][1])
    else:
        targets = torch.tensor(given["labels"])
    parts = distillation_loss(
        logits, logits_kd, teacher, targets, given["type"], given["alpha"], given["tau"]
    )
    parts["loss"].backward()
    assert parts["loss"].item() == pytest.approx(wanted["loss"], rel=RTOL)
    assert logits.grad.norm().item() == pytest.approx(wanted["grad_cls_l2"], rel=RTOL)
    if "grad_kd_l2" in wanted:
        assert logits_kd.grad.norm().item() == pytest.approx(wanted["grad_kd_l2"], rel=RTOL)
    else:
        assert logits_kd.grad is None


@pytest.mark.parametrize("case", cases("agc"), ids=lambda case: str(case["in"]["clip_factor"]))
def test_adaptive_gradient_clipping(case):
    given, wanted = case["in"], case["expected"]
    parameters = []
    for index, shape in enumerate(given["param_shapes"]):
        parameter = nn.Parameter(normal(10 + index, shape, 0.5))
        parameter.grad = normal(50 + index, shape, given["grad_scale"])
        parameters.append(parameter)
    clip_gradients(parameters, Recipe(clip="agc", clip_value=given["clip_factor"]))
    for parameter, total, norm in zip(
        parameters, wanted["grad_sum"], wanted["grad_l2"], strict=True
    ):
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=RTOL)
        assert parameter.grad.double().sum().item() == pytest.approx(total, abs=RTOL * norm)


@pytest.mark.parametrize("case", cases("lr_schedule"), ids=lambda case: str(case["in"]["epochs"]))
def test_learning_rate_of_every_epoch(case):
    given, wanted = case["in"], case["expected"]
    recipe = Recipe(
        epochs=given["epochs"],
        batch_size=given["batch_per_gpu"] * given["gpus"],
        lr=1e-3,
        lr_reference_batch=1024,
        warmup_epochs=5,
        warmup_lr=1e-5,
        min_lr=1e-5,
        lr_updates="epoch",
        lr_lag_epochs=1,
    )
    assert recipe.peak_lr == wanted["base_lr"]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.peak_lr)
    schedule = Schedule(optimizer, recipe, steps_per_epoch=10)
    used = []
    for epoch in range(recipe.epochs):
        schedule.set(epoch, step=7)
        used.append(optimizer.param_groups[0]["lr"])
    for epoch, rate in wanted["lr_used_in_epoch"].items():
        assert used[int(epoch)] == pytest.approx(rate, rel=1e-7)
    assert sum(used) == pytest.approx(wanted["lr_sum_over_epochs"], rel=1e-7)


def stand_in(entries: list) -> nn.Module:
    """A module with the float parameters of an official state dict: names and shapes only."""
    root = nn.Module()
    for name, shape, dtype in entries:
        *path, leaf = name.split(".")
        if not dtype.startswith("float") or leaf in ("running_mean", "running_var"):
            continue
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
    return root


@pytest.mark.parametrize(
    "case", cases("weight_decay_groups"), ids=lambda case: case["in"]["factory"]
)
def test_weight_decay_groups(case):
    file = {
        "efficientformer_l1": "efficientformer/l1",
        "efficientformerv2_s0": "efficientformer_v2/s0",
    }[case["in"]["factory"]]
    wanted = case["expected"]
    model = stand_in(load_golden(file)["state_dict"])
    recipe = Recipe(weight_decay=wanted["weight_decay"])
    groups = weight_decay_groups(model, recipe)
    by_decay = {group["weight_decay"]: group["params"] for group in groups}
    assert set(by_decay) == {0.0, wanted["weight_decay"]}
    decayed, kept = by_decay[wanted["weight_decay"]], by_decay[0.0]
    assert len(decayed) == wanted["decay_tensors"]
    assert len(kept) == wanted["no_decay_tensors"]
    assert sum(one.numel() for one in decayed) == wanted["decay_numel"]
    assert sum(one.numel() for one in kept) == wanted["no_decay_numel"]
    inside = {id(one) for one in decayed}
    for word, key in (
        ("layer_scale", "layer_scale_decayed"),
        ("attention_biases", "attention_biases_decayed"),
    ):
        found = {id(one) in inside for name, one in model.named_parameters() if word in name}
        assert found == {wanted[key]}
