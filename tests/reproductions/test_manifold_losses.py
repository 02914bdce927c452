"""Manifold distillation: the losses, their gradients, and which token meets which."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_tools import golden_cases, golden_input
from torch import Tensor

from reproductions.manifold_distillation import losses
from reproductions.manifold_distillation.losses import Weights, manifold_loss
from reproductions.manifold_distillation.matching import Features, match_tokens, merge_patches
from reproductions.manifold_distillation.method import label_terms, manifold_terms, random_rows

CASES = {case.values[0]["name"]: case for case in golden_cases("manifold_distillation/losses")}
LAYERS = [one for one in CASES.values() if one.values[0].get("function") == "layer_mf_loss"]
TOTALS = [one for one in CASES.values() if one.values[0].get("function") == "DistillationLoss"]
#: name in the fixtures -> weights that leave this alone
TERMS = {
    "patch": Weights(1, 0, 0), "sample": Weights(0, 1, 0), "rand": Weights(0, 0, 1),
    "weighted_total_4_0.1_0.2": Weights(),
}  # fmt: skip
ONE_EACH = Weights(1, 1, 1, 1)


def features_of(spec: dict) -> Tensor:
    """The fixtures' rule for features."""
    if "near" not in spec:
        return golden_input(spec["shape"], spec["seed"])
    near = spec["near"]
    base = golden_input(near["of"]["shape"], near["of"]["seed"])[..., : spec["shape"][-1]]
    return base + near["eps"] * golden_input(spec["shape"], near["noise_seed"])


def seeded_rows(seed: int):
    """The fixtures' sampler: pair j has a generator of its own."""

    def sampler(pair: int, total: int, count: int) -> Tensor:
        return torch.from_numpy(np.random.RandomState(seed + pair).permutation(total)[:count])

    return sampler


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_losses(student: Tensor, teacher: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """The terms as one would write them down, by the matrices themselves."""
    a, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)

    def term(own: Tensor, other: Tensor) -> Tensor:
        return (own @ own.mT - other @ other.mT).square().mean()

    flat = a.flatten(0, 1), t.flatten(0, 1)
    return {
        "patch": term(a, t),
        "sample": term(a.transpose(0, 1), t.transpose(0, 1)),
        "rand": term(flat[0][rows], flat[1][rows]),
        "full": term(*flat),
    }


def close(found: float, wanted: float, relative: float = 1e-5) -> bool:
    return abs(found - wanted) <= max(relative * abs(wanted), 1e-12)


# the fixtures


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("case", LAYERS)
def test_a_pair_of_layers_equals_the_fixture(case, term):
    wanted = case["expected"][term]
    student = features_of(case["student"]).requires_grad_()
    pair = [Features.of(one) for one in (student, features_of(case["teacher"]))]
    own, other, skip = match_tokens(*pair, case["merge_max_patch_num"] or 0)
    rows = seeded_rows(case["perm_seed"])(0, other.shape[0] * other.shape[1], case["K"])
    assert rows[:8].tolist() == case["expected"]["perm_first8"]
    loss, _ = manifold_loss(own, other, TERMS[term], rows=rows, skip=skip)
    loss.backward()
    assert close(loss.item(), wanted["loss"])
    assert close(student.grad.norm().item(), wanted["grad_l2"])
    first = torch.tensor(wanted["grad_first8"])
    error = (student.grad.flatten()[: len(first)] - first).norm()
    assert error <= max(1e-5 * first.norm(), 1e-9 * wanted["grad_l2"], 1e-15)


@pytest.mark.parametrize("case", LAYERS)
def test_unsplit_loss_and_mean_of_the_random_term_equal_the_fixture(case):
    wanted = case["expected"]["full_matrix_float64"]
    pair = [Features.of(features_of(case[who])) for who in ("student", "teacher")]
    own, other, _ = match_tokens(*pair, case["merge_max_patch_num"] or 0)
    _, values = manifold_loss(
        own, other, Weights(0, 0, 1, 1), num_samples=case["K"], expected_rand=True
    )
    assert close(values["full"].item(), wanted["mean_over_entries"], 1e-6)
    assert close(values["rand"].item(), wanted["expected_rand_term"], 1e-6)


def test_merged_layout_equals_the_fixture():
    case = CASES["merge_layout"].values[0]
    patches = torch.arange(2 * 16 * 3.0).view(2, 16, 3)
    merged = merge_patches(Features.of(patches), 4).tokens
    assert list(merged.shape) == case["output_shape"]
    assert merged.flatten()[:24].tolist() == case["output_first24"]


def test_several_layers_equal_the_fixture():
    case = CASES["mf_loss_readme_layers"].values[0]
    wanted = case["expected"]

    def layers(of: dict) -> list[Tensor]:
        return [golden_input(of["shape"], of["seed0"] + number) for number in range(of["count"])]

    student = [one.requires_grad_() for one in layers(case["student_layers"])]
    teacher = layers(case["teacher_layers"])
    sample, patch, rand = case["w_sample_patch_rand"]
    found = manifold_terms(
        [student[number] for number in case["s_id"]],
        [teacher[number] for number in case["t_id"]],
        Weights(patch, sample, rand), num_samples=case["K"],
        sampler=seeded_rows(case["perm_seed"]),
    )  # fmt: skip
    for name in ("sample", "patch", "rand"):
        assert close(found[name].item(), wanted[f"mf_{name}"])
    assert close(found["manifold"].item(), wanted["sum"])
    found["manifold"].backward()
    for layer, norm in zip(student, wanted["grad_l2_per_student_layer"], strict=True):
        assert close(0.0 if layer.grad is None else layer.grad.norm().item(), norm)
    assert student[0].grad[:, 0].abs().max() == 0 < student[0].grad[:, 1].abs().max()


@pytest.mark.parametrize("case", TOTALS)
def test_whole_loss_equals_the_fixture(case):
    extra, wanted = case["extra"], case["expected"]
    shape = [extra["batch"], extra["classes"]]
    logits = (2 * golden_input(shape, 21)).requires_grad_()
    answers, targets = 3 * golden_input(shape, 22), golden_input(shape, 23).softmax(-1)
    student, teacher = golden_input([4, 5, 8], 31).requires_grad_(), golden_input([4, 4, 6], 32)
    parts = label_terms(
        logits, logits, answers, targets, case["kind"], case["alpha"], case["tau"]
    )  # fmt: skip
    sample, patch, rand = extra["weights_sample_patch_rand"]
    found = manifold_terms(
        [student], [teacher], Weights(patch, sample, rand), num_samples=extra["K"],
        sampler=seeded_rows(extra["perm_seed"]),
    )  # fmt: skip
    parts |= {name: case["beta"] * value for name, value in found.items()}
    names = ("base", "teacher", "sample", "patch", "rand")
    for name, value in zip(names, wanted["terms_base_dist_sample_patch_rand"], strict=True):
        assert close(parts[name].item(), value), name
    total = parts["base"] + parts["teacher"] + parts["manifold"]
    assert close(total.item(), wanted["total"])
    total.backward()
    assert close(logits.grad.norm().item(), wanted["grad_l2_logits"])
    assert close(student.grad.norm().item(), wanted["grad_l2_feat"])
    first = torch.tensor(wanted["grad_logits_first8"])
    assert (logits.grad.flatten()[:8] - first).norm() <= 2e-5 * first.norm()


# the same by other ways


SHAPES = [  # images, tokens, widths of student and teacher
    (4, 9, 16, 24), (2, 25, 4, 6), (9, 4, 3, 3), (1, 7, 5, 8), (5, 1, 6, 2), (33, 2, 2, 2),
    (2, 200, 3, 5),
]  # fmt: skip


@pytest.mark.parametrize("block", [None, 64], ids=["whole", "in pieces"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_plain_form(shape, block, monkeypatch):
    """By points and by channels, a few groups or rows at a time."""
    if block:
        monkeypatch.setitem(losses.BLOCK, "cpu", block)
    images, tokens, width, other = shape
    student = randn(images, tokens + 1, width, dtype=torch.float64).requires_grad_()
    teacher = randn(images, tokens, other, seed=1, dtype=torch.float64)
    rows = torch.randperm(images * tokens)[:11]
    weights = Weights(0.7, 1.3, 0.4, 2.1)
    loss, values = manifold_loss(student, teacher, weights, rows=rows, skip=1)
    (own,) = torch.autograd.grad(loss, student)
    plain = plain_losses(student[:, 1:], teacher, rows)
    wanted = sum(getattr(weights, name) * value for name, value in plain.items())
    (theirs,) = torch.autograd.grad(wanted, student)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-13)
    for name, value in plain.items():
        torch.testing.assert_close(values[name], value, rtol=1e-11, atol=1e-14)
        assert not values[name].requires_grad


@pytest.mark.parametrize("expected_rand", [False, True])
def test_gradients_are_those_of_small_steps(expected_rand):
    student = randn(3, 5, 4, dtype=torch.float64).requires_grad_()
    teacher = randn(3, 4, 6, seed=1, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        rows = torch.tensor([0, 5, 11, 2])
        options = {"rows": rows, "skip": 1, "num_samples": 4, "expected_rand": expected_rand}
        return manifold_loss(x, teacher, Weights(1, 2, 3, 4), **options)[0]

    assert torch.autograd.gradcheck(loss, (student,))


def test_rows_that_repeat_get_every_share():
    student = randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    teacher = randn(2, 3, 4, seed=1, dtype=torch.float64)
    rows = torch.tensor([1, 1, 4, 1])
    loss, _ = manifold_loss(student, teacher, Weights(0, 0, 1), rows=rows)
    wanted = plain_losses(student, teacher, rows)["rand"]
    grads = [torch.autograd.grad(one, student)[0] for one in (loss, wanted)]
    torch.testing.assert_close(*grads)


def test_mean_of_the_random_term_is_that_of_all_draws():
    from itertools import combinations

    student, teacher = randn(2, 4, 3, dtype=torch.float64), randn(2, 4, 5, seed=1).double()
    for count in (1, 3, 8):
        drawn = [
            plain_losses(student, teacher, torch.tensor(rows))["rand"]
            for rows in combinations(range(8), count)
        ]
        _, values = manifold_loss(
            student, teacher, Weights(0, 0, 1), num_samples=count, expected_rand=True
        )
        torch.testing.assert_close(values["rand"], torch.stack(drawn).mean())


@pytest.mark.parametrize("images", [1, 6])
def test_more_rows_than_there_are_means_all(images):
    student, teacher = randn(images, 4, 8), randn(images, 4, 8, seed=1)
    options = {"weights": Weights(0, 0, 1, 1), "num_samples": 500}
    for expected in (False, True):
        _, values = manifold_loss(student, teacher, expected_rand=expected, **options)
        torch.testing.assert_close(values["rand"], values["full"])


def test_rotated_and_rescaled_features_lose_nothing():
    teacher = randn(4, 9, 16)
    turn = torch.linalg.qr(randn(16, 16, seed=1))[0]
    lengths = 0.1 + randn(4, 9, 1, seed=2).abs()
    _, values = manifold_loss(lengths * (teacher @ turn), teacher, ONE_EACH)
    assert all(value < 1e-12 for value in values.values())
    _, other = manifold_loss(randn(4, 9, 16, seed=3), teacher, ONE_EACH)
    assert all(value > 1e-3 for value in other.values())


def test_one_image_has_no_inter_term_and_one_row_no_random_term():
    student, teacher = randn(1, 9, 8), randn(1, 9, 8, seed=1)
    _, values = manifold_loss(student, teacher, ONE_EACH, num_samples=1)
    assert values["sample"] < 1e-12 and values["rand"] < 1e-12 < 1e-3 < values["patch"]


def test_tokens_of_length_zero_do_no_harm():
    student, teacher = randn(2, 4, 8), randn(2, 4, 8, seed=1)
    student[0, 0] = 0
    rows = torch.arange(8)
    plain = student.clone().requires_grad_()
    sum(plain_losses(plain, teacher, rows).values()).backward()
    student.requires_grad_()
    loss, _ = manifold_loss(student, teacher, ONE_EACH, rows=rows)
    loss.backward()
    assert student.grad.isfinite().all()
    torch.testing.assert_close(student.grad[1], plain.grad[1])


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
def test_nearly_equal_features_keep_their_digits(noise):
    """The form by channels is a difference of large numbers; its digits must not go with them."""
    teacher = randn(3, 300, 12)
    student = teacher + noise * randn(3, 300, 12, seed=1)
    rows = torch.arange(0, 900, 2)
    _, values = manifold_loss(student, teacher, ONE_EACH, rows=rows)
    wanted = plain_losses(student.double(), teacher.double(), rows)
    for name, value in wanted.items():
        assert close(values[name].item(), value.item()), name


def test_gradients_in_half_precision_are_scaled_before_they_are_rounded():
    """What is below float16's smallest number is why mixed precision scales a loss, by more than
    float16's largest."""
    student, teacher = randn(4, 50, 8).half(), randn(4, 50, 8, seed=1).half()
    rows, scale = torch.arange(10), 2.0**17
    half, single = student.requires_grad_(), student.detach().float().requires_grad_()
    for one in (half, single):
        (scale * manifold_loss(one, teacher, Weights(1e-4, 0, 0), rows=rows)[0]).backward()
    assert half.grad.dtype == torch.float16
    torch.testing.assert_close(half.grad.float(), single.grad, rtol=1e-3, atol=1e-6)


def test_no_gradient_is_made_where_none_is_wanted():
    student, teacher = randn(2, 4, 8).requires_grad_(), randn(2, 4, 8, seed=1).requires_grad_()
    with torch.no_grad():
        loss, _ = manifold_loss(student, teacher)
    assert not loss.requires_grad
    loss, _ = manifold_loss(student, teacher)
    (2 * loss).backward()
    assert teacher.grad is None and student.grad.norm() > 0
    assert not manifold_loss(student.detach(), teacher)[0].requires_grad


def test_half_precision_around_it_changes_nothing():
    student, teacher = randn(2, 9, 8).requires_grad_(), randn(2, 9, 8, seed=1)
    rows = torch.arange(10)
    loss, _ = manifold_loss(student, teacher, ONE_EACH, rows=rows)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = manifold_loss(student, teacher, ONE_EACH, rows=rows)
    assert again.dtype == torch.float32 and torch.equal(loss, again)
    half = student.detach().bfloat16().requires_grad_()
    loss, _ = manifold_loss(half, teacher.bfloat16(), ONE_EACH, rows=rows)
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == torch.bfloat16
    wanted, _ = manifold_loss(half.float(), teacher.bfloat16().float(), ONE_EACH, rows=rows)
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("rows", [[10], [-1], []])
def test_rows_that_do_not_exist_are_refused(rows):
    rows = torch.tensor(rows, dtype=torch.int64)
    with pytest.raises(ValueError, match="rows must be numbers from 0 to 9, at least one"):
        manifold_loss(randn(2, 5, 4), randn(2, 5, 4), rows=rows)


def test_precision_is_the_students():
    student, teacher = randn(2, 9, 8), randn(2, 9, 8, seed=1)
    rows = torch.arange(10)
    wanted, _ = manifold_loss(student, teacher, ONE_EACH, rows=rows)
    single, _ = manifold_loss(student, teacher.double(), ONE_EACH, rows=rows)
    assert single.dtype == torch.float32 and torch.equal(single, wanted)
    double, _ = manifold_loss(student.double(), teacher, ONE_EACH, rows=rows)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), wanted)


def test_storage_shows_what_half_precision_loses():
    """Squares of differences below 2.4e-4 vanish in float16."""
    teacher = randn(4, 49, 32)
    errors = []
    for noise in (0.3, 1e-3):
        student = teacher + noise * randn(4, 49, 32, seed=1)
        exact = manifold_loss(student, teacher, Weights(1, 0, 0))[0]
        stored = manifold_loss(student, teacher, Weights(1, 0, 0), storage=torch.float16)[0]
        errors.append(abs(float(stored / exact) - 1))
    assert errors[0] < 2e-3 and errors[1] > 0.1


def test_sampler_draws_without_repetition():
    rows = random_rows(0, 50, 20)
    assert len(rows) == len(set(rows.tolist())) == 20 and 0 <= rows.min() <= rows.max() < 50
    torch.manual_seed(3)
    first = random_rows(0, 50, 20)
    torch.manual_seed(3)
    assert torch.equal(first, torch.randperm(50)[:20])
    assert len(random_rows(0, 7, 20)) == 7
