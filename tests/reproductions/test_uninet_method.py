"""UniNet's operators, down-sampling modules and free configurations, apart from the fixtures."""

import copy
import math

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F

import harness
from harness.deployment import deploy, relative_error
from harness.meta import on_meta
from harness.registry import get_variant
from harness.training.recipe import read_recipe
from reproductions.uninet.blocks import AttentionBlock, ConvBlock, DWConvBlock, MlpBlock
from reproductions.uninet.downsampling import GlobalDSM, LocalDSM, LocalGlobalDSM
from reproductions.uninet.layers import SqueezeExcite, map_of, tokens_of
from reproductions.uninet.model import (
    ARCHITECTURES,
    DOWNSAMPLERS,
    OPERATORS,
    Architecture,
    UniNet,
    uninet,
)

TINY = Architecture(
    block_ops=("dw", "attn"), ds_ops=("lg",), repeats=(1, 1), channels=(16, 32),
    expansion=(2, 2), strides=(1, 2), stem_dim=16, final_head_dim=24, head_dim=16,
)  # fmt: skip


def tiny(**changes) -> UniNet:
    torch.manual_seed(0)
    return stirred(uninet(5, 16, architecture=TINY, **changes))


def stirred(module: nn.Module) -> nn.Module:
    """As after some training: what starts at zero hides nothing."""
    with torch.no_grad():
        for one in module.parameters():
            one.add_(0.1 * torch.randn_like(one))
        for one in module.modules():
            if isinstance(one, nn.BatchNorm2d):
                one.running_mean.normal_(0, 0.2)
                one.running_var.uniform_(0.5, 1.5)
    return module.eval()


# ---- operators -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("out_dim", "stride"), [(32, 1), (48, 1), (32, 2)])
def test_every_operator_takes_the_same_numbers(name, out_dim, stride):
    block = stirred(OPERATORS[name](32, out_dim, 2.5, stride, head_dim=16, grid=(7, 5)))
    x = torch.randn(2, 32, 7, 5)
    y = block(x)
    assert y.shape == (2, out_dim, math.ceil(7 / stride), math.ceil(5 / stride))
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last)), y)


@torch.no_grad()
def test_attention_branch_that_changes_the_width_by_its_formula():
    block = stirred(AttentionBlock(32, 48, stride=2, head_dim=16))
    x = torch.randn(2, 32, 9, 9)
    moved = x + block.pos_embed(x)
    normed = block.norm1(moved.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    tokens = tokens_of(F.max_pool2d(normed, 3, 2, 1))
    q, k, v = (
        one.unflatten(2, (2, 16)).transpose(1, 2) for one in block.mixer.qkv(tokens).chunk(3, -1)
    )
    attended = (q @ k.transpose(2, 3) / 4).softmax(-1) @ v
    branch = block.mixer.proj(attended.transpose(1, 2).flatten(2))
    residual = block.residual.conv(F.max_pool2d(moved, 3, 2, 1))
    wanted = residual + map_of(block.gamma_1 * branch, (5, 5))
    torch.testing.assert_close(block(x), wanted)
    assert not hasattr(block, "mlp")


@torch.no_grad()
def test_mlp_operator_mixes_places_and_keeps_channels_apart():
    block = stirred(MlpBlock(16, 16, 2, grid=(4, 4)))
    tokens = torch.randn(2, 16, 16)
    mixed = block.mixer(tokens)
    one_channel = tokens.clone()
    one_channel[..., 3] += 1
    changed = (block.mixer(one_channel) - mixed).abs().amax((0, 1)) > 0
    assert changed.nonzero().flatten().tolist() == [3]
    pixel = torch.randn(1, 16, 4, 4)
    other = pixel.clone()
    other[..., 0, 0] += 1
    assert ((block(other) - block(pixel)).abs().sum(1) > 0).all(), "every place sees every other"


def test_mlp_operator_is_made_for_one_map():
    with pytest.raises(ValueError, match="say its grid"):
        MlpBlock(16, 16)
    model = uninet(5, 16, architecture=TINY, block_ops=["dw", "mlp"]).eval()
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 5)
    with pytest.raises(ValueError, match="a map of 4x4, not 5x4; build the model with the image_"):
        model(torch.randn(1, 3, 18, 16))


def test_layer_scales_and_zero_start():
    block = AttentionBlock(32, 32)
    assert block.gamma_1.unique().tolist() == pytest.approx([1e-6])
    plain = AttentionBlock(32, 32, init_values=-1)
    assert plain.gamma_1 is None and plain.gamma_2 is None
    assert not any("gamma" in key for key in plain.state_dict())
    x = torch.randn(1, 16, 6, 6)
    for kind in (DWConvBlock, ConvBlock):
        assert torch.equal(kind(16, 16).eval()(x), x), "a block starts as its residual"
        assert not torch.equal(kind(16, 16, init_values=-1).eval()(x), x)


@torch.no_grad()
def test_squeeze_excite_is_two_convolutions_of_one_pixel():
    module = stirred(SqueezeExcite(48))
    assert module.fc1.out_features == 16  # 48 / 4 to a multiple of 8, not below 0.9 of it
    x = torch.randn(2, 48, 5, 6)
    pooled = x.mean((2, 3), keepdim=True)
    hidden = F.relu(F.conv2d(pooled, module.fc1.weight[..., None, None], module.fc1.bias))
    scale = F.conv2d(hidden, module.fc2.weight[..., None, None], module.fc2.bias)
    torch.testing.assert_close(module(x), x * F.relu6(scale + 3) / 6)


# ---- down-sampling modules -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", DOWNSAMPLERS)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_module_takes_the_same_numbers(name, stride):
    module = stirred(DOWNSAMPLERS[name](24, 32, stride, head_dim=16))
    y = module(torch.randn(2, 24, 7, 10))
    assert y.shape == (2, 32, math.ceil(7 / stride), math.ceil(10 / stride))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "local", "far"), [(LocalDSM, True, False), (LocalGlobalDSM, True, True)]
)
def test_what_a_module_sees(kind, local, far):
    assert _reach(kind) == (local, far)


@torch.no_grad()
def test_global_module_has_no_local_path():
    """With its attention silent, an output depends on the one pixel it was picked from."""
    module = stirred(GlobalDSM(8, 16, 2, head_dim=16))
    assert _reach(GlobalDSM) == (True, True)
    nn.init.zeros_(module.proj.weight)
    seen = _dependence(module)
    assert seen.sum() == 1 and seen[4, 4], "a picked pixel and none of its neighbours"


def _dependence(module: nn.Module) -> torch.Tensor:
    """Which of 9 x 9 input pixels output pixel (2, 2) of a stride-2 module depends on."""
    x = torch.randn(1, 8, 9, 9)
    with torch.enable_grad():
        x.requires_grad_(True)
        module(x)[0, :, 2, 2].square().sum().backward()
    return x.grad[0].abs().sum(0) > 0


def _reach(kind: type[nn.Module]) -> tuple[bool, bool]:
    """Whether a neighbour and a far pixel matter."""
    seen = _dependence(stirred(kind(8, 16, 2, head_dim=16)))
    return bool(seen[3, 4]), bool(seen[0, 8])


# ---- networks ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("ops", [("dw", "mlp"), ("attn", "conv"), ("mlp", "attn"), ("conv", "dw")])
@pytest.mark.parametrize("module", DOWNSAMPLERS)
def test_any_operators_with_any_module_deploy(ops, module):
    arch = {"channels": [16, 32]} if "mlp" in ops else {"channels": [32, 16]}
    model = tiny(block_ops=ops, ds_ops=[module], repeats=[2, 1], **arch)
    images = torch.randn(2, 3, 16, 16)
    folded = deploy(model, 16)
    assert relative_error(folded(images), model(images)) <= 1e-5
    # a norm before a padded 3x3 convolution has nowhere to go: zeros at the border are not shifted
    norms = [one for one in folded.modules() if isinstance(one, nn.BatchNorm2d)]
    assert len(norms) == sum(isinstance(one, ConvBlock) for one in model.modules())
    assert not any("gamma_2" in name for name, _ in folded.named_parameters())
    if torch.backends.mkldnn.is_available():  # only G-DSM picks pixels by a strided 1x1
        convs = [one for one in folded.modules() if isinstance(one, nn.Conv2d)]
        assert all(one.stride == (2, 2) for one in convs if one.kernel_size == (1, 1))


@torch.no_grad()
def test_deploying_twice_changes_nothing():
    block = stirred(AttentionBlock(32, 32, head_dim=16))
    x, expected = torch.randn(1, 32, 4, 4), None
    expected = block(x)
    block.deploy_()
    block.deploy_()
    assert relative_error(block(x), expected) <= 1e-5


def test_drop_path_rises_over_all_blocks():
    with on_meta():
        model, plain = (harness.build("uninet_b0", drop_path_rate=rate) for rate in (0.26, 0.0))
    rates = [
        getattr(one.drop_path, "drop_prob", 0.0)
        for one in model.blocks
        if hasattr(one, "drop_path")
    ]
    assert rates == pytest.approx([0.26 * index / 22 for index in range(23)])
    assert not any(isinstance(one, DropPath) for one in plain.modules())


def test_linear_layers_start_small_and_convolutions_as_torch_makes_them():
    torch.manual_seed(0)
    model = harness.build("uninet_b0")
    assert model.blocks[-1].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.blocks[-1].mlp.fc1.bias.any() and not model.classifier.bias.any()
    squeeze = model.blocks[5].se.fc1  # a convolution in the authors' code
    assert squeeze.weight.abs().max().item() == pytest.approx(squeeze.in_features**-0.5, rel=0.02)
    assert squeeze.bias.any()
    assert {one.eps for one in model.modules() if isinstance(one, nn.LayerNorm)} == {1e-5}


def test_training_on_maps_of_any_layout_gives_the_same_gradients():
    model = tiny().train()
    other = copy.deepcopy(model)
    images = torch.randn(4, 3, 16, 16)
    model(images).square().sum().backward()
    other.to(memory_format=torch.channels_last)(images).square().sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "b7"}, "no size 'b7'; there are b0, b1"),
        ({"image_size": 0}, "image_size must be positive"),
        ({"repeats": [1, 2]}, "repeats must have one entry per operator"),
        ({"repeats": [1, 2, 4, 4, 4, 0]}, "repeats must be positive numbers"),
        ({"block_ops": ["dw"] * 5 + ["pool"]}, "no operator 'pool'; there are dw, attn"),
        ({"ds_ops": ["l"] * 5 + ["lg"]}, "6 stages have 5 down-sampling modules between them"),
        ({"ds_ops": ["l", "l", "l", "x", "l"]}, "no down-sampling module 'x'"),
        (
            {"channels": [24, 48, 80, 128, 128, 250]},
            "250 channels are no multiple of the heads' 32",
        ),
        ({"block_ops": ["attn"] * 6, "stem_dim": 16}, "16 channels are too few for a head of 32"),
        ({"block_ops": ["attn"] * 6, "stem_dim": 65}, "65 channels do not divide into 2 heads"),
        ({"expansion": [0.01] * 6}, "leaves no channel"),
        ({"head_dim": 0}, "head_dim must be a positive number"),
        ({"expansion": [float("inf")] * 6}, "expansion must be positive numbers"),
        ({"block_ops": "dw"}, "block_ops must be a list of names, not 'dw'"),
        ({"ds_ops": 3}, "ds_ops must be a list of names, not 3"),
        ({"block_ops": [["dw"]] * 6}, "no operator .'dw'.; there are dw, attn"),
        ({"architecture": {"width": 1}}, "an architecture has block_ops, ds_ops, repeats"),
        ({"architecture": "b1"}, "an architecture has block_ops, ds_ops, repeats"),
        ({"size": ["b1"]}, "no size .'b1'.; there are b0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\), not 1.0"),
        ({"drop_path_rate": "a"}, "drop_path_rate must be a number, not 'a'"),
        ({"drop_rate": True}, "drop_rate must be a number, not True"),
        ({"init_values": float("nan")}, "init_values must be a number, not nan"),
    ],
)
def test_what_cannot_be_built_says_why(changes, message):
    with on_meta(), pytest.raises(ValueError, match=message):
        uninet(**changes)


@torch.no_grad()
def test_without_classes_features_come_out():
    torch.manual_seed(0)
    model = uninet(0, 16, architecture=TINY).eval()
    images = torch.randn(2, 3, 16, 16)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(model(images), features) and features.shape == (2, 24)
    model.reset_classifier(5)
    assert model(images).shape == (2, 5) and not model.get_classifier().bias.any()
    model.reset_classifier(0)
    assert torch.equal(model(images), features)


def test_micro_has_every_released_part():
    arch = ARCHITECTURES["micro"]
    assert set(arch.block_ops) == {"dw", "attn"} and set(arch.ds_ops) == {"l", "lg"}


def test_recipe_is_the_authors_script():
    variant = get_variant("uninet_b1")
    recipe = read_recipe("imagenet", variant)
    assert recipe.peak_lr == pytest.approx(1e-3) and recipe.batch_size == 1024
    assert (recipe.drop_path, recipe.random_erasing, recipe.repeats) == (0.0, 0.0, 1)
    assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing) == (0.8, 1.0, 0.1)
    assert (recipe.warmup_epochs, recipe.warmup_lr, recipe.min_lr) == (5, 1e-6, 1e-5)
