"""NASViT's parts and its training step: modules, divergence, projection, against the authors'."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_tools import assert_matches, filled_state_dict, golden_cases, golden_input, load_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from test_nasvit import supernet
from torch import nn

from harness.errors import ReplivitError
from reproductions.nasvit.attention import MLP, relative_bias
from reproductions.nasvit.conflict import ROUNDING
from reproductions.nasvit.convert import our_name
from reproductions.nasvit.gradients import Products, combine
from reproductions.nasvit.layers import MBConv, Shortcut
from reproductions.nasvit.losses import adaptive_divergence, alpha_divergence, soft_targets
from reproductions.nasvit.space import NASVIT, Block, Config
from reproductions.nasvit.supernet import (
    SLICED,
    SlicedAttention,
    SlicedBlock,
    SlicedLinear,
    scale_row,
)
from reproductions.nasvit.training import ConflictAware, objective

# ---- modules -------------------------------------------------------------------------------------

MODULES = [one for one in golden_cases("nasvit/modules") if "module" in one.values[0]]


def build(case: dict) -> nn.Module:
    """Our module of a case, at the sizes that the case sets."""
    kind, options = case["module"], case["module_kwargs"]
    told = case["extra"].get("set_attributes", {})
    if kind == "DynamicWindowAttention":
        module = SlicedAttention(max(options["dim_list"]), 18)
        module.set_width(case["input_shape"][-1])
    elif kind == "DynamicSwinTransformerBlock":
        module = SlicedBlock(max(options["dim_list"]), NASVIT, switched=True)
        module.set_size(case["input_shape"][1], told["rescale_idx"])
    elif kind == "DynamicMlp":
        module = MLP(options["out_features"], SlicedLinear)
        module.linear1.width = module.linear2.width = case["input_shape"][-1]
    elif kind == "DynamicShortcutLayer":
        width_in, width_out = max(options["in_channel_list"]), max(options["out_channel_list"])
        module = Shortcut(width_in, width_out, options["reduction"], True, SLICED)
        module.width = module.conv.width = told["active_out_channel"]
    else:
        module = build_bottleneck(case)
    return module


class Nothing(nn.Module):
    """A shortcut that adds nothing."""

    def forward(self, x: torch.Tensor) -> float:
        return 0.0


def build_bottleneck(case: dict) -> MBConv:
    """Without its shortcut, which is another module there."""
    options, told = case["module_kwargs"], case["extra"]["set_attributes"]
    width_in, width_out = max(options["in_channel_list"]), max(options["out_channel_list"])
    hidden = width_in * max(options["expand_ratio_list"])
    block = Block(0, 0, False, width_in, width_out, hidden, True, hidden // 4,
                  max(options["kernel_size_list"]), options["stride"], 12, 6, 1)  # fmt: skip
    module = MBConv(block, False, SLICED)
    used = case["input_shape"][1] * told["active_expand_ratio"]
    module.expand.conv.width = module.se.expand.width = used
    module.se.reduce.width = 32  # 120 / 4 = 30, to a multiple of 8
    module.depthwise.conv.kernel = told["active_kernel_size"]
    module.project.conv.width = told["active_out_channel"]
    module.shortcut = Nothing()
    return module


PREFIXES = {"DynamicWindowAttention": "attn.", "DynamicMlp": "mlp1.",
            "DynamicShortcutLayer": "shortcut.",
            "DynamicMBConvLayer": "mobile_inverted_conv."}  # fmt: skip
OURS = {"attn.": "attn.", "mlp1.": "mlp1.", "shortcut.": "shortcut.", "mobile_inverted_conv.": ""}


@torch.no_grad()
@pytest.mark.parametrize("case", MODULES)
def test_modules(case):
    module, prefix = build(case), PREFIXES.get(case["module"], "")
    state = {}
    skipped = ("*bn_tracking*", "*relative_position_index", "rescale")
    for key, value in filled_state_dict(case["state_dict"], skip=skipped).items():
        name = our_name(f"blocks.0.{prefix}{key}", ["x"]).removeprefix(f"x.{OURS.get(prefix, '')}")
        state[name] = value.flatten(1) if value.ndim == 4 and name.startswith("se.") else value
    for name, factor in case["extra"].get("post_scale", ()):
        state[name] = state[name] * factor
    missing = module.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all("num_batches" in one for one in missing.missing_keys)
    count = sum(one.numel() for one in module.parameters())
    left_out = 40 if case["module"] == "DynamicMBConvLayer" else 0  # the unused vector
    assert count + left_out == case["params"]
    x = golden_input(case["input_shape"], case["extra"]["input_seed"])
    x = x * case["extra"].get("input_scale", 1)
    if case["module"] == "DynamicWindowAttention":  # ours takes the map
        side = round(x.shape[1] ** 0.5)
        x = x.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    assert_matches(module.train(case["mode"] == "train")(x), case)


def test_relative_bias_is_the_released_index():
    """The strided windows against the index by offsets, pair by pair."""
    window, side, heads = 5, 4, 3
    table = torch.randn((2 * window - 1) ** 2, heads)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack([rows, columns]).flatten(1)
    offset = place[:, :, None] - place[:, None, :] + window - 1
    wanted = table[offset[0] * (2 * window - 1) + offset[1]].permute(2, 0, 1)
    assert torch.equal(relative_bias(table, side), wanted)


@pytest.mark.parametrize(
    "resolution, rows",
    [(192, (0, 4, 4, 1)), (224, (4, 1, 1, 0)), (256, (0, 0, 0, 0)), (288, (4, 1, 1, 1))],
)
def test_scales_are_switched_by_depth_and_tokens(resolution, rows):
    config = Config.of({**NASVIT.smallest().as_dict(), "resolution": resolution})
    found = {
        block.stage: scale_row(block.depth, block.tokens)
        for block in NASVIT.blocks(config)
        if block.transformer
    }
    assert found == {stage: (3, row) for stage, row in zip(range(3, 7), rows, strict=True)}
    assert scale_row(7, 49, switched=False) == (0, 0)


# ---- losses --------------------------------------------------------------------------------------


def logits(spec: dict) -> torch.Tensor:
    return golden_input(spec["shape"], spec["seed"]) * spec.get("scale", 1)


@pytest.mark.parametrize(
    "case",
    [one for one in golden_cases("nasvit/kd_loss") if one.values[0]["name"] != "soft_ce"],
)
def test_adaptive_divergence(case):
    options = case["args"]
    student, teacher = logits(case["student"]).requires_grad_(), logits(case["teacher"])
    if case["teacher"]["softmaxed"]:
        teacher = teacher.softmax(1)
    found = adaptive_divergence(
        student, teacher, options["alpha_min"], options["alpha_max"], options["iw_clip"],
        normalized=options["p_normalize"],
    )  # fmt: skip
    for value, key in (
        (found.low, "divergence_left"), (found.surrogate_low, "surrogate_left"),
        (found.high, "divergence_right"), (found.surrogate_high, "surrogate_right"),
        (found.loss, "per_sample"),
    ):  # fmt: skip
        torch.testing.assert_close(value, torch.tensor(case[key]), rtol=1e-5, atol=1e-6)
    assert found.chosen_low.tolist() == case["left_selected"]
    loss = found.loss.mean()
    assert loss.item() == pytest.approx(case["mean"], rel=1e-5)
    loss.backward()
    for own, first, norm in zip(
        student.grad, case["grad_student_first16"], case["grad_student_l2"], strict=True
    ):
        torch.testing.assert_close(own[:16], torch.tensor(first), rtol=1e-5, atol=1e-8)
        assert own.norm().item() == pytest.approx(norm, rel=1e-5)


def test_soft_targets_of_two_teachers():
    case = next(one.values[0] for one in golden_cases("nasvit/kd_loss")
                if one.values[0]["name"] == "soft_ce")  # fmt: skip
    student = logits(case["student"]).requires_grad_()
    target = soft_targets(list(map(logits, case["teachers"])), case["temperature_multiplier"])
    wanted = torch.tensor(case["target_first16"])
    torch.testing.assert_close(target[:, : wanted.shape[1]], wanted, rtol=1e-5, atol=1e-9)
    loss = nn.functional.cross_entropy(student, target)
    assert loss.item() == pytest.approx(case["value"], rel=1e-5)
    loss.backward()
    wanted = torch.tensor(case["grad_first16"])
    torch.testing.assert_close(student.grad[:, :16], wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
def test_alpha_divergence_is_one(alpha):
    """Zero for equal answers, positive otherwise, and its gradient is the surrogate's."""
    torch.manual_seed(0)
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64)
    same, _ = alpha_divergence(student, student, alpha, clip=1e9)
    assert same.abs().max() < 1e-9
    divergence, surrogate = alpha_divergence(student, teacher, alpha, clip=1e9)
    assert (divergence > 0).all()
    (gradient,) = torch.autograd.grad(surrogate.sum(), student)
    shift = 1e-6 * torch.randn_like(student)
    there = alpha_divergence(student + shift, teacher, alpha, clip=1e9)[0].sum()
    back = alpha_divergence(student - shift, teacher, alpha, clip=1e9)[0].sum()
    assert ((there - back) / 2).item() == pytest.approx((gradient * shift).sum().item(), rel=1e-4)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 1.0])
def test_vanishing_probabilities_give_numbers(alpha):
    """Both sides may be so sure that the rest is 0 in float32."""
    sure = torch.tensor([[200.0, 0, 0], [0, 200, 0], [0, 0, 0]])
    student = torch.tensor([[0.0, 200, 0], [0, 200, 0], [200, 0, 0]], requires_grad=True)
    divergence, surrogate = alpha_divergence(student, sure, alpha)
    surrogate.sum().backward()
    assert divergence.isfinite().all() and surrogate.isfinite().all()
    assert student.grad.isfinite().all() and divergence[0] > 0


def test_impossible_divergences_are_refused():
    with pytest.raises(ValueError, match="alpha_min must not exceed alpha_max"):
        adaptive_divergence(torch.zeros(1, 2), torch.zeros(1, 2), 1.0, -1.0)
    with pytest.raises(ValueError, match="clip must be positive, not 0"):
        adaptive_divergence(torch.zeros(1, 2), torch.zeros(1, 2), clip=0)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden_cases("nasvit/gradient_projection"))
def test_gradient_combination(case):
    """Six tensors: agreement, conflict, conflict beyond the bound, and absent gradients."""

    def tensors(key: str) -> list:
        return [None if row is None else torch.tensor(row) for row in case[key]]

    largest, subnets = tensors("grad_largest"), tensors("grad_subnets")
    parameters = [nn.Parameter(torch.zeros(8)) for _ in subnets]
    if case["clip_norm_on_subnet_sum"]:
        for one, gradient in zip(parameters, subnets, strict=True):
            one.grad = gradient
        norm = nn.utils.clip_grad_norm_(parameters, case["clip_norm_on_subnet_sum"])
        assert norm.item() == pytest.approx(case["subnet_norm_before_clip"], rel=1e-5)
    made = combine(largest, subnets, project=not case["proj_student"])
    for number, (own, wanted) in enumerate(zip(made, tensors("final_grad"), strict=True)):
        if subnets[number] is None and case["zero_grad_between"] == "none":
            # the released code adds the tensor to itself here; its training ran with zeros
            wanted = wanted / 2
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6)
    for one, gradient in zip(parameters, made, strict=True):
        one.grad = gradient
    torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0).step()
    after = tensors("param_after_adamw_step_from_zero_lr0.1")
    for own, wanted in zip(parameters, after, strict=True):
        torch.testing.assert_close(own.data, wanted, rtol=1e-4, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
def test_projection_never_hurts_the_subnets(seed, size):
    """To first order, unless the coefficient hits its bound; agreement is left alone."""
    rng = np.random.default_rng(seed)
    largest = [torch.from_numpy(rng.standard_normal(7)) * size for _ in range(5)]
    subnets = [torch.from_numpy(rng.standard_normal(7)) for _ in range(5)]
    products = Products.of(largest, subnets)
    for own, big, small, c in zip(
        combine(largest, subnets), largest, subnets, products.coefficients, strict=True
    ):
        torch.testing.assert_close(own, (1 + c) * small + big)
        if (big * small).sum() >= 0:
            assert c == 0
        elif c < 2:
            kept = big + c * small
            assert abs((kept * small).sum()) < 1e-4 * size, "no part of it against the subnets"
            assert (own * small).sum() >= 0


def test_absent_gradients():
    one = torch.ones(2)
    assert combine([None, one], [None, None])[0] is None
    assert combine([None], [one])[0] is one and combine([one], [None])[0] is one


# ---- the whole step ------------------------------------------------------------------------------


class Fixed(nn.Module):
    """A teacher that always answers the same."""

    def __init__(self, answers: torch.Tensor) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.answers


def test_training_step():
    """Losses, both gradients, their conflict, the clipped and combined gradient, the update."""
    cases = load_golden("nasvit/train_step")["cases"]
    case = cases[0]
    net = supernet(load_golden("nasvit/train_step")["post_scale"]).train()
    method = ConflictAware()
    method._teachers = [
        Fixed(golden_input([case["batch"][0], 1000], one)) for one in case["teacher_logit_seeds"]
    ]
    context = SimpleNamespace(
        model=net, autocast=nullcontext, backward=lambda loss: loss.backward(),
        recipe=SimpleNamespace(label_smoothing=0.0),
    )  # fmt: skip
    images = golden_input(case["batch"], case["input_seed"])
    others = [(str(number), Config.of(one)) for number, one in enumerate(case["subnets"])]
    losses, largest = method.gradients(net, images, None, context, others)
    assert losses["largest"].item() == pytest.approx(case["ce_loss_largest"], rel=1e-3)
    for (name, _), wanted in zip(others, case["kd_losses"], strict=True):
        assert losses[name].item() == pytest.approx(wanted, rel=1e-3)

    named = [(name, one) for name, one in net.named_parameters() if one.requires_grad]
    parameters = [one for _, one in named]
    subnets = [one.grad for one in parameters]
    assert sum(one is None for one in largest) == case["parameters_without_gradient"]
    check_conflict(net, named, largest, subnets, case)
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    assert norm.item() == pytest.approx(case["grad_norm_subnet_sum_before_clip"], rel=1e-3)

    before = [one.detach().clone() for one in parameters]
    for case in cases:
        made = combine(largest, subnets, project=not case["proj_student"])
        total = torch.stack([one.norm() for one in made if one is not None]).norm()
        assert total.item() == pytest.approx(case["final_grad_norm"], rel=1e-3)
        for one, start, gradient in zip(parameters, before, made, strict=True):
            one.data.copy_(start)
            one.grad = gradient
        torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0).step()
        check_selected(case, dict(named), dict(zip((n for n, _ in named), before, strict=True)))


def check_conflict(net, named, largest, subnets, case) -> None:
    both = [number for number, one in enumerate(subnets) if one is not None]
    products = Products.of([largest[one] for one in both], [subnets[one] for one in both])
    assert len(both) == case["tensors_with_both_gradients"]
    kinds = case["conflict_by_kind"]
    blocks = tuple(f"{n}." for n, one in net.named_modules() if isinstance(one, SlicedBlock))
    inside = torch.tensor([named[one][0].startswith(blocks) for one in both])
    assert inside.sum().item() == kinds["transformer"]["tensors"]
    # two biases per block are the same for all keys of a softmax: their gradients are rounding
    noise = sum(named[one][0].endswith(ROUNDING) for one in both)
    assert abs((products.inner < 0).sum().item() - case["tensors_in_conflict"]) <= noise / 4
    cosine = products.whole_cosine.item()
    assert cosine == pytest.approx(case["cosine_largest_vs_subnet_sum"], rel=5e-3)


def check_selected(case, parameters, before) -> None:
    places = [block.name for block in NASVIT.blocks(NASVIT.largest())]
    for key, wanted in case["selected"].items():
        name = our_name(key, places)
        gradient, update = parameters[name].grad, parameters[name].data - before[name]
        assert gradient.norm().item() == pytest.approx(wanted["grad_l2"], rel=1e-3), name
        slack = 1e-3 * wanted["grad_l2"] * gradient.numel() ** 0.5
        assert gradient.sum().item() == pytest.approx(wanted["grad_sum"], abs=slack), name
        assert update.norm().item() == pytest.approx(wanted["update_l2"], rel=5e-3), name


def test_impossible_objectives_are_refused():
    with pytest.raises(ValueError, match="distillation is alpha, soft or none, not 'hard'"):
        ConflictAware(distillation="hard")
    with pytest.raises(ValueError, match="subnets must be at least 1"):
        ConflictAware(subnets=0)
    with pytest.raises(ReplivitError, match="trains from scratch"):
        objective(weights="file.pt")
    context = SimpleNamespace(model=nn.Linear(1, 1), name="linear")
    with pytest.raises(ReplivitError, match="linear is no supernet"):
        ConflictAware().setup(context)
    recipe = SimpleNamespace(mixed_precision="fp16", accumulation=1)
    with pytest.raises(ReplivitError, match="mixed_precision no or bf16"):
        ConflictAware().setup(SimpleNamespace(model=supernet(), name="x", recipe=recipe))
