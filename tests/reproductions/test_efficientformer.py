"""EfficientFormer against the authors' outputs, counts and timm's twin."""

import zlib

import pytest
import timm
import torch
from golden_tools import (
    assert_matches,
    filled_state_dict,
    golden_cases,
    golden_input,
    load_golden,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import harness
from harness.meta import on_meta
from reproductions.efficientformer import blocks
from reproductions.efficientformer.convert import from_official
from reproductions.efficientformer.model import EfficientFormer

SIZES = ["l1", "l3"]


def load_filled(model: nn.Module, entries: list, fill: str) -> nn.Module:
    """`model` with a fixture's weights, converted from the authors' names and loaded strictly."""
    model.load_state_dict(from_official(filled_state_dict(entries, fill)))
    return model


def official(size: str, mode: str = "eval") -> nn.Module:
    fixture = load_golden(f"efficientformer/{size}")
    model = load_filled(
        harness.build(f"efficientformer_{size}"), fixture["state_dict"], fixture["fill"]
    )
    return model.train(mode == "train")


@pytest.fixture(scope="module", params=SIZES)
def filled(request):
    """(fixture, filled model in eval mode, features of the fixture's input)."""
    fixture, model = load_golden(f"efficientformer/{request.param}"), official(request.param)
    with torch.inference_mode():
        features = model.forward_features(golden_input([2, 3, 224, 224]))
    return fixture, model, features


def case_of(fixture: dict, kind: str) -> dict:
    return next(case for case in fixture["cases"] if case["kind"] == kind)


# ---- the whole network against the authors' numbers --------------------------------------------


def test_eval_logits_and_each_head(filled):
    fixture, model, features = filled
    with torch.inference_mode():
        pooled = model.forward_head(features, pre_logits=True)
        assert_matches(model.forward_head(features), case_of(fixture, "logits"))
        assert_matches(model.head(pooled), case_of(fixture, "head"))
        assert_matches(model.dist_head(pooled), case_of(fixture, "dist_head"))


def test_features_of_every_stage(filled):
    fixture, model, _ = filled
    case = case_of(fixture, "intermediates")
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.__setitem__(name, output)
        )
        for name in case["features"]
    ]
    with torch.inference_mode():
        model(golden_input(case["input_shape"]))
    for handle in handles:
        handle.remove()
    assert len(seen) == len(case["features"]) >= 8
    for name, expected in case["features"].items():
        assert_matches(seen[name], expected)


@pytest.mark.parametrize("size", SIZES)
def test_training_returns_both_heads_and_the_authors_gradients(size):
    fixture = load_golden(f"efficientformer/{size}")
    model = official(size, "train")
    logits, distilled = model(golden_input([2, 3, 224, 224]))
    assert_matches(logits, case_of(fixture, "train_cls"))
    assert_matches(distilled, case_of(fixture, "train_dist"))
    for name, expected in case_of(fixture, "train_cls")["bn_after_one_forward"].items():
        buffer = model.get_buffer(name).double()
        assert float(buffer.sum()) == pytest.approx(expected["sum"], rel=1e-5)
        assert float(buffer.norm()) == pytest.approx(expected["l2"], rel=1e-5)

    case = case_of(fixture, "grad")
    labels, teacher = (torch.tensor(case["extra"][name]) for name in ("labels", "teacher_labels"))
    loss = nn.functional.cross_entropy(logits, labels) / 2
    loss = loss + nn.functional.cross_entropy(distilled, teacher) / 2
    loss.backward()
    assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-5)
    for name, norm in case["grad_l2"].items():
        grad = model.get_parameter(name).grad.double()
        assert float(grad.norm()) == pytest.approx(norm, rel=1e-4), name
        assert abs(float(grad.sum()) - case["grad_sum"][name]) <= 1e-4 * norm * grad.numel() ** 0.5
    total = sum(float(one.grad.double().square().sum()) for one in model.parameters()) ** 0.5
    assert total == pytest.approx(case["total_grad_l2"], rel=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_state_dict_has_the_authors_names_in_their_order(size):
    entries = load_golden(f"efficientformer/{size}")["state_dict"]
    expected = [[n, s] for n, s, _ in entries if not n.endswith("attention_bias_idxs")]
    model = harness.build(f"efficientformer_{size}")
    assert [[n, list(t.shape)] for n, t in model.state_dict().items()] == expected


@pytest.mark.parametrize("size", SIZES)
def test_index_tables_are_the_official_ones(size):
    for table in load_golden(f"efficientformer/{size}")["index_tables"]:
        index = blocks.relative_position_index(7, 7)
        assert list(index.shape) == table["shape"]
        assert zlib.crc32(index.numpy().astype("<i8").tobytes()) == table["crc32_int64_le"]


@pytest.mark.parametrize("height,width", [(1, 1), (2, 5), (4, 3), (7, 7)])
def test_index_numbers_distances_in_order_of_appearance(height, width):
    points = [(y, x) for y in range(height) for x in range(width)]
    numbers, expected = {}, []
    for a in points:
        for b in points:
            offset = (abs(a[0] - b[0]), abs(a[1] - b[1]))
            expected.append(numbers.setdefault(offset, len(numbers)))
    assert blocks.relative_position_index(height, width).flatten().tolist() == expected


def test_deployment_form_of_l1_is_equal():
    model = official("l1")
    deployed = harness.deploy(model, 224)
    image = golden_input([2, 3, 224, 224])
    with torch.inference_mode():
        assert_matches(deployed(image), case_of(load_golden("efficientformer/l1"), "logits"))


# ---- single modules ------------------------------------------------------------------------------

MAKERS = {
    "Attention": blocks.Attention,
    "Pooling": blocks.Pooling,
    "Meta4D": blocks.Meta4D,
    "Meta3D": blocks.Meta3D,
    "Embedding": blocks.Embedding,
    "stem": blocks.stem,
}


@pytest.mark.parametrize("case", golden_cases("efficientformer/modules"))
def test_module(case):
    module = load_filled(
        MAKERS[case["class"]](**case["kwargs"]), case["state_dict"], case["fill"]
    ).train(case["mode"] == "train")
    assert_matches(module(golden_input(case["input_shape"])), case)


def test_fused_and_plain_attention_agree():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 4, 9, 16)
    v, bias = torch.randn(2, 4, 9, 24), torch.randn(4, 9, 9)
    plain = blocks.attend(q, k, v, bias, fused=False)
    assert torch.allclose(blocks.attend(q, k, v, bias, fused=True), plain, atol=1e-6)
    assert not torch.allclose(blocks.attend(q, k, v, bias + bias.mT, fused=False), plain, atol=1e-2)


# ---- counts --------------------------------------------------------------------------------------

#: Convolution + linear + attention products, measured on the official models.
PRODUCTS = {"l1": 1_291_284_736, "l3": 3_906_573_312, "l7": 10_119_325_696}
#: All parameters; what the official counter prints for parameters and MACs.
COUNTS = {
    "l1": (12_289_928, 12_250_227, 1_300_053_440),
    "l3": (31_406_000, 31_330_131, 3_925_848_064),
    "l7": (82_229_328, 82_106_483, 10_159_032_832),
}


@pytest.mark.parametrize("size", PRODUCTS)
def test_counts(size):
    variant = harness.get_variant(f"efficientformer_{size}")
    with on_meta():
        model = variant.paper.resolve(variant.spec.build)(
            num_classes=1000, image_size=224, **variant.spec.args
        ).eval()
    image = torch.empty(1, 3, 224, 224, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert counter.get_total_flops() == 2 * PRODUCTS[size]
    parameters, published_parameters, published_macs = COUNTS[size]
    assert sum(one.numel() for one in model.parameters()) == parameters
    assert variant.hook("paper_params")(model) == published_parameters
    assert variant.hook("paper_macs")(model, 224) == published_macs


@pytest.mark.parametrize("size", SIZES)
def test_counts_are_the_fixtures(size):
    fixture = load_golden(f"efficientformer/{size}")
    detail = fixture["params_detail"]
    assert COUNTS[size] == (
        fixture["params"], detail["official_counter_params"], fixture["macs_official"]
    )  # fmt: skip
    model = harness.build(f"efficientformer_{size}")
    for name, count in fixture["params_by_module"].items():
        own = sum(one.numel() for one in model.get_submodule(name).parameters())
        assert own == count, name
    single = harness.build(f"efficientformer_{size}", distillation=False)
    assert sum(one.numel() for one in single.parameters()) == detail["single_head_model"]
    norms = [one for one in model.modules() if isinstance(one, nn.BatchNorm2d)]
    affine = sum(one.weight.numel() + one.bias.numel() for one in norms)
    assert fixture["params"] - affine == detail["without_batchnorm2d"]


def test_micro_fits_the_small_track():
    model = harness.build("efficientformer_micro").eval()
    kinds = [type(one) for one in model.modules()]
    assert kinds.count(blocks.Meta4D) == 6 and kinds.count(blocks.Meta3D) == 1
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert counter.get_total_flops() / 2 <= 30e6
    assert sum(one.numel() for one in model.parameters()) <= 600_000


def test_published_rows_are_complete_and_point_at_variants():
    facts = harness.get_paper("efficientformer").facts
    assert len(facts.published) == 116
    tops = {
        (row.of, row.value) for row in facts.published
        if row.metric == "top1" and row.source == "official README"
    }  # fmt: skip
    assert tops == {
        ("efficientformer_l1", 79.2), ("efficientformer_l1", 80.2),
        ("efficientformer_l3", 82.4), ("efficientformer_l7", 83.3),
    }  # fmt: skip
    printed = {
        (row.of, row.metric): row.value
        for row in facts.published
        if row.against in ("params_paper", "macs_paper")
    }
    for size, (_, params, macs) in COUNTS.items():
        assert printed[f"efficientformer_{size}", "params_m"] == round(params / 1e6, 1)
        assert printed[f"efficientformer_{size}", "macs_g"] == round(macs / 1e9, 1)


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("distilled", [True, False])
def test_timm_checkpoint_gives_timms_logits(distilled):
    torch.manual_seed(0)
    twin = timm.create_model("efficientformer_l1", num_classes=10).eval()
    for parameter in twin.parameters():  # away from zero biases and layer scales of 1e-5
        nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else 0.05)
    state = twin.state_dict()
    if not distilled:
        twin.head_dist = twin.head
        state = {name: one for name, one in state.items() if not name.startswith("head_dist")}
    model = harness.build("efficientformer_l1", num_classes=10, distillation=distilled).eval()
    model.load_state_dict(from_official(state))
    image = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        ours, theirs = model(image), twin(image)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_official_checkpoint_loads_from_a_wrapped_file(tmp_path):
    model = harness.build("efficientformer_l1", num_classes=10)
    state = dict(model.state_dict())
    state["network.6.4.token_mixer.attention_bias_idxs"] = torch.zeros(49, 49, dtype=torch.long)
    torch.save({"model": state, "epoch": 299}, tmp_path / "l1.pth")
    loaded = harness.load_official("efficientformer_l1", tmp_path / "l1.pth", num_classes=10)
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_checkpoint_of_another_size_is_refused_in_one_sentence():
    with on_meta():
        other = EfficientFormer([4, 4, 12, 6], [64, 128, 320, 512], 4)
    state = {name: torch.zeros(one.shape) for name, one in other.state_dict().items()}
    with pytest.raises(harness.ReplivitError) as error:
        harness.load_official("efficientformer_l1", state)
    assert "\n" not in str(error.value) and "efficientformer_l1" in str(error.value)
