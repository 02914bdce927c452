"""What every variant of every paper must do, whatever its method.

Small variants run on the CPU. Large ones are built on the device "meta": shapes, names and counts
are real there, and cost nothing.
"""

from __future__ import annotations

import copy
import inspect

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import harness
import reproductions  # noqa: F401  (offers the variants to timm)
from harness import registry
from harness.data import input_spec
from harness.errors import ReplivitError
from harness.measurement.macs import count_macs
from harness.measurement.macs_fvcore import count_macs_fvcore
from harness.measurement.memory import training_memory
from harness.meta import on_meta

VARIANTS = [variant.name for variant in harness.variants()]
SMALL = [variant.name for variant in harness.variants() if variant.track != "imagenet"]
LARGE = [name for name in VARIANTS if name not in SMALL]
#: The small tracks' bounds, for a fair and quick comparison.
MICRO_PARAMS, MICRO_MACS = 600_000, 30_000_000

every = pytest.mark.parametrize("name", VARIANTS)
small = pytest.mark.parametrize("name", SMALL)


def build_on_meta(name: str, **options) -> nn.Module:
    with on_meta():
        return harness.build(name, **options).eval()


def images_for(model: nn.Module, batch: int = 2, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *model.pretrained_cfg["input_size"], generator=generator).to(device)


def build_small(name: str, seed: int = 0) -> nn.Module:
    """A variant as after some training: what starts at zero (heads, layer scales) hides nothing."""
    torch.manual_seed(seed)
    model = harness.build(name).eval()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.05 * torch.randn_like(one))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def test_no_paper_is_broken():
    assert [(paper.key, paper.broken) for paper in harness.papers() if paper.broken] == []
    assert SMALL and LARGE


@every
def test_interface_of_timm(name):
    """Classes are honoured; `forward` is `forward_head` after `forward_features`; heads change."""
    model = build_on_meta(name, num_classes=7)
    images = images_for(model, device="meta")
    features = model.forward_features(images)
    assert model.num_classes == 7 and model.forward_head(features).shape == (2, 7)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape[0] == 2 and pooled.shape[-1] == model.num_features
    with on_meta():
        model.reset_classifier(3)
    assert model.num_classes == 3 and model(images).shape == (2, 3)


@every
def test_pretrained_cfg_says_what_timm_needs(name):
    variant = registry.get_variant(name)
    model = build_on_meta(name)
    config = timm.data.resolve_data_config({}, model=model)
    spec = input_spec(variant)
    assert config["input_size"] == (3, variant.spec.image_size, variant.spec.image_size)
    assert (config["mean"], config["std"]) == (spec.mean, spec.std)
    assert (config["interpolation"], config["crop_pct"]) == (spec.interpolation, spec.crop_pct)
    assert timm.get_pretrained_cfg(f"replivit_{name}").input_size == config["input_size"]


@every
def test_builder_documents_itself_and_refuses_unknown_options(name):
    variant = registry.get_variant(name)
    builder = variant.paper.resolve(variant.spec.build)
    assert inspect.getdoc(builder), f"{variant.spec.build} has no docstring"
    with pytest.raises(ReplivitError, match=f"{name} takes no option 'no_such_option'"):
        harness.build(name, no_such_option=1)


@every
def test_input_has_three_channels(name):
    with pytest.raises(ReplivitError, match="takes no option 'in_chans'"):
        timm.create_model(f"replivit_{name}", in_chans=1)


@small
def test_same_seed_same_model(name):
    def built(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return harness.build(name).state_dict()

    one, two, other = built(0), built(0), built(1)
    assert list(one) == list(two)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@small
@torch.no_grad()
def test_eval_is_deterministic_and_batch_independent(name):
    model = build_small(name)
    images = images_for(model, batch=3)
    logits = model(images)
    assert logits.isfinite().all()
    assert torch.equal(model(images), logits)
    # one by one, logits near 0 too: matrix products of one and of three images add up differently
    torch.testing.assert_close(model(images[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[1]), "the image must matter"


@small
@torch.no_grad()
def test_head_after_features_is_forward(name):
    model = build_small(name)
    images = images_for(model)
    assert torch.equal(model.forward_head(model.forward_features(images)), model(images))


@small
def test_every_parameter_gets_a_gradient(name):
    model = build_small(name).train()
    outputs = model(images_for(model, batch=4))
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    sum(one.square().mean() for one in outputs).backward()
    idle = [key for key, one in model.named_parameters() if one.grad is None or not one.grad.any()]
    assert idle == []
    assert all(one.grad.isfinite().all() for one in model.parameters())


@small
def test_a_step_of_plain_training_can_be_measured(name):
    model = harness.build(name)
    before = copy.deepcopy(model.state_dict())
    training_memory(model, [images_for(model)] * 2)
    assert any((value != before[key]).any() for key, value in model.state_dict().items())


@small
@torch.no_grad()
def test_state_dict_round_trip(name):
    first, second = build_small(name, 0), build_small(name, 1)
    images = images_for(first)
    assert not torch.equal(first(images), second(images))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images), second(images))


@small
@torch.no_grad()
def test_copies_are_independent(name):
    model = build_small(name)
    images = images_for(model)
    expected = model(images)
    other = copy.deepcopy(model)
    for one in other.parameters():
        one.zero_()
    assert torch.equal(model(images), expected)
    assert not torch.equal(other(images), expected)


@small
def test_timm_creates_the_same_model(name):
    torch.manual_seed(0)
    ours = harness.build(name).state_dict()
    torch.manual_seed(0)
    theirs = timm.create_model(f"replivit_{name}", drop_rate=0.0, in_chans=3).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@small
@torch.no_grad()
def test_deployed_form_computes_the_same(name):
    model = build_small(name)
    deployed = harness.deploy(model)
    images = images_for(model, batch=3)
    expected = model(images)
    assert (deployed(images) - expected).norm() <= 1e-5 * expected.norm()


@small
@torch.no_grad()
def test_exports_as_a_program(name):
    model = build_small(name)
    images = images_for(model)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images))


@small
def test_small_tracks_stay_small(name):
    model = build_small(name)
    params = sum(one.numel() for one in model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images_for(model, batch=1))
    assert params <= MICRO_PARAMS
    assert counter.get_total_flops() / 2 <= MICRO_MACS


@small
def test_fvcore_counts_it_too(name):
    """Its count follows a trace, where a length read from a shape is no plain number."""
    model = build_small(name)
    image = images_for(model, batch=1).shape[-1]
    seen, executed = count_macs_fvcore(model, image).total, count_macs(model, image).total
    assert 0.7 < seen / executed < 1.3
