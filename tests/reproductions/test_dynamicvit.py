"""DynamicViT's networks against the authors' outputs, choices and counts."""

import numpy as np
import pytest
import timm
import torch
from golden_tools import assert_matches, filled_state_dict, golden_input, load_golden
from torch import nn

import harness
from harness.checkpoints import convert_official, coverage, load_official
from harness.errors import ReplivitError
from harness.measurement.macs import count_macs
from harness.meta import on_meta
from reproductions.dynamicvit import conventions
from reproductions.dynamicvit.convert import from_official
from reproductions.dynamicvit.method import pruning_losses, teacher_answers
from reproductions.dynamicvit.model import dynamicvit_deit

FIXTURES = ["deit_ti_k07", "deit_ti_k09", "deit_s_k07", "lvvit_s_k07", "convnext_t_k07",
            "swin_t_k07"]  # fmt: skip
DROPPING = FIXTURES[:4]
#: All parameters, from the authors' classes.
PARAMS = {
    "deit_256_k07": 10_304_942, "deit_b_k07": 89_452_846, "lvvit_m_k07": 57_115_030,
}  # fmt: skip
#: fvcore's total in G of the authors' classes, where no fixture has it.
MACS = {
    "deit_ti": {0.8: 0.936, 0.6: 0.693, 0.5: 0.604},
    "deit_256": {0.7: 1.379},
    "deit_s": {0.9: 4.050, 0.8: 3.471, 0.6: 2.570, 0.5: 2.234},
}


def gumbel_noise(stages: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Rule gumbel-v1: call s draws from RandomState(1000 + s)."""
    draws = (np.random.RandomState(1000 + s).standard_exponential(shape) for s in range(stages))
    return [torch.from_numpy(-np.log(one.astype(np.float32))) for one in draws]


def official_weights(fixture: dict) -> dict[str, torch.Tensor]:
    skipped = tuple(f"*{name}" for name in fixture["not_filled"])
    return filled_state_dict(fixture["state_dict"], fixture["fill"], skipped)


@pytest.fixture(scope="module", params=FIXTURES)
def golden(request):
    fixture = load_golden(f"dynamicvit/{request.param}")
    return fixture, load_official(f"dynamicvit_{fixture['variant']}", official_weights(fixture))


def our_name(key: str) -> str:
    """Our name of an entry of the authors' transformers."""
    return next(reversed(from_official({"cls_token": None, key: None})))


def cases(fixture: dict, kind: str) -> list[dict]:
    found = [case for case in fixture["cases"] if case["kind"] == kind]
    return found or pytest.skip(f"no case {kind} in this fixture")


@torch.inference_mode()
def test_logits_and_kept_tokens(golden):
    fixture, model = golden
    for case in cases(fixture, "eval"):
        images = golden_input(case["input_shape"])
        logits, kept = model.forward_with_tokens(images)
        assert_matches(logits, case)
        assert torch.equal(logits, model(images))
        assert [one.shape[1] for one in kept] == list(model.keep_counts())
        for stage, positions in zip(case["stages"], kept, strict=True):
            assert positions.shape[1] == stage["num_keep"]
            name = next(name for name in stage if name.endswith("positions_sorted"))
            assert positions.sort(dim=1).values.tolist() == stage[name]
            if "first8_by_descending_score" in stage:
                assert positions[:, :8].tolist() == stage["first8_by_descending_score"]


@torch.inference_mode()
def test_order_of_the_kept_tokens(golden):
    """Slots of a later stage count in the sequence that the stage before has left."""
    fixture, model = golden
    case = cases(fixture, "eval")[0]
    if fixture["variant"] not in DROPPING:
        pytest.skip("nothing is dropped there")
    chosen = model._run(golden_input(case["input_shape"]))[1]
    for stage, slots in zip(case["stages"], chosen, strict=True):
        expected = torch.tensor(stage["kept_relative_by_descending_score"])
        differ = (slots != expected).nonzero()
        # neighbours whose scores agree to float32's last digits may change places
        assert len(differ) <= 4, f"{len(differ)} of {slots.numel()} slots in another order"
        assert torch.equal(slots.sort(dim=1).values, expected.sort(dim=1).values)


@torch.no_grad()
def test_training_form_under_given_noise(golden):
    fixture, model = golden
    case = cases(fixture, "train_forward")[0]
    batch = case["input_shape"][0]
    if "convnext" in fixture["variant"]:
        noise = gumbel_noise(3, (batch, 2, 14, 14))
        noise = [one.flatten(2).transpose(1, 2) for one in noise]
    else:
        noise = gumbel_noise(3, (batch, 196, 2))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        output = model.train().forward_train(golden_input(case["input_shape"]), noise)
    finally:
        model.load_state_dict(state)  # statistics of batch norms
        model.eval()
    assert_matches(output.logits, case["logits"])
    assert_matches(output.features.reshape(case["tokens"]["output_shape"]), case["tokens"])
    counts = output.decisions.sum(dim=2).round().int()
    assert counts.T.tolist() == case["kept_per_stage"]
    if "final_mask_kept" in case:
        assert [one.nonzero().flatten().tolist() for one in output.mask > 0.5] == case[
            "final_mask_kept"
        ]


@pytest.mark.parametrize("name", ["deit_ti_k07", "deit_s_k07"])
def test_losses_and_gradients_of_a_step(name):
    fixture = load_golden(f"dynamicvit/{name}")
    model = load_official(f"dynamicvit_{name}", official_weights(fixture))
    case = cases(fixture, "train_step")[0]
    images, labels = golden_input(case["input_shape"]), torch.tensor(case["args"]["labels"])
    with torch.no_grad():
        answers = teacher_answers(model.dense(), images)
    output = model.train().forward_train(images, gumbel_noise(3, (len(images), 196, 2)))
    classification = nn.functional.cross_entropy(output.logits, labels)
    parts = pruning_losses(output, answers, classification, model.keep_ratios)
    parts["loss"].backward()
    names = {"loss": "loss", "cls_loss": "classification", "ratio_loss_sum": "ratio",
             "token_loss": "token"}  # fmt: skip
    for theirs, ours in names.items():
        assert parts[ours].item() == pytest.approx(case[theirs], rel=1e-5), theirs
    # Logarithms near -7 have 5e-7 between neighbours in float32, and their error enters the sum of
    # p (log p - log q) undiminished: the fixture's last digits are this rounding, ours are not.
    assert parts["kl"].item() == pytest.approx(case["cls_kl"], abs=2.5e-7)
    logits, teacher = output.logits.detach().double(), answers[0].double()
    exact = (teacher.softmax(1) * (teacher.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()
    assert parts["kl"].item() == pytest.approx(exact.item(), rel=1e-5)

    gradients = {key: one.grad for key, one in model.named_parameters()}
    for key, norm in case["grad_l2"].items():
        own = our_name(key)
        assert gradients[own].double().norm().item() == pytest.approx(norm, rel=1e-5), key


def test_parameters_and_macs(golden):
    fixture, model = golden
    assert sum(one.numel() for one in model.parameters()) == fixture["params"]
    operators = fixture["macs_fvcore"]["by_operator"]
    products = sum(operators.get(name, 0) for name in ("conv", "linear", "matmul"))
    if fixture["variant"] in DROPPING:
        assert conventions.macs(model, 224) == fixture["macs_official"]["value"]
    else:
        # counted at exactly 0.5, while 0.7 - 0.2 is a little less and keeps 97 of 196, not 98
        name = f"dynamicvit_{fixture['variant']}"
        model = harness.build(name, keep_ratio=[0.7, 0.5, 0.3]).eval()
    assert count_macs(model, 224).total == products


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_of_the_other_sizes(name):
    with on_meta():
        model = harness.build(f"dynamicvit_{name}")
    assert sum(one.numel() for one in model.parameters()) == PARAMS[name]


@pytest.mark.parametrize("base", MACS)
def test_macs_at_other_ratios(base):
    for ratio, published in MACS[base].items():
        model = dynamicvit_deit(1000, 224, base.removeprefix("deit_"), ratio).eval()
        assert round(conventions.macs(model, 224) / 1e9, 3) == pytest.approx(published, abs=1.1e-3)


# ---- checkpoints ---------------------------------------------------------------------------------

TIMM = {
    "deit_ti_k07": "deit_tiny_patch16_224",
    "swin_t_k07": "swin_tiny_patch4_window7_224",
    "convnext_t_k07": "convnext_tiny",
}


@pytest.mark.parametrize("name", TIMM)
def test_starts_from_the_plain_network(name):
    """All of a plain network's weights find their place; only what the method adds is missing."""
    with on_meta():
        state = timm.create_model(TIMM[name]).state_dict()
        model = harness.build(f"dynamicvit_{name}")
        found = coverage(model, convert_official(f"dynamicvit_{name}", state))
    assert not found.unexpected and not found.mismatched
    assert found.missing
    assert all("score_predictor" in key or "fast_path" in key for key in found.missing)
    assert found.percent > 92


def test_starts_from_original_names():
    """Microsoft's Swin and Facebook's ConvNeXt: the fixtures' entries without the method's own."""
    for name in ("swin_t_k07", "convnext_t_k07"):
        fixture = load_golden(f"dynamicvit/{name}")
        plain = {
            key: value
            for key, value in official_weights(fixture).items()
            if not any(part in key for part in ("score_predictor", "fast"))
        }
        with on_meta():
            model = harness.build(f"dynamicvit_{name}")
        found = coverage(model, convert_official(f"dynamicvit_{name}", plain))
        assert not found.unexpected and not found.mismatched
        assert all("score_predictor" in key or "fast_path" in key for key in found.missing)


def test_foreign_checkpoints_are_refused():
    entries = {"conv1.weight": torch.zeros(1)}
    for name, kind in (("deit_s_k07", "class token"), ("swin_t_k07", "a Swin"),
                       ("convnext_t_k07", "a ConvNeXt")):  # fmt: skip
        with pytest.raises(ReplivitError, match=f"this checkpoint is not .*{kind}"):
            load_official(f"dynamicvit_{name}", entries)
    with pytest.raises(ReplivitError, match="missing"):  # strict: predictors must be there
        load_official(
            "dynamicvit_deit_ti_k07", timm.create_model("deit_tiny_patch16_224").state_dict()
        )


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0}, "keep_ratio must be above 0 and at most 1, not 0"),
        ({"keep_ratio": 1.01}, "keep_ratio must be above 0 and at most 1, not 1.01"),
        ({"keep_ratio": float("nan")}, "keep_ratio must be above 0 and at most 1, not nan"),
        ({"keep_ratio": None}, "keep_ratio must be above 0 and at most 1, not None"),
        ({"keep_ratio": "0.7"}, "keep_ratio must be above 0 and at most 1, not '0.7'"),
        ({"keep_ratio": [0.7, 0.5]}, "keep_ratio has 2 values for 3 pruning stages"),
        ({"keep_ratio": [0.7, 0.8, 0.2]}, "dropped ones never come back: its values cannot grow"),
        ({"keep_ratio": [0.7, -0.1, 0.2]}, "every keep_ratio must be above 0 and at most 1"),
        ({"keep_ratio": 0.1}, "of 196 tokens leaves none; the least is 1/196"),
        ({"pruning_loc": [3, 12]}, "there is no block 12; blocks are numbered 0 to 11"),
        ({"pruning_loc": -1}, "there is no block -1; blocks are numbered 0 to 11"),
        ({"pruning_loc": 3.0}, r"there is no block 3\.0; blocks are numbered 0 to 11"),
        ({"pruning_loc": [True]}, "there is no block True; blocks are numbered 0 to 11"),
        ({"pruning_loc": [6, 3]}, "each block once, in order"),
        ({"pruning_loc": [3, 3]}, "each block once, in order"),
        ({"image_size": 230}, "image_size must be a multiple of 16, not 230"),
        ({"size": "xl"}, "size must be one of ti, 256, s, b, not 'xl'"),
        ({"scorer": "magic"}, "scorer must be one of predictor, random, attention"),
    ],
)
def test_impossible_models_name_the_limit(options, message):
    with pytest.raises(ValueError, match=message), on_meta():
        harness.build("dynamicvit_deit_ti_k07", **options)


def test_lvvit_names_the_image_size_that_it_is_built_for():
    with on_meta():
        model = harness.build("dynamicvit_lvvit_s_k07", image_size=64)
        with pytest.raises(ValueError, match=r"built for images of \(64, 64\), not \(64, 80\)"):
            model(torch.zeros(1, 3, 64, 80, device="meta"))


@pytest.mark.parametrize("name", ["dynamicvit_swin_t_k07", "dynamicvit_convnext_t_k07"])
def test_impossible_two_speed_models_name_the_limit(name):
    last = 5 if "swin" in name else 8
    with on_meta():
        with pytest.raises(ValueError, match=r"keep_ratio must be above 0\.4, not 0\.4"):
            harness.build(name, keep_ratio=0.4)
        with pytest.raises(ValueError, match=f"blocks are numbered 0 to {last}"):
            harness.build(name, pruning_loc=[last + 1])
        with pytest.raises(ValueError, match="image_size must be a multiple of 32, not 240"):
            harness.build(name, image_size=240)
