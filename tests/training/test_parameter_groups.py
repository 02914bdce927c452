"""Recipes whose parameters learn at rates of their own."""

import pytest
import torch
from training_tools import Net

from harness.errors import ReplivitError
from harness.training import Recipe
from harness.training.optim import Schedule, create_optimizer, weight_decay_groups

RULES = [
    {"match": ["head.*"]},
    {"match": ["stem.bias"], "lr_scale": 0},
    {"match": ["*"], "lr_scale": 0.1, "frozen_epochs": 2},
]


def recipe(**values) -> Recipe:
    return Recipe(name="grouped", lr=1e-2, parameter_groups=RULES, **values)


def names_of(model, groups) -> dict[tuple, list[str]]:
    names = {id(one): name for name, one in model.named_parameters()}
    return {
        (one["lr_scale"], one["frozen_epochs"], one["weight_decay"]): [
            names[id(parameter)] for parameter in one["params"]
        ]
        for one in groups
    }


def test_the_first_rule_that_matches_holds():
    model = Net()
    assert names_of(model, weight_decay_groups(model, recipe(weight_decay=0.3))) == {
        (0.1, 2, 0.3): ["stem.weight"],
        (0.1, 2, 0.0): ["norm.weight", "norm.bias"],
        (1.0, 0, 0.3): ["head.weight"],
        (1.0, 0, 0.0): ["head.bias"],
    }


def test_frozen_parameters_are_in_no_group():
    model = Net()
    model.stem.weight.requires_grad_(False)
    groups = names_of(model, weight_decay_groups(model, recipe()))
    assert all("stem.weight" not in names for names in groups.values())


@pytest.mark.parametrize("updates", ["step", "epoch"])
@pytest.mark.parametrize("scheduler", ["cosine", "cosine_after_warmup", "constant"])
def test_rates_follow_the_schedule(scheduler, updates):
    own = recipe(epochs=6, warmup_epochs=1, scheduler=scheduler, lr_updates=updates)
    optimizer = create_optimizer(Net(), own)
    schedule = Schedule(optimizer, own, steps_per_epoch=4)
    for epoch in range(6):
        for step in range(4):
            schedule.set(epoch, step)
            rates = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
            assert rates[0.1] == (0 if epoch < 2 else pytest.approx(0.1 * rates[1.0]))
            assert rates[1.0] > 0 or (epoch, step) == (0, 0)


def test_what_is_frozen_does_not_move():
    own = recipe(epochs=3, warmup_epochs=0)
    model = Net().eval()
    before = {key: one.clone() for key, one in model.state_dict().items()}
    optimizer = create_optimizer(model, own)
    schedule = Schedule(optimizer, own, steps_per_epoch=1)
    for epoch in range(3):
        schedule.set(epoch, 0)
        optimizer.zero_grad()
        model(torch.ones(2, 3, 16, 16)).square().sum().backward()
        optimizer.step()
        after = model.state_dict()
        assert not torch.equal(after["head.weight"], before["head.weight"])
        assert torch.equal(after["stem.weight"], before["stem.weight"]) == (epoch < 2)
        assert torch.equal(after["stem.bias"], before["stem.bias"])


def test_cosine_after_warmup_starts_at_the_peak():
    own = Recipe(
        lr=1e-2, epochs=4, warmup_epochs=1, warmup_lr=0.0, min_lr=1e-4,
        scheduler="cosine_after_warmup",
    )  # fmt: skip
    optimizer = create_optimizer(Net(), own)
    schedule = Schedule(optimizer, own, steps_per_epoch=5)
    rates = []
    for update in range(20):
        schedule.set(*divmod(update, 5))
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 0 and rates[4] == rates[5] == pytest.approx(1e-2)
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] > 1e-4


def test_a_rule_for_nothing_names_its_pattern():
    rules = [{"match": ["body.*"], "lr_scale": 0.5}]
    with pytest.raises(ReplivitError, match=r"parameter_groups\.0: 'body\.\*' matches no"):
        weight_decay_groups(Net(), Recipe(name="typo", parameter_groups=rules))
    absent = [{"match": ["new_module.*"]}, {"match": ["*"], "lr_scale": 0.5}]
    assert weight_decay_groups(Net(), Recipe(parameter_groups=absent))
