"""EfficientFormerV2 as a module: caches, deployment form, sizes, interface, bad input."""

import copy
import re

import pytest
import torch
from golden_tools import filled_state_dict, load_golden
from timm.utils import ModelEmaV3
from torch import nn

import harness
from harness.checkpoints import load_official
from reproductions.efficientformer_v2 import attention
from reproductions.efficientformer_v2.model import ARCHITECTURES, efficientformer_v2


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- nothing goes stale --------------------------------------------------------------------------


@torch.inference_mode()
def test_weights_loaded_after_eval_count():
    images = torch.randn(1, 3, 32, 32)
    torch.manual_seed(0)
    source = randomised(efficientformer_v2(10, 32, size="micro")).eval()
    target = efficientformer_v2(10, 32, size="micro").eval()
    target(images)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(images), source(images))


@torch.inference_mode()
def test_an_averaged_copy_follows_its_model():
    images = torch.randn(1, 3, 32, 32)
    model = efficientformer_v2(10, 32, size="micro").eval()
    average = ModelEmaV3(model, decay=0.0)
    average.module(images)
    randomised(model)
    average.update(model)
    assert torch.equal(average.module(images), model(images))


def test_position_bias_learns_in_evaluation_mode():
    model = randomised(efficientformer_v2(10, 32, size="micro")).eval()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    tables = [m.attention_biases for m in model.modules() if hasattr(m, "attention_biases")]
    assert len(tables) == 3
    assert all(table.grad is not None and table.grad.abs().sum() > 0 for table in tables)


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Fresh values where a fresh model has zeros, ones or layer scales of 1e-5."""
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "attention_biases")):
            parameter.normal_(std=0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.normal_(1, 0.1)
            module.bias.normal_(std=0.1)
    return model


# ---- deployment form -----------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("size", ["micro", "s0"])
def test_deployed_outputs_are_equal(size):
    options = {"num_classes": 10, "image_size": 32} if size == "micro" else {"image_size": 96}
    torch.manual_seed(0)
    model = randomised(efficientformer_v2(size=size, **options)).eval()
    before = copy.deepcopy(model.state_dict())
    deployed = harness.deploy(model, options["image_size"])
    images = torch.randn(3, 3, *model.image_size)
    assert relative(deployed(images), model(images)) < 1e-5
    assert relative(deployed(images), model(images)) > 0  # it is another computation
    parts = list(deployed.modules())
    assert not any(isinstance(one, nn.BatchNorm2d) for one in parts)
    assert sum(isinstance(one, nn.Linear) for one in parts) == 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = harness.deploy(deployed, options["image_size"])
    assert torch.equal(again(images), deployed(images))


@torch.inference_mode()
def test_deployed_s0_has_as_many_parameters_as_a_folded_net_needs():
    deployed = harness.deploy(randomised(efficientformer_v2()), 224)
    kept = sum(one.numel() for one in deployed.parameters())
    # of 3,551,296 without norms go a head, the layer scales, the bias tables and 4 x 8 head biases
    assert kept == 3_551_296 - 177_000 - 1_984 - 3_136 - 4 * 8 - 352


# ---- interface and bad input ---------------------------------------------------------------------


def test_same_seed_same_network():
    def made():
        torch.manual_seed(3)
        return harness.build("efficientformer_v2_micro").state_dict()

    first, second = made(), made()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_initial_values():
    torch.manual_seed(0)
    model = efficientformer_v2()
    mlp = model.stages[3].blocks[0].mlp
    assert float(mlp.fc1.conv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not mlp.fc1.conv.bias.any() and mlp.mid.conv.bias.any()
    assert not any(
        m.attention_biases.any() for m in model.modules() if hasattr(m, "attention_biases")
    )
    scale = model.stages[0].blocks[0].ls2.gamma
    assert scale.shape == (32, 1, 1) and torch.allclose(scale, torch.tensor(1e-5))


def test_classifier_can_be_replaced_and_removed():
    model = harness.build("efficientformer_v2_s0", num_classes=7, image_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert model(images).shape == (2, 7)
        model.reset_classifier(0)
        assert model(images).shape == (2, 176) and model.num_classes == 0
        assert torch.equal(
            model(images), model.forward_head(model.forward_features(images), pre_logits=True)
        )


@pytest.mark.parametrize("image_size", [208, 240, (224, 200), 16])
def test_impossible_image_size(image_size):
    with pytest.raises(ValueError, match="multiple of 32"):
        harness.build("efficientformer_v2_s0", image_size=image_size)


@pytest.mark.parametrize("image_size", [0, -32, (224,), "224"])
def test_what_is_no_image_size(image_size):
    with pytest.raises(harness.ReplivitError, match="whole number of pixels"):
        harness.build("efficientformer_v2_s0", image_size=image_size)


def test_images_of_another_size():
    model = harness.build("efficientformer_v2_micro").eval()
    with pytest.raises(ValueError, match="built for images of 32x32, not 48x48"):
        model(torch.randn(1, 3, 48, 48))


def test_architecture_that_does_not_fit():
    architecture = vars(ARCHITECTURES["micro"])
    with pytest.raises(ValueError, match="stage 3 has 3 blocks but 2 expansions"):
        efficientformer_v2(
            architecture={**architecture, "expansions": [[4], [4, 4], [4, 3], [3, 3]]}
        )
    with pytest.raises(ValueError, match="attention_blocks"):
        efficientformer_v2(architecture={**architecture, "attention_blocks": [4, 1]})
    with pytest.raises(ValueError, match="no size 's9'"):
        efficientformer_v2(size="s9")
    with pytest.raises(ValueError, match="must be multiples of 2"):
        attention.Attention4D(8, 7, stride=2)


def test_wrong_checkpoints_are_named():
    with pytest.raises(
        harness.ReplivitError, match=r"no EfficientFormerV2.*'blocks.0.norm1.weight'"
    ):
        load_official("efficientformer_v2_s0", {"blocks.0.norm1.weight": torch.zeros(3)})
    first = {"patch_embed.0.weight": torch.zeros(24, 3, 3, 3), "norm.weight": torch.zeros(448)}
    with pytest.raises(harness.ReplivitError, match="is it the first EfficientFormer"):
        load_official("efficientformer_v2_s0", first)
    fixture = load_golden("efficientformer_v2/s2")
    with pytest.raises(harness.ReplivitError, match=re.escape("efficientformer_v2_s2")):
        load_official("efficientformer_v2_s0", filled_state_dict(fixture["state_dict"]))
