"""EfficientFormerV2 against the authors' outputs, counts and timm's twin."""

import copy
import zlib

import pytest
import timm
import torch
from golden_tools import assert_matches, filled_state_dict, golden_cases, golden_input, load_golden
from torch import nn
from torch.nn import functional as F

import harness
from harness.checkpoints import load_official
from harness.measurement.macs import count_macs
from harness.measurement.paper_counters import snap_profile
from harness.meta import on_meta
from reproductions.efficientformer_v2 import attention, blocks, conventions
from reproductions.efficientformer_v2.convert import from_official, our_name
from reproductions.efficientformer_v2.model import efficientformer_v2

FIXTURES = ["s0", "s2", "s0_r160"]
SIZES = ["s0", "s1", "s2", "l"]
#: All parameters; conv + linear + matmul MACs to a thousand, where no fixture has them exactly; the
#: authors' counter in M and G.
COUNTS = {
    "s0": (3_600_256, None, 3.535, 0.3961),
    "s1": (6_185_560, 651_970_000, 6.092, 0.6523),
    "s2": (12_710_112, None, 12.551, 1.2474),
    "l": (26_322_288, 2_552_547_000, 26.069, 2.5534),
}


def official(fixture: dict, fill: str, **options) -> nn.Module:
    """The fixture's variant with the authors' filled weights, loaded as a user would."""
    name = f"efficientformer_v2_{fixture['variant'].split('_')[0]}"
    state = filled_state_dict(fixture["state_dict"], fill)
    return load_official(name, state, image_size=fixture["img_size"], **options)


@pytest.fixture(scope="module", params=FIXTURES)
def golden(request):
    fixture = load_golden(f"efficientformer_v2/{request.param}")
    return fixture, official(fixture, "rs-v1-ls")


def case_of(fixture: dict, name: str) -> dict:
    found = [case for case in fixture["cases"] if case["name"] == name]
    return found[0] if found else pytest.skip(f"no case {name} in this fixture")


def filled_twins(size: str, image_size=224) -> tuple[nn.Module, nn.Module]:
    """timm's model with random weights and norms, and ours with the same."""
    torch.manual_seed(0)
    theirs = timm.create_model(f"efficientformerv2_{size}", img_size=image_size)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.normal_(module.weight, 1, 0.1)
    for name, parameter in theirs.named_parameters():
        if name.endswith(("gamma", "attention_biases")):
            nn.init.normal_(parameter, std=0.3)
    ours = efficientformer_v2(size=size, image_size=image_size).eval()
    ours.load_state_dict(from_official(theirs.state_dict()))
    return theirs.eval(), ours


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---- the whole network against the authors' numbers ----------------------------------------------


@torch.inference_mode()
def test_logits_and_each_head(golden):
    fixture, model = golden
    features = model.forward_features(golden_input(case_of(fixture, "eval_ls")["input_shape"]))
    assert_matches(model.forward_head(features), case_of(fixture, "eval_ls"))
    pooled = model.forward_head(features, pre_logits=True)
    assert_matches(model.head(pooled), case_of(fixture, "eval_head"))
    assert_matches(model.head_dist(pooled), case_of(fixture, "eval_dist_head"))


@torch.inference_mode()
@pytest.mark.parametrize("name", FIXTURES)
def test_logits_under_the_general_fill(name):
    """Layer scales of size one: activations explode, hence the fixture's own tolerance."""
    fixture = load_golden(f"efficientformer_v2/{name}")
    case = case_of(fixture, "eval_rsv1")
    assert_matches(official(fixture, "rs-v1")(golden_input(case["input_shape"])), case)


@torch.inference_mode()
def test_without_distillation_the_class_head_answers_alone(golden):
    fixture, full = golden
    single = efficientformer_v2(
        size=fixture["variant"].split("_")[0], image_size=fixture["img_size"], distillation=False
    )
    kept = {key: value for key, value in full.state_dict().items() if "head_dist" not in key}
    single.load_state_dict(kept)
    case = case_of(fixture, "eval_head")
    assert_matches(single.eval()(golden_input(case["input_shape"])), case)


@torch.inference_mode()
def test_features_of_every_part(golden):
    fixture, model = golden
    case = case_of(fixture, "intermediates")
    paths = {"patch_embed": "stem", "norm": "norm"}
    paths |= {f"network.{2 * stage}": f"stages.{stage}" for stage in range(4)}
    paths |= {f"network.{2 * stage - 1}": f"stages.{stage}.downsample" for stage in (1, 2, 3)}
    seen = {}
    for name in case["features"]:
        keep = lambda _, inputs, output, name=name: seen.__setitem__(name, output)  # noqa: E731
        model.get_submodule(paths[name]).register_forward_hook(keep)
    model(golden_input(case["input_shape"]))
    assert seen.keys() == case["features"].keys() and len(seen) >= 8
    for name, expected in case["features"].items():
        assert_matches(seen[name], expected)


def test_training_mode_returns_both_heads_and_moves_the_norms(golden):
    fixture, model = golden
    case = case_of(fixture, "train_cls")
    model = without_drop_path(copy.deepcopy(model)).train()
    with torch.no_grad():
        labels, teacher = model(golden_input(case["input_shape"]))
    assert_matches(labels, case)
    assert_matches(teacher, case_of(fixture, "train_dist"))
    buffers = dict(model.named_buffers())
    for name, expected in case["bn_after_one_forward"].items():
        moved = buffers[our_name(name)].double()
        assert float(moved.norm()) == pytest.approx(expected["l2"], rel=1e-5)
        assert float(moved.sum()) == pytest.approx(expected["sum"], rel=1e-5, abs=1e-5)
    model.set_distilled_training(False)
    with torch.no_grad():
        assert model(golden_input([2, *case["input_shape"][1:]])).shape == (2, 1000)


def test_gradients(golden):
    fixture, model = golden
    case = case_of(fixture, "train_grad")
    model = without_drop_path(copy.deepcopy(model)).train()
    labels, teacher = model(golden_input(case["input_shape"]))
    loss = 0.5 * F.cross_entropy(labels, torch.tensor(case["extra"]["labels"]))
    loss = loss + 0.5 * F.cross_entropy(teacher, torch.tensor(case["extra"]["teacher_labels"]))
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-4)
    gradients = {name: one.grad.double() for name, one in model.named_parameters()}
    for name, expected in case["grad_l2"].items():
        assert float(gradients[our_name(name)].norm()) == pytest.approx(expected, rel=1e-4)
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert float(total) == pytest.approx(case["total_grad_l2"], rel=1e-4)


def without_drop_path(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0
    return model


def test_drop_path_rates_rise_linearly():
    fixture = load_golden("efficientformer_v2/s2")
    model = harness.build("efficientformer_v2_s2")
    rates = [getattr(b.drop_path2, "drop_prob", 0.0) for s in model.stages for b in s.blocks]
    assert rates == pytest.approx(fixture["drop_path_rates"], rel=1e-4)
    assert not any(
        isinstance(m, timm.layers.DropPath)
        for m in harness.build("efficientformer_v2_s2", drop_path_rate=0.0).modules()
    )


# ---- single modules ------------------------------------------------------------------------------

#: Where a module's entries sit inside the network, as the authors name it.
PLACES = {
    "Attention4D": "token_mixer.",
    "Attention4DDownsample": "attn.",
    "LGQuery": "q.",
    "Embedding": "network.5.",
    "Mlp": "mlp.",
    "FFN": "",
    "AttnFFN": "",
}


def build_module(case: dict) -> nn.Module:
    options = {key: value for key, value in case["kwargs"].items() if key != "act_layer"}
    kind = case["class"]
    if kind == "LGQuery":
        return attention.LGQuery(options["in_dim"], options["out_dim"])
    if kind == "Mlp":
        return blocks.Mlp(options["in_features"], options["hidden_features"])
    if kind == "Embedding":
        return blocks.Embedding(
            options["in_chans"], options["embed_dim"], options["resolution"], options["asub"]
        )
    return getattr(blocks if kind in ("FFN", "AttnFFN") else attention, kind)(**options)


@torch.no_grad()
@pytest.mark.parametrize("case", golden_cases("efficientformer_v2/modules"))
def test_single_module(case):
    place = PLACES[case["class"]]
    inside = our_name(place + "x").removesuffix("x")
    state = filled_state_dict(case["state_dict"], case["fill"])
    state = {our_name(place + key).removeprefix(inside): value for key, value in state.items()}
    state = {k: v.reshape(-1, 1, 1) if k.endswith("gamma") else v for k, v in state.items()}
    module = build_module(case)
    fit = module.load_state_dict(state, strict=False)
    assert not fit.unexpected_keys
    assert all("num_batches" in key for key in fit.missing_keys)
    module.train(case["mode"] == "train")
    assert_matches(module(golden_input(case["input_shape"])), case)


@pytest.mark.parametrize("name", FIXTURES)
def test_index_tables_are_the_authors(name):
    fixture = load_golden(f"efficientformer_v2/{name}")
    model = efficientformer_v2(
        size=fixture["variant"].split("_")[0], image_size=fixture["img_size"]
    )
    checked = 0
    for table in fixture["index_tables"]:
        for key in table["keys"]:
            module = model.get_submodule(our_name(key).removesuffix(".attention_bias_idxs"))
            assert list(module.bias_index.shape) == table["shape"]
            data = module.bias_index.numpy().astype("<i8").tobytes()
            assert zlib.crc32(data) == table["crc32_int64_le"]
            checked += 1
    assert checked == sum(isinstance(m, attention.BiasedAttention) for m in model.modules())


@pytest.mark.parametrize(("side", "stride"), [(1, 1), (4, 1), (5, 2), (6, 2), (13, 2)])
def test_index_equals_a_plain_loop(side, stride):
    points = [(y, x) for y in range(side) for x in range(side)]
    queries = [(y, x) for y in range(0, side, stride) for x in range(0, side, stride)]
    wanted = [[abs(a - y) * side + abs(b - x) for y, x in points] for a, b in queries]
    assert attention.offset_index((side, side), stride).tolist() == wanted


# ---- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_macs(size):
    params, plain_macs, paper_params, paper_macs = COUNTS[size]
    with on_meta():
        model = efficientformer_v2(size=size)
    assert sum(one.numel() for one in model.parameters()) == params
    assert round(conventions.params(model) / 1e6, 3) == paper_params
    assert round(conventions.macs(model, 224) / 1e9, 4) == paper_macs
    if plain_macs:
        assert count_macs(model, 224).total == pytest.approx(plain_macs, abs=500)


@pytest.mark.parametrize("name", FIXTURES)
def test_counts_of_the_fixture(name):
    fixture = load_golden(f"efficientformer_v2/{name}")
    with on_meta():
        model = efficientformer_v2(
            size=fixture["variant"].split("_")[0], image_size=fixture["img_size"]
        )
    assert sum(one.numel() for one in model.parameters()) == fixture["params"]
    by_module = dict.fromkeys(fixture["params_by_module"], 0)
    ours_to_theirs = {"stem": "patch_embed", "head_dist": "dist_head"}
    for key, parameter in model.named_parameters():
        parts = key.split(".")
        owner = ours_to_theirs.get(parts[0], parts[0])
        if parts[0] == "stages":
            owner = f"network.{2 * int(parts[1]) - (parts[2] == 'downsample')}"
        by_module[owner] += parameter.numel()
    assert by_module == fixture["params_by_module"]
    assert conventions.params(model) == fixture["params_detail"]["official_counter_params"]
    assert conventions.macs(model, fixture["img_size"]) == fixture["macs_official"]
    products = fixture["macs_fvcore_detail"]["by_operator"]
    wanted = products["conv"] + products["linear"] + products["matmul"]
    assert count_macs(model, fixture["img_size"]).total == wanted


def test_counting_leaves_the_model_as_it_was():
    model = efficientformer_v2(10, 32, size="micro").train()
    model.stem.eval()
    before = copy.deepcopy(model.state_dict())
    snap_profile(model, 32)
    assert model.training and not model.stem.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_full_resolution_attention_costs():
    wanted = {"s0": 0.543, "s1": 0.810, "s2": 1.585, "l": 3.125}
    for size, gigas in wanted.items():
        with on_meta():
            model = efficientformer_v2(size=size, stride_attention=False)
        assert round(conventions.macs(model, 224) / 1e9, 3) == gigas
        if size == "s0":
            assert sum(one.numel() for one in model.parameters()) == 3_600_304


def test_micro_has_every_ingredient_within_the_bounds():
    model = harness.build("efficientformer_v2_micro")
    assert sum(one.numel() for one in model.parameters()) <= 600_000
    assert 5_000_000 <= count_macs(model, 32).total <= 30_000_000
    mixers = [m for m in model.modules() if isinstance(m, attention.Attention4D)]
    assert {mixer.stride for mixer in mixers} == {1, 2}
    assert sum(isinstance(m, attention.Attention4DDownsample) for m in model.modules()) == 1
    assert any(type(m) is blocks.FFN for m in model.modules())


# ---- timm's twin ---------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize(
    ("size", "image_size"),
    [("s0", 96), ("s0", 128), ("s0", 192), ("s0", 256), ("s0", 320), ("s0", (96, 160)),
     ("s1", 224), ("s2", 128), ("l", 96)],
)  # fmt: skip
def test_equals_timm(size, image_size):
    theirs, ours = filled_twins(size, image_size)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    images = torch.randn(2, 3, height, width)
    assert relative(ours(images), theirs(images)) < 1e-5
