"""The deployment form's parts: foldings of a network's own, the algebra, and the check."""

from __future__ import annotations

import copy

import pytest
import torch
from deployment_tools import shake
from torch import nn

from harness.deployment import (
    TOLERANCE,
    batch_norm_affine,
    deploy,
    fold_after,
    fold_before,
    relative_error,
)
from harness.errors import ReplivitError

LOG: list[str] = []


class Part(nn.Module):
    """A part that doubles; when it folds it writes its name to the log and gets a new factor."""

    def __init__(self, name: str, *parts: nn.Module, folded_factor: float = 2.0) -> None:
        super().__init__()
        self.name, self.parts = name, nn.Sequential(*parts)
        self.factor, self.folded_factor = 2.0, folded_factor

    def forward(self, x):
        return self.factor * self.parts(x)

    def deploy_(self) -> None:
        LOG.append(self.name)
        self.factor = self.folded_factor


def test_own_folding_goes_children_first_and_once():
    LOG.clear()
    shared = Part("shared")
    model = Part("root", Part("left", shared), Part("right", shared))
    deployed = deploy(model, image_size=4)
    assert LOG == ["shared", "left", "right", "root"]
    assert deployed.deploy_report.own == ["parts.0.parts.0", "parts.0", "parts.1", "Part"]


def test_own_folding_that_changes_outputs_is_refused():
    with pytest.raises(ReplivitError, match=r"own deploy_\(\) changed the outputs by 5\.0e-01"):
        deploy(Part("wrong", folded_factor=3.0), image_size=4)


class Breaking(nn.Module):
    def forward(self, x):
        return x if not hasattr(self, "broken") else x @ torch.ones(99)

    def deploy_(self) -> None:
        self.broken = True


def test_own_folding_that_breaks_the_model_is_one_sentence():
    with pytest.raises(ReplivitError, match=r"own deploy_\(\) fails \(.*size") as caught:
        deploy(Breaking(), image_size=4)
    assert "\n" not in str(caught.value)


class NewHead(nn.Module):
    """A batch norm that can be folded, before a classifier that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


class WronglyFolded(NewHead):
    """As above, with a folding of its own that changes the function."""

    def deploy_(self):
        self.conv.weight.data.mul_(2)


def test_a_classifier_that_starts_at_zero_is_folded_and_still_checked():
    model = NewHead()
    with torch.no_grad():
        model.norm.running_mean.normal_()
    folded = deploy(model, 8)
    assert folded.deploy_report.folded and not folded.head.weight.any()
    assert 0 < folded.deploy_report.relative_error < TOLERANCE
    with pytest.raises(ReplivitError, match="changed the outputs"):
        deploy(WronglyFolded(), 8)


def test_helpers_fold_exactly():
    torch.manual_seed(0)
    layer, scale, shift = nn.Linear(4, 4), torch.randn(4), torch.randn(4)
    after, before = copy.deepcopy(layer), copy.deepcopy(layer)
    fold_after(after, scale, shift)
    fold_before(before, scale, shift)
    x = torch.randn(5, 4)
    torch.testing.assert_close(after(x), layer(x) * scale + shift)
    torch.testing.assert_close(before(x), layer(x * scale + shift))
    with pytest.raises(ValueError, match="unpadded"):
        fold_before(nn.Conv2d(4, 4, 3, padding=1), scale, shift)


def test_batch_norm_affine_is_the_norm():
    norm = shake(nn.BatchNorm2d(6)).double()
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    scale, shift = (one.view(1, -1, 1, 1) for one in batch_norm_affine(norm))
    torch.testing.assert_close(norm(x), x * scale + shift, rtol=1e-12, atol=1e-12)


def test_relative_error_sees_every_difference():
    one = torch.ones(4)
    assert relative_error(one, one) == 0
    assert relative_error([one, {"a": one * 1.1}], [one, {"a": one}]) == pytest.approx(0.1, 1e-5)
    for other in (torch.ones(3), (one, one), torch.tensor(float("nan")).expand(4), None):
        assert relative_error(other, one) == float("inf")
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
