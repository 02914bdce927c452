"""EfficientFormer as a module: bias maps, deployment form, sizes, what timm's scripts use."""

import copy

import pytest
import torch
from golden_tools import (
    load_golden,
)
from timm.utils import ModelEmaV3
from torch import nn

import harness
from reproductions.efficientformer import blocks
from reproductions.efficientformer.model import EfficientFormer

SIZES = ["l1", "l3"]


# ---- the bias map is never stale -----------------------------------------------------------------


def small(**options) -> EfficientFormer:
    """A network with large layer scales and linears, so that attention shows in the logits."""
    torch.manual_seed(0)
    options = {"layer_scale_init_value": 1.0, "distillation": False, **options}
    model = EfficientFormer(
        [1, 1, 2], [16, 16, 32], 1, 5, 32, strides=(2, 1), key_dim=8, num_heads=2, attn_ratio=2,
        **options,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    return model


IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def biased(model: EfficientFormer) -> EfficientFormer:
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    table = model.network[4][-1].token_mixer.attention_biases
    with torch.no_grad():
        table.copy_(3 * torch.randn(table.shape, generator=generator))
    return model


def reload_in_eval(model, target):
    model.eval()(IMAGE)
    model.load_state_dict(target.state_dict())
    return model


def copied_after_use(model, target):
    model.eval()(IMAGE)
    return reload_in_eval(copy.deepcopy(model), target)


def averaged(model, target):
    ema = ModelEmaV3(model.eval(), decay=0.0)
    ema.module(IMAGE)
    ema.update(target)
    return ema.module


def written_through_data(model, target):
    model.eval()(IMAGE)
    for own, other in zip(model.parameters(), target.parameters(), strict=True):
        own.data.copy_(other.data)
    return model


def moved(model, target):
    model.eval()(IMAGE)
    model.load_state_dict(target.state_dict())
    return model.double().float()


@pytest.mark.parametrize(
    "way", [reload_in_eval, copied_after_use, averaged, written_through_data, moved]
)
def test_bias_map_follows_the_weights(way):
    target = biased(small()).eval()
    with torch.no_grad():
        expected, before = target(IMAGE), small().eval()(IMAGE)
        assert not torch.allclose(before, expected, atol=1e-3), "biases must matter here"
        assert torch.equal(way(small(), target)(IMAGE), expected)


def test_mode_switches_return_the_module():
    attention = blocks.Attention(16, resolution=2)
    assert attention.eval() is attention and attention.train() is attention


# ---- deployment ----------------------------------------------------------------------------------


def shaken(model: nn.Module) -> nn.Module:
    """Norms, biases and scales away from their initial values, where folding would be invisible."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1:
            noise = 0.1 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise + (1 if name.endswith(("norm.weight", "running_var")) else 0.5))
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"distillation": True}, {"token_mixer": "depthwise"}])
def test_deployment_form_is_equal(options):
    model = shaken(biased(small(**options)))
    deployed = harness.deploy(model, 32)
    with torch.inference_mode():
        ours, reference = deployed(IMAGE), model(IMAGE)
    assert (ours - reference).norm() <= 1e-5 * reference.norm()
    kinds = [type(one) for one in deployed.modules()]
    assert nn.BatchNorm2d not in kinds
    assert deployed.dist_head is None
    scales = [name for name, _ in deployed.named_parameters() if "layer_scale_2" in name]
    assert not scales and len(dict(model.named_parameters())) > len(
        dict(deployed.named_parameters())
    )


# ---- building ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 100, (64, 96), 33])
def test_other_image_sizes(size):
    model = EfficientFormer([1, 1, 1, 2], [16, 16, 16, 16], 1, 4, size).eval()
    height, width = (size, size) if isinstance(size, int) else size
    tokens = -(-height // 32) * -(-width // 32)
    image = torch.randn(1, 3, height, width)
    with torch.no_grad():
        assert model.forward_features(image).shape == (1, tokens, 16)
        assert model(image).shape == (1, 4)


def test_wrong_image_is_a_sentence():
    with pytest.raises(ValueError, match=r"map of 4x4, the image gives 6x6.*image_size"):
        small()(torch.zeros(1, 3, 48, 48))


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (dict(depths=[1, 2], widths=[16], num_3d=1), "2 depths, 1 widths"),
        (dict(depths=[1, 2], widths=[16, 16], num_3d=3), "between 0 and the depths"),
        (dict(depths=[1, 2], widths=[16, 16], image_size=0), "too small"),
        (dict(depths=[1, 2], widths=[16, 16], token_mixer="none"), "known: pool, identity"),
    ],
)
def test_impossible_networks_are_sentences(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        EfficientFormer(**arguments)


def test_unknown_option_is_a_sentence():
    with pytest.raises(harness.ReplivitError, match="takes no option 'resolution'"):
        harness.build("efficientformer_l1", resolution=7)


def test_deterministic_under_a_seed():
    first, second, other = small(), small(), small()
    torch.manual_seed(1)
    other = EfficientFormer([1, 1, 2], [16, 16, 32], 1, 5, 32, strides=(2, 1))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert not torch.equal(first.patch_embed[0].weight, other.patch_embed[0].weight)


def test_initialisation_is_the_authors():
    torch.manual_seed(0)
    model = EfficientFormer([1, 1, 1, 2], [64, 64, 64, 64], 1)
    mlp, attention = model.network[0][0].mlp, model.network[6][-1].token_mixer
    for weight in (mlp.fc1.weight, attention.qkv.weight, model.head.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(model.network[1].proj.weight.detach().std()) == pytest.approx(
        (64 * 9 * 3) ** -0.5, rel=0.1
    )
    assert float(model.network[0][0].layer_scale_1.detach().min()) == pytest.approx(1e-5)
    zeros = (mlp.fc1.bias, attention.qkv.bias, attention.attention_biases, model.head.bias)
    assert all(not one.any() for one in zeros)


def test_drop_path_rises_linearly_over_all_blocks():
    model = EfficientFormer([2, 1, 1, 2], [16] * 4, 1, drop_path_rate=0.5)
    rates = [getattr(one.drop_path, "drop_prob", 0.0) for one in model.modules()
             if isinstance(one, blocks.Block)]  # fmt: skip
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_attention_before_the_last_stage_goes_back_to_a_map():
    model = EfficientFormer([1, 2], [16, 16], [1, 2], 3, 32, strides=(2, 2)).eval()
    names = [type(one).__name__ for one in model.network[0]]
    assert names == ["Flatten", "Meta3D", "Unflatten"]
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


# ---- what timm's scripts use ---------------------------------------------------------------------


def test_timm_interface():
    model = harness.build("efficientformer_l1", num_classes=7)
    head, distilled = model.get_classifier()
    assert head.out_features == distilled.out_features == 7
    model.reset_classifier(0)
    with torch.inference_mode():
        features = model.eval()(torch.zeros(1, 3, 224, 224))
    assert features.shape == (1, model.num_features) == (1, 448)
    model.reset_classifier(3)
    assert model.head.out_features == model.num_classes == 3
    with pytest.raises(ValueError, match="pools by the mean"):
        model.reset_classifier(3, "max")


def test_distilled_training_can_be_switched_off():
    model = small(distillation=True).train()
    assert isinstance(model(IMAGE), tuple)
    model.set_distilled_training(False)
    assert model(IMAGE).shape == (2, 5)


def test_weight_decay_groups_are_the_official_ones():
    from timm.optim import param_groups_weight_decay

    cases = load_golden("efficientformer/training")["cases"]
    case = next(one for one in cases if one["fn"] == "weight_decay_groups")
    assert case["in"]["factory"] == "efficientformer_l1"
    model = harness.build("efficientformer_l1")
    plain, decayed = param_groups_weight_decay(
        model, 0.025, no_weight_decay_list=model.no_weight_decay()
    )
    expected = case["expected"]
    assert len(decayed["params"]) == expected["decay_tensors"]
    assert len(plain["params"]) == expected["no_decay_tensors"]
    assert sum(one.numel() for one in decayed["params"]) == expected["decay_numel"]
    assert sum(one.numel() for one in plain["params"]) == expected["no_decay_numel"]


def test_group_matcher_puts_every_parameter_into_a_layer():
    from timm.models import group_parameters

    model = harness.build("efficientformer_l1")
    layers = group_parameters(model, model.group_matcher())
    names = {name for group in layers.values() for name in group}
    assert names == {name for name, _ in model.named_parameters()}
    assert len(layers) > 15
