"""Manifold distillation: taps in students and teachers, a whole training step, the objective."""

from __future__ import annotations

import types

import pytest
import timm
import torch
from golden_tools import assert_matches, filled_state_dict, golden_input, load_golden
from test_manifold_losses import close, randn, seeded_rows
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.measurement.macs_fvcore import count_macs_fvcore
from harness.meta import on_meta
from harness.training import Recipe, read_recipe, train
from reproductions.manifold_distillation.losses import Weights
from reproductions.manifold_distillation.matching import Features, match_tokens, merge_patches
from reproductions.manifold_distillation.method import (
    ManifoldDistillation,
    end_layers,
    imagenet_objective,
    manifold_terms,
    micro_objective,
)
from reproductions.manifold_distillation.taps import block_names, find_layers, tapped

FIXTURE = "manifold_distillation/deit_tiny__cait_s24"


@pytest.fixture(scope="module")
def golden() -> dict:
    return load_golden(FIXTURE)


@pytest.fixture(scope="module")
def networks(golden) -> dict[str, nn.Module]:
    """The fixture's student (drop rates 0) and teacher under its fill."""
    student = harness.load_official(
        "manifold_deit_tiny", filled_state_dict(golden["state_dict"], golden["fill"])
    )
    teacher = timm.create_model("cait_s24_224").eval()
    state = filled_state_dict(golden["teacher_state_dict"], golden["fill"])
    assert list(state) == list(teacher.state_dict())
    teacher.load_state_dict(state)
    return {"student": student, "teacher": teacher}


def made_on_meta(make, *args, **options) -> nn.Module:
    with on_meta():
        return make(*args, **options).eval()


def context_of(student: nn.Module, **recipe) -> types.SimpleNamespace:
    """What an objective sees of a run, without one."""
    from harness.training.context import Context

    accelerator = types.SimpleNamespace(device=torch.device("cpu"))
    return Context(
        model=student, recipe=Recipe(**recipe), accelerator=accelerator, seed=0, track="imagenet",
        num_classes=student.num_classes, image_size=(224, 224), input=None, steps_per_epoch=1,
        directory=None,
    )  # fmt: skip


# networks and taps


def test_counts_equal_the_fixture(golden, networks):
    params = {
        which: sum(one.numel() for one in net.parameters()) for which, net in networks.items()
    }
    assert params == {"student": golden["params"], "teacher": golden["params_detail"]["teacher"]}
    macs = {which: count_macs_fvcore(net, 224).total for which, net in networks.items()}
    assert macs == {"student": golden["macs_fvcore"], "teacher": golden["macs_detail"]["teacher"]}


@pytest.mark.parametrize("which", ["student", "teacher"])
@torch.no_grad()
def test_logits_and_taps_equal_the_fixture(golden, networks, which):
    cases = [one for one in golden["cases"] if one.get("model") == which]
    numbers = [int(one["name"].rpartition("block")[2]) for one in cases[1:]]
    model = networks[which]
    with tapped(model, numbers) as taps:
        logits = model(golden_input([2, 3, 224, 224]))
    assert_matches(logits, cases[0])
    assert len(block_names(model)) == cases[1]["extra"]["num_taps"]
    for case, features in zip(cases[1:], taps.features(), strict=True):
        assert_matches(features.tokens, case)
        assert features.grid == (14, 14)
        assert features.prefix == (1 if which == "student" else 0)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["step_soft_a1.0_t1.0", "step_soft_a0.5_t3.0"])
def test_training_step_equals_the_fixture(golden, networks, name):
    """The objective's loss and its gradients, as the trainer asks for them."""
    case = next(one for one in golden["cases"] if one["name"] == name)
    extra, wanted = case["extra"], case["expected"]
    sample, patch, rand = extra["weights_sample_patch_rand"]
    student = networks["student"].train().requires_grad_()
    objective = ManifoldDistillation(
        networks["teacher"], kind=case["kind"], alpha=case["alpha"], tau=case["tau"],
        terms=Weights(patch, sample, rand), num_samples=extra["K"],
        sampler=seeded_rows(extra["perm_seed"]),
    )  # fmt: skip
    objective._check_input = lambda context: None  # random weights, random images
    context = context_of(student)
    objective.setup(context)
    student.zero_grad()
    parts = objective.loss(
        student, golden_input(case["input_shape"]), torch.tensor(extra["labels"]), context
    )
    names = ("base", "teacher", "sample", "patch", "rand")
    for key, value in zip(names, wanted["terms_base_dist_sample_patch_rand"], strict=True):
        assert close(parts[key].item(), value), key
    assert close(parts["loss"].item(), wanted["total"])
    parts["loss"].backward()
    grads = {key: one.grad for key, one in student.named_parameters()}
    norms = {key: one.double().norm() for key, one in grads.items()}
    for key, norm in wanted["grad_l2"].items():
        assert close(norms[key].item(), norm), key
    assert close(torch.stack(list(norms.values())).norm().item(), wanted["grad_l2_total"])
    assert all(one.grad is None for one in networks["teacher"].parameters())


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("deit_tiny_distilled_patch16_224", 12, "blocks.0", "blocks.11"),
        ("cait_xxs24_224", 24, "blocks.0", "blocks.23"),
        ("regnety_160", 18, "s1.b1", "s4.b1"),
        ("swin_tiny_patch4_window7_224", 12, "layers.0.blocks.0", "layers.3.blocks.1"),
        ("convnext_tiny", 18, "stages.0.blocks.0", "stages.3.blocks.2"),
        ("resnet50", 16, "layer1.0", "layer4.2"),
        ("hiera_tiny_224", 12, "blocks.0", "blocks.11"),  # timm lists the last of each stage
        ("mvitv2_tiny", 10, "stages.0.blocks.0", "stages.3.blocks.1"),
        ("twins_svt_small", 18, "blocks.0.0", "blocks.3.3"),
    ],
)
def test_blocks_are_found(name, count, first, last):
    names = block_names(made_on_meta(timm.create_model, name))
    assert (len(names), names[0], names[-1]) == (count, first, last)


@pytest.mark.parametrize(
    ("name", "layer", "grid", "prefix", "width"),
    [
        ("deit_tiny_distilled_patch16_224", 3, (14, 14), 2, 192),
        ("regnety_040", "s3.b5", (14, 14), 0, 512),
        ("regnety_040", "s2", (28, 28), 0, 192),
        ("swin_tiny_patch4_window7_224", 4, (14, 14), 0, 384),
        ("pvt_v2_b0", 0, (56, 56), 0, 32),
        ("deit3_small_patch16_224", -1, (14, 14), 1, 384),
    ],
)
@torch.no_grad()
def test_features_know_their_grid(name, layer, grid, prefix, width):
    model = made_on_meta(timm.create_model, name)
    with tapped(model, [layer]) as taps:
        model(torch.zeros(2, 3, 224, 224, device="meta"))
    features = taps.features()[0].gridded()
    assert (features.grid, features.prefix) == (grid, prefix)
    assert features.tokens.shape == (2, prefix + grid[0] * grid[1], width)


def test_end_layers_are_those_of_the_command():
    ends = [0, 1, 2, 3, 8, 9, 10, 11], [0, 1, 2, 3, 20, 21, 22, 23]
    assert end_layers(12, 24) == ends
    assert end_layers(12, 12) == (ends[0], ends[0])
    assert end_layers(6, 4) == ([0, 1, 4, 5], [0, 1, 2, 3])
    assert end_layers(3, 1) == ([2], [0])
    with pytest.raises(ValueError, match="a network without blocks has no layers to pair"):
        end_layers(12, 0)


# which token meets which


def matched(student, teacher, **options):
    """Shapes after matching: student, teacher, skipped."""
    own, other, skip = match_tokens(student, teacher, **options)
    return own.shape[1], other.shape[1], skip


def test_leading_tokens_as_released():
    def tokens(count, grid=(14, 14)):
        return Features.of(randn(2, count, 3), grid)

    assert matched(tokens(197), tokens(196)) == (197, 196, 1)
    assert matched(tokens(197), tokens(197)) == (197, 197, 0)
    assert matched(tokens(198), tokens(197)) == (198, 197, 1), "dist beside the teacher's class"
    assert matched(tokens(198), tokens(196)) == (198, 196, 2)
    assert matched(tokens(197), tokens(197), patches_only=True) == (197, 196, 1)
    assert matched(tokens(197), tokens(198), patches_only=True) == (197, 196, 1)
    assert matched(tokens(7, None), tokens(6, None)) == (7, 6, 1), "of unknown grids"
    with pytest.raises(ValueError, match="the teacher has 197 tokens and the student 196: only"):
        match_tokens(tokens(196), tokens(197))


def test_finer_grids_are_merged_before_tokens_are_dropped():
    fine, coarse = Features.of(randn(2, 784, 3)), Features.of(randn(2, 196, 5))
    assert matched(fine, coarse) == matched(coarse, fine) == (196, 196, 0)
    assert match_tokens(fine, coarse)[0].shape[2] == 4 * 3
    with_class = Features.of(randn(2, 197, 5), (14, 14))
    assert matched(fine, with_class) == (196, 196, 0)
    assert matched(with_class, fine) == (197, 196, 1)
    assert matched(fine, fine, max_patches=196) == (196, 196, 0)
    assert matched(with_class, coarse, max_patches=196) == (197, 196, 1)
    unknown = Features.of(randn(2, 197, 5)), Features.of(randn(2, 785, 3))
    assert matched(unknown[0], coarse, max_patches=196) == (196, 196, 0)
    assert matched(unknown[1], fine, max_patches=196) == (196, 196, 0)
    wide = Features.of(randn(2, 3, 8, 12)), Features.of(randn(2, 4, 4, 6))
    assert matched(*wide) == (24, 24, 0)


def test_merged_patches_are_neighbours():
    rows = torch.arange(4.0)[:, None].expand(4, 6)
    columns = torch.arange(6.0).expand(4, 6)
    merged = Features.of(torch.stack([rows, columns])[None]).merged(2)
    assert merged.grid == (2, 3)
    last = merged.tokens[0, -1].view(4, 2)
    assert last.tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]


@pytest.mark.parametrize("count", [1024, 400, 200])
def test_patches_that_do_not_divide_are_refused(count):
    with pytest.raises(ValueError, match=f"{count} patches cannot be merged to 14x14"):
        merge_patches(Features(randn(1, count, 3)), 196)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 784, 3), (2, 400, 3), "28x28 patches and the teacher's 20x20 cannot be matched"),
        ((2, 196, 3), (3, 196, 3), "features of 2 images cannot be compared with those of 3"),
        ((2, 90, 3), (2, 64, 3), "90 tokens are no square of patches with at most 6 tokens"),
        ((2, 196), (2, 196), "a layer that gives .2, 196. cannot be tapped"),
    ],
)
def test_features_that_cannot_be_matched_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        manifold_terms([randn(*student)], [randn(*teacher)])


def test_layers_must_pair():
    with pytest.raises(ValueError, match="2 layers of the student cannot be paired with 1 of the"):
        manifold_terms([randn(1, 4, 2)] * 2, [randn(1, 4, 2)])
    with pytest.raises(ValueError, match="weight of the patch term must be 0 or more, not -1"):
        Weights(-1)


# the objective


def taught(student: nn.Module, teacher: nn.Module, **options) -> dict[str, torch.Tensor]:
    """One loss of the objective on two images."""
    objective = ManifoldDistillation(teacher, **options)
    objective._check_input = lambda context: None
    context = context_of(student)
    objective.setup(context)
    images = randn(2, 3, *student.pretrained_cfg["input_size"][1:])
    return objective.loss(student.train(), images, torch.tensor([1, 2]), context)


def micro(**options) -> nn.Module:
    return harness.build("manifold_distillation_micro", **options)


def test_heads_of_a_distilled_student_learn_from_their_own_source():
    """Labels reach the class head, the teacher the distillation head."""
    student = harness.build("manifold_deit_tiny_distilled", 10, 32)
    parts = taught(student, micro(), alpha=0.3, terms=Weights(0, 0, 0))
    assert set(parts) == {"loss", "base", "teacher"}
    parts["base"].backward(retain_graph=True)
    assert student.head.weight.grad.any() and student.head_dist.weight.grad is None
    student.zero_grad()
    parts["teacher"].backward()
    assert student.head.weight.grad is None and student.head_dist.weight.grad.any()


def test_terms_reach_the_tapped_layers_and_those_before_alone():
    student = micro()
    parts = taught(student, micro(), s_id=[2], t_id=["blocks.4"], terms=Weights(1, 0, 0))
    (parts["loss"] - parts["base"] - parts["teacher"]).backward()
    assert student.blocks[2].mlp.fc2.weight.grad.any()
    assert not student.blocks[3].mlp.fc2.weight.grad.any()
    assert set(parts) == {"loss", "base", "teacher", "patch"}


def test_teacher_of_another_width_depth_and_grid():
    teacher = timm.create_model("regnety_002", num_classes=10).eval()
    student = harness.build("manifold_deit_tiny", 10, 64)  # 4x4 patches
    parts = taught(student, teacher, s_id=[0, 5, -1], t_id=["s1", "s3", "s4"])  # 16, 4 and 2 a side
    assert parts["loss"].isfinite() and parts["patch"] > 0
    parts = taught(micro(), teacher)  # maps of 8, 4, 2 and 1 a side; the default layers
    assert parts["loss"].isfinite() and parts["patch"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s_id": [0], "t_id": [24]}, "teacher .VisionTransformer. has no layer 24: its blocks ar"),
        ({"s_id": [6], "t_id": [0]}, "student .VisionTransformer. has no layer 6: its blocks are"),
        ({"s_id": [0], "t_id": ["stage"]}, "teacher .VisionTransformer. has no layer 'stage'"),
        ({"s_id": [0, 1], "t_id": [0]}, "2 layers of the student .s_id. cannot be paired with 1"),
        ({"s_id": [0]}, "s_id and t_id are layers in pairs: give both or none"),
        ({"num_samples": 0}, "the rand term needs at least one row, not 0"),
        ({"s_id": [0.5], "t_id": [0]}, "a layer is a number or a name, not 0.5"),
        ({"alpha": 1.5}, "alpha must lie between 0 and 1 and tau be above 0, not 1.5 and 1.0"),
        ({"tau": 0.0}, "alpha must lie between 0 and 1 and tau be above 0, not 1.0 and 0.0"),
        ({"beta": -1.0}, "beta must be 0 or more, not -1.0"),
        ({"kind": "softer"}, "distillation is soft or hard, not 'softer'"),
    ],
)
def test_wrong_pairs_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        taught(micro(), micro(), **options)


def test_a_teacher_without_blocks_or_for_other_classes_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(ValueError, match="no layer 0: no blocks were found in it"):
        find_layers(flat, [0], "teacher")
    with pytest.raises(ValueError, match="a network without blocks has no layers to pair"):
        taught(micro(), flat)
    with pytest.raises(ValueError, match="the teacher answers for 7 classes, the model for 10"):
        taught(micro(), micro(num_classes=7))


def test_recipe_says_how_to_distil_unless_the_objective_does():
    student = micro()

    def settled(objective, **recipe):
        objective._check_input = lambda context: None
        objective.setup(context_of(student, **recipe))
        return objective._kind, objective._alpha, objective._tau

    assert settled(ManifoldDistillation(micro())) == ("soft", 1.0, 1.0)
    hard = {"distillation": "hard", "distillation_alpha": 0.5, "distillation_tau": 3.0}
    assert settled(ManifoldDistillation(micro()), **hard) == ("hard", 0.5, 3.0)
    assert settled(ManifoldDistillation(micro(), kind="soft", tau=2), **hard) == ("soft", 0.5, 2)
    recipe = read_recipe("imagenet", harness.get_variant("manifold_deit_tiny"))
    assert (recipe.distillation, recipe.distillation_alpha, recipe.drop_path) == ("soft", 1, 0)
    assert (recipe.batch_size, recipe.repeats, recipe.epochs) == (512, 3, 300)


def test_variants_bring_their_objective():
    hook = harness.get_variant("manifold_deit_tiny").hook("objective")
    assert hook is imagenet_objective and hook().teacher == "cait_s24_224"
    assert hook("regnety_160", weights="x.pth").weights == "x.pth"
    assert harness.get_variant("manifold_distillation_micro").hook("objective") is micro_objective
    one, two = (ManifoldDistillation("a", terms=Weights(w)).identity() for w in (1, 2))
    assert one != two, "runs with other weights are other runs"


@pytest.mark.parametrize("heads", [0, 5])
def test_the_micro_teacher_needs_heads_that_divide(heads):
    with pytest.raises(ValueError, match=f"64 does not divide into {heads} heads"):
        harness.build("manifold_distillation_teacher_micro", num_heads=heads)


def test_training_with_the_objective_runs_and_repeats(tmp_path):
    teacher = harness.build("manifold_distillation_teacher_micro")
    nn.init.normal_(teacher.head.weight)  # it starts at zero, and would answer nothing
    runs = [
        train(
            "manifold_distillation_micro", "fashion_mini", {"batch_size": 32}, epochs=1,
            objective=ManifoldDistillation(teacher), hold_out=9900, device="cpu", quiet=True,
            evaluate=False, out=tmp_path / str(number),
        )
        for number in range(2)
    ]  # fmt: skip
    row = runs[0].history[0]
    assert row["base"] == 0 and min(row[one] for one in ("teacher", "patch", "rand")) > 0
    states = [one.model.state_dict() for one in runs]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not any(module._forward_hooks for module in runs[0].model.modules())


def test_default_teacher_must_be_there(monkeypatch):
    monkeypatch.setattr(
        "reproductions.manifold_distillation.method.MICRO_TEACHER", "manifold_deit_small"
    )
    with pytest.raises(ReplivitError, match="manifold_deit_small ships no weights"):
        train("manifold_distillation_micro", "fashion_mini", epochs=1, device="cpu", quiet=True)
