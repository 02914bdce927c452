"""UniNet against the authors' outputs and counts."""

import copy

import pytest
import torch
from golden_tools import (
    GOLDEN,
    assert_matches,
    filled_state_dict,
    golden_cases,
    golden_input,
    load_golden,
)
from torch import nn

import harness
from harness.checkpoints import load_official
from harness.measurement.macs import count_macs
from harness.measurement.macs_fvcore import count_macs_fvcore
from harness.meta import on_meta
from reproductions.uninet import blocks, conventions, downsampling
from reproductions.uninet.convert import from_official, our_name, rename
from reproductions.uninet.layers import map_of, tokens_of
from reproductions.uninet.model import ARCHITECTURES, Architecture, UniNet

FIXTURES = sorted(path.stem for path in (GOLDEN / "uninet").glob("UniNet*.json"))
#: Pixels, parameters and the authors' MACs of the published sizes that have no fixture.
COUNTS = {
    "b2": (256, 16_211_472, 2_159_099_776),
    "b3": (288, 24_020_184, 4_258_490_944),
    "b4": (320, 43_796_288, 9_429_081_216),
    "b5": (384, 72_883_072, 20_423_294_976),
    "b6": (448, 116_687_344, 51_035_247_104),
}
MODULES = {
    "LocalDSM": downsampling.LocalDSM,
    "LocalGlobalDSM": downsampling.LocalGlobalDSM,
    "DWConvBlock": blocks.DWConvBlock,
    "AttentionBlock": blocks.AttentionBlock,
}


def size_of(fixture: dict) -> str:
    return fixture["variant"].removeprefix("UniNet")[:2].lower()


def post_scaled(state: dict, case: dict) -> dict:
    """The case's entries with some of them multiplied, as the fixture states."""
    for suffix, factor in case.get("extra", {}).get("post_scale", ()):
        for key in state:
            if key.endswith(suffix):
                state[key] = state[key] * factor
    return state


def input_of(case: dict) -> torch.Tensor:
    extra = case.get("extra", {})
    x = golden_input(case["input_shape"], extra.get("input_seed", 0))
    return x * extra.get("input_scale", 1.0)


def strict_load(module: nn.Module, state: dict) -> nn.Module:
    fit = module.load_state_dict(state, strict=False)
    assert not fit.unexpected_keys
    assert all("num_batches" in key for key in fit.missing_keys)
    return module.eval()


@pytest.fixture(scope="module", params=FIXTURES)
def golden(request):
    return load_golden(f"uninet/{request.param}")


def official(fixture: dict, case: dict) -> nn.Module:
    """The fixture's variant with the authors' filled weights, loaded as a user would."""
    state = post_scaled(filled_state_dict(fixture["state_dict"], fixture["fill"]), case)
    return load_official(f"uninet_{size_of(fixture)}", state)


# ---- the whole network ---------------------------------------------------------------------------


@torch.no_grad()
def test_logits_features_and_training_mode(golden):
    names, models = set(), {}
    for case in sorted(golden["cases"], key=lambda one: one["mode"]):  # training moves the norms
        scale = str(case["extra"].get("post_scale"))
        if scale not in models:
            models[scale] = official(golden, case)
        model = models[scale].train(case["mode"] == "train")
        images = input_of(case)
        if case["name"].startswith("eval_features"):
            output = model.forward_head(model.forward_features(images), pre_logits=True)
        else:
            output = model(images)
        assert_matches(output, case)
        for key, wanted in case.get("extra", {}).get("after", {}).items():
            moved = model.state_dict()[our_name(key)].double()
            assert moved.sum().item() == pytest.approx(wanted["sum"], rel=1e-5)
            assert moved[:4].tolist() == pytest.approx(wanted["first4"], rel=1e-5)
        names.add(case["name"])
    assert {"eval_logits", "eval_features", "eval_logits_post_scaled"} <= names


def test_every_block_has_the_authors_shape(golden):
    size = size_of(golden)
    with on_meta():
        model = harness.build(f"uninet_{size}")
        side = golden["img_size"]
        x = model.stem(torch.empty(golden["block_outputs"][0][2][0], 3, side, side))
        assert len(model.blocks) == len(golden["block_outputs"])
        for block, (_, kind, shape) in zip(model.blocks, golden["block_outputs"], strict=True):
            x = block(x)
            assert type(block) is MODULES[kind]
            assert list(x.shape if len(shape) == 4 else tokens_of(x).shape) == shape


def test_counts_of_the_fixture(golden):
    size = size_of(golden)
    with on_meta():
        model = harness.build(f"uninet_{size}")
    assert sum(one.numel() for one in model.parameters()) == golden["params"]
    assert conventions.macs(model, golden["img_size"]) == golden["macs_official"]
    theirs = golden["macs_fvcore_by_operator"]
    wanted = theirs["conv"] + theirs["linear"] + theirs["matmul"]
    assert count_macs(model, golden["img_size"]).total == wanted


@pytest.mark.parametrize("size", COUNTS)
def test_parameters_and_macs_of_every_size(size):
    pixels, params, macs = COUNTS[size]
    with on_meta():
        model = harness.build(f"uninet_{size}")
    assert model.image_size == (pixels, pixels)
    assert sum(one.numel() for one in model.parameters()) == params
    assert conventions.macs(model, pixels) == macs


def test_our_rule_is_fvcores_total():
    model = harness.build("uninet_micro").train()
    model.stem.eval()
    assert conventions.macs(model, 32) == count_macs_fvcore(model, 32).total
    assert model.training and not model.stem.training
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- single modules and free configurations ------------------------------------------------------


def build_case(case: dict) -> nn.Module:
    """A module by the authors' class and arguments, or a network by its configuration."""
    if "module" in case:
        options = dict(case["module_kwargs"])
        options.pop("seq_l", None)  # the number of tokens: here it follows from the map
        renamed = {"in_features": "in_dim", "out_features": "out_dim", "mlp_ratio": "expansion"}
        options = {renamed.get(key, key): value for key, value in options.items()}
        return MODULES[case["module"]](**options)
    config = dict(case["config"])
    size, classes = config.pop("input_size"), config.pop("num_classes")
    own = {key: config.pop(key) for key in ("init_values", "drop_path_rate") if key in config}
    return UniNet(Architecture(**config), classes, size, **own)


@torch.no_grad()
@pytest.mark.parametrize("case", golden_cases("uninet/modules"))
def test_module(case):
    state = post_scaled(filled_state_dict(case["state_dict"]), case)
    module = strict_load(build_case(case), rename(state)).train(case["mode"] == "train")
    assert sum(one.numel() for one in module.parameters()) == case["params"]
    x = input_of(case)
    if x.dim() == 3:
        side = int(x.shape[1] ** 0.5)
        x = map_of(x, (side, side))
    output = module(x)
    if output.dim() == 4 and len(case["output_shape"]) == 3:
        output = tokens_of(output)
    assert_matches(output, case)
    if "macs_fvcore" in case:
        assert conventions.macs(module, case["config"]["input_size"]) == case["macs_fvcore"]


def test_without_squeeze_and_excite_layers_are_numbered_one_lower():
    """The authors' option `use_se=False`, beside a block that has it."""
    plain, usual = (blocks.DWConvBlock(16, 24, 2, 2, use_se=one) for one in (False, True))
    theirs = {
        "residual.1": "residual.conv", "b1.0": "expand.0", "b1.1": "expand.1", "b1.2": "expand.2",
        "b2.0": "depthwise", "b2.1": "depthwise_norm", "b2.3": "project", "b2.4": "project_norm",
    }  # fmt: skip
    ours, state = plain.state_dict(), {}
    for head, name in theirs.items():
        own = {key: ours[key] for key in ours if key.rpartition(".")[0] == name}
        state |= {f"blocks.0.{head}.{key.rpartition('.')[2]}": own[key] for key in own}
    se = {"blocks.1.b2.3.fc1.bias": usual.se.fc1.bias, "blocks.1.b2.4.bias": usual.project.bias}
    renamed = rename({**state, **se})
    assert {"blocks.1.se.fc1.bias", "blocks.1.project.bias"} < set(renamed)
    assert all(torch.equal(renamed[f"blocks.0.{key}"], value) for key, value in ours.items())
    assert len(renamed) == len(ours) + 2


# ---- loading -------------------------------------------------------------------------------------


def test_a_checkpoint_as_the_authors_save_it(tmp_path, golden):
    size = size_of(golden)
    state = filled_state_dict(golden["state_dict"])
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": state, "epoch": 299, "state_dict_ema": {}}, path)
    model = load_official(f"uninet_{size}", path)
    assert torch.equal(model.state_dict()["stem.0.weight"], state["stem.0.weight"])
    ours = from_official(model.state_dict())
    assert all(torch.equal(value, ours[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_of_something_else_is_refused():
    with pytest.raises(harness.ReplivitError, match=r"no UniNet: it has no 'stem.0.weight'"):
        load_official("uninet_b1", {"patch_embed.proj.weight": torch.zeros(1)})
    with on_meta():
        small = harness.build("uninet_b0").state_dict()
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in small.items()}
    with pytest.raises(harness.ReplivitError, match=r"does not fit uninet_b3.*it fits uninet_b0"):
        load_official("uninet_b3", state)


# ---- what the authors' code cannot do ------------------------------------------------------------


@torch.no_grad()
def test_queries_follow_the_map():
    """Weights of one size serve any other, rectangles included, and squares are still the same."""
    torch.manual_seed(0)
    small = UniNet(ARCHITECTURES["b1"], 10, 64).eval()
    large = UniNet(ARCHITECTURES["b1"], 10, 96).eval()
    large.load_state_dict(small.state_dict())
    for shape in ((96, 96), (64, 160), (33, 50)):
        images = torch.randn(2, 3, *shape)
        assert torch.equal(small(images), large(images))
    wide = torch.randn(1, 3, 64, 160)
    turned = copy.deepcopy(small)
    for module in turned.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.transpose(2, 3).contiguous()
    expected = small(wide)
    assert (turned(wide.transpose(2, 3)) - expected).norm() < 1e-5 * expected.norm()
