"""The deployment form: what folds, what must not, and that outputs never change."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from deployment_tools import norms_left, shake
from timm.layers import BatchNormAct2d, Conv2dSame, ConvNormAct
from torch import nn
from torch.nn.utils import parametrizations

import harness
from harness.deployment import deploy, fold_batch_norms, relative_error
from harness.errors import ReplivitError


class Siblings(nn.Module):
    """Convolution and norm as attributes; `peek` adds a second reader of the convolution."""

    def __init__(self, peek: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.peek = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), peek

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x if self.peek else self.norm(x)


class Tokens(nn.Module):
    """A batch norm over as many tokens as there are channels: axis 1 is not the channels'."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(self.linear(x))


class Tied(nn.Module):
    """Two convolutions with one weight, each with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.weight
        self.norm_a, self.norm_b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm_b(self.b(self.norm_a(self.a(x))))


class Peeking(nn.Module):
    """A parent that reads its convolution's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        return self.block(x) * self.block[0].weight.sum()


class Twice(nn.Module):
    """One convolution called twice, before two different norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm_b(self.conv(self.norm_a(self.conv(x))))


class Doubling(nn.Conv2d):
    """A convolution that is not one."""

    def forward(self, x):
        return super().forward(x) ** 2


FOLDS = {
    "sequential": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    "no affine": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)),
    "padded": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)),
    "same padding of timm": lambda: nn.Sequential(Conv2dSame(3, 4, 3, 2), nn.BatchNorm2d(4)),
    "siblings": Siblings,
    "timm with activation": lambda: ConvNormAct(3, 4, 3),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5)),
    "norm before linear": lambda: nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 5)
    ),
    "norm before convolution": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)),
}
STAYS = {
    "zero border": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)),
    "norm before depthwise": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1, groups=3)),
    "activation between": lambda: nn.Sequential(BatchNormAct2d(3), nn.Conv2d(3, 4, 1)),
    "read twice": lambda: Siblings(peek=True),
    "called twice": Twice,
    "tied": Tied,
    "weight read outside": Peeking,
    "subclass": lambda: nn.Sequential(Doubling(3, 4, 1), nn.BatchNorm2d(4)),
    "parametrized": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)
    ),
    "batch statistics": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    ),
}


@pytest.mark.parametrize("make", FOLDS.values(), ids=FOLDS)
def test_norm_folds_away(make):
    model = shake(make())
    images = torch.randn(4, 3, 8, 8)
    deployed = deploy(model, image_size=8)
    assert norms_left(model) == 1, "the original must stay as it is"
    assert norms_left(deployed) == 0
    assert len(deployed.deploy_report.folded) == 1
    assert relative_error(deployed(images), model(images)) < 1e-5


@pytest.mark.parametrize("make", STAYS.values(), ids=STAYS)
def test_norm_that_cannot_fold_stays(make):
    model = shake(make())
    count = norms_left(model)
    deployed = deploy(model, image_size=8)
    assert norms_left(deployed) == count
    images = torch.randn(4, 3, 8, 8)
    assert relative_error(deployed(images), model(images)) < 1e-6


def test_norm_over_tokens_stays():
    model, tokens = shake(Tokens()), torch.randn(2, 8, 8)
    deployed = deploy(model, example_inputs=[tokens])
    assert norms_left(deployed) == 1
    assert torch.equal(deployed(tokens), model(tokens))


def test_hooked_layer_stays():
    model = shake(Siblings())
    model.conv.register_forward_hook(lambda module, args, output: output + 1)
    deployed = deploy(model, image_size=8)
    images = torch.randn(2, 3, 8, 8)
    assert norms_left(deployed) == 1
    assert torch.equal(deployed(images), model(images))


def test_watching_leaves_no_hooks():
    model = shake(Siblings())
    fold_batch_norms(model, [torch.randn(1, 3, 8, 8)])
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


@pytest.mark.parametrize(
    ("name", "size", "norms"),
    [
        ("mobilenetv2_100", 64, 52),
        ("mobilenetv2_140", 64, 52),
        ("efficientnet_b0", 64, 49),
        ("resnet50", 64, 53),
        ("swin_t", 64, 0),
        ("deit_ti_distilled", 64, 0),
        ("vit_micro", 32, 0),
    ],
)
def test_reference_rows(name, size, norms):
    torch.manual_seed(0)
    model = shake(harness.build(name, image_size=size))
    deployed = deploy(model)  # the size is the model's own
    assert norms_left(deployed) == 0
    assert len(deployed.deploy_report.folded) == norms
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert relative_error(deployed(images), model(images)) < 1e-5
    count = sum(one.numel() for one in model.parameters())
    assert sum(one.numel() for one in deployed.parameters()) <= count


def test_swin_gathers_its_tables_once():
    torch.manual_seed(0)
    model = harness.build("swin_t", image_size=64).eval()
    deployed = deploy(model)
    assert len(deployed.deploy_report.fused) == len(deployed.deploy_report.tables) == 12
    bias = deployed.layers[0].blocks[0].attn._get_rel_pos_bias()
    assert bias is deployed.layers[0].blocks[0].attn._get_rel_pos_bias()
    assert torch.equal(bias, model.layers[0].blocks[0].attn._get_rel_pos_bias())
    moved = copy.deepcopy(deployed).double()
    assert moved.layers[0].blocks[0].attn._get_rel_pos_bias().dtype == torch.float64


def test_form_of_the_copy():
    model = shake(harness.build("mobilenetv2_100", image_size=32)).train()
    before = copy.deepcopy(model.state_dict())
    deployed = deploy(model)
    assert model.training and all(one.requires_grad for one in model.parameters())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert deployed.deployed is True and not deployed.training
    assert not any(one.requires_grad for one in deployed.parameters())
    assert deployed.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert "52 batch norms folded" in str(deployed.deploy_report)
    assert deployed.pretrained_cfg == model.pretrained_cfg


def test_survives_copies_pickle_and_a_second_deploy():
    model = shake(harness.build("swin_t", image_size=64))
    deployed = deploy(model)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = deployed(images)
        for other in (
            copy.deepcopy(deployed),
            pickle.loads(pickle.dumps(deployed)),
            deploy(deployed),
        ):
            assert torch.equal(other(images), expected)


def test_random_state_is_untouched():
    torch.manual_seed(3)
    model = shake(Siblings())
    state = torch.get_rng_state()
    deploy(model, image_size=8)
    assert torch.equal(torch.get_rng_state(), state)


def test_any_module_comes_back_as_a_copy():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    deployed = deploy(model, image_size=2)
    images = torch.randn(3, 3, 2, 2)
    assert deployed is not model and deployed[1].weight is not model[1].weight
    assert torch.equal(deployed(images), model(images))
    assert deployed.deploy_report.relative_error == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.half(), r"fold in float32"),
        (lambda model: model.bfloat16(), r"fold in float32"),
        (lambda model: model.to("meta"), r"no weights yet"),
    ],
)
def test_what_cannot_be_checked_is_refused(change, message):
    with pytest.raises(ReplivitError, match=message):
        deploy(change(Siblings()), image_size=8)


def test_image_size_must_be_known_and_fit():
    with pytest.raises(ReplivitError, match="give image_size"):
        deploy(Siblings())
    with pytest.raises(ReplivitError, match="the model itself fails"):
        deploy(harness.build("vit_micro"), image_size=64)


def test_outputs_that_are_zero_prove_nothing():
    last = nn.Conv2d(4, 2, 1)
    model = shake(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), last))
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    with pytest.raises(ReplivitError, match="outputs are all zero"):
        deploy(model, image_size=8)
    model[1] = nn.Identity()
    assert deploy(model, image_size=8).deployed, "nothing was folded, so nothing is in doubt"


def test_double_precision():
    model = shake(Siblings()).double()
    deployed = deploy(model, image_size=8)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert relative_error(deployed(images), model(images)) < 1e-14


def test_other_models_of_timm():
    """Hybrids whose norms sit in unusual places keep their outputs and lose their norms."""
    for name, left in (("repvit_m1", 0), ("mobilevitv2_050", 0), ("resnetv2_50", 17)):
        torch.manual_seed(0)
        deployed = deploy(shake(timm.create_model(name)), image_size=64)
        assert norms_left(deployed) == left, name
