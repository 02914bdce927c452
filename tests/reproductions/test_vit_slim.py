"""ViT-Slim against the authors' code: soft, masked and slimmed outputs, kept sets, counters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_tools import assert_matches, golden_input, load_golden
from vit_slim_tools import filled, filled_state, micro, network_of

import harness
from harness.data import TRACKS
from harness.measurement.macs import count_macs
from harness.meta import on_meta
from harness.training import read_recipe
from harness.training.optim import create_optimizer, weight_decay_groups
from reproductions.vit_slim import conventions
from reproductions.vit_slim.masks import compress, decompress, penalties
from reproductions.vit_slim.method import RELEASED_PROCESSES, SparsitySearch, released_search
from reproductions.vit_slim.selection import constant_scores, random_scores
from reproductions.vit_slim.slimming import slim

FIXTURES = ("deit_micro", "deit_tiny", "deit_small")


def cases(*fields: str, without: str = "steps") -> list:
    """Cases of all fixtures that have these fields, as pytest parameters."""
    return [
        pytest.param(name, case, id=f"{name}-{case['name']}")
        for name in FIXTURES
        for case in load_golden(f"vit_slim/{name}")["cases"]
        if all(field in case for field in fields) and without not in case
    ]


def budgets(case: dict) -> dict[str, float]:
    extra = case["extra"]
    return {
        "attention": extra["budget_attn"],
        "mlp": extra["budget_mlp"],
        "tokens": extra["budget_patch"],
    }


def packed(masks) -> list[str]:
    return [np.packbits(one).tobytes().hex() for one in masks]


@pytest.mark.parametrize("name", FIXTURES)
def test_names_shapes_and_parameters(name):
    golden = load_golden(f"vit_slim/{name}")
    model = filled(name)
    assert [[key, list(one.shape)] for key, one in model.state_dict().items()] == [
        [key, shape] for key, shape, _ in golden["state_dict"]
    ]
    assert sum(one.numel() for one in model.parameters()) == golden["params"]
    assert conventions.params(model) == golden["params_detail"]["weights_only"]
    assert conventions.macs(model, golden["img_size"]) == golden["macs_official"]["total"]


@pytest.mark.parametrize(("name", "case"), cases("sparsity"))
@torch.no_grad()
def test_soft_masks(name, case):
    model = network_of(name, case)
    assert_matches(model(golden_input(case["input_shape"])), case)
    wanted, sums = case["sparsity"], penalties(model)
    expected = (wanted["attn_l1"], wanted["mlp_l1"], wanted["patch_l1_of_tanh"])
    assert [float(one) for one in sums.values()] == pytest.approx(expected, rel=1e-6)
    weighted = wanted.get("weighted_w1_2e-4_w2_5e-5_w3_1e-4")
    if weighted is not None:
        ours = SparsitySearch(2e-4, 5e-5, 1e-4).penalty(model)
        assert float(ours) == pytest.approx(weighted, rel=1e-6)


@torch.no_grad()
def test_masks_that_tie_are_all_kept():
    golden = load_golden("vit_slim/deit_micro")["cases"]
    (tied,) = (one for one in golden if "ties" in one)
    (plain,) = (one for one in golden if one["name"] == "plain_deit")
    model = network_of("deit_micro", plain)
    kept = compress(model, *[tied["ties"]["budget"]] * 3)
    assert list(kept.thresholds.values()) == tied["ties"]["threshold"]
    counts = [kept.head_dims.sum(), kept.hidden.sum(), kept.num_tokens.sum()]
    assert counts == tied["ties"]["kept"]
    assert_matches(model(golden_input(plain["input_shape"])), plain)


@pytest.mark.parametrize(("name", "case"), cases("masks_hex"))
@torch.no_grad()
def test_kept_sets_and_masked_outputs(name, case):
    model = network_of(name, case)
    kept = compress(model, **budgets(case))
    bits, counts = case["masks_hex"], case["kept_per_layer"]
    assert packed(kept.attention) == bits["attn"]
    assert packed(kept.mlp) == bits["mlp"]
    assert packed(kept.tokens) == bits["patch"]
    assert [one.sum() for one in kept.tokens_wanted] == counts["patch_before_union"]
    assert kept.num_tokens.tolist() == counts["patch_after_union"]
    assert kept.hidden.tolist() == counts["mlp"]
    if kept.attention[0].shape == kept.heads:
        assert kept.head_dims.tolist() == counts["attn_per_head"]
    assert [np.float32(one) for one in kept.thresholds.values()] == [
        np.float32(one) for one in case["threshold"].values()
    ]
    assert_matches(model(golden_input(case["input_shape"])), case)
    size = load_golden(f"vit_slim/{name}")["img_size"]
    official = case["official"]
    assert conventions.searched_params(model, kept) == case["dense"]["params"]
    # theirs is accumulated in float32
    flops = conventions.searched_macs(model, kept)
    assert flops == pytest.approx(official["get_flops_searched"], rel=1e-6)
    assert conventions.remaining(model, kept) == pytest.approx(official["get_remaining"], rel=1e-6)
    assert conventions.matmul_macs(model, kept) == case["dense"]["macs_matmul_all_tokens"]
    dropped = conventions.matmul_macs(model, kept, dropped=True)
    assert dropped == case["dense"]["macs_matmul_tokens_dropped"]
    assert size == model.patch_embed.img_size[0]


@pytest.mark.parametrize(("name", "case"), cases("masks_hex"))
@torch.no_grad()
def test_slimmed_outputs_and_counts(name, case):
    """The smaller network is the masked one; dropping without the virtual token differs as far as
    was measured on the authors' code."""
    model = network_of(name, case)
    images = golden_input(case["input_shape"])
    size = load_golden(f"vit_slim/{name}")["img_size"]
    exact = slim(model, **budgets(case))
    assert_matches(exact(images), case)
    assert sum(one.numel() for one in exact.parameters()) == case["dense"]["params"]
    if name != "deit_small":
        assert_matches(slim(model, **budgets(case), mode="masked")(images), case)
    if not exact.kept.all_tokens:
        drop = slim(model, **budgets(case), mode="drop")
        far = (drop(images) - exact(images)).abs().max().item()
        wanted = case["max_abs_diff_vs_masked"]["dense_dims_tokens_gathered_and_dropped"]
        assert far == pytest.approx(wanted, rel=1e-2)
    if case["name"] != "edge_cls_masked_in_deep_layers":  # counted there without the class token
        counted = count_macs(slim(model, **budgets(case), mode="drop"), size).total
        assert counted == case["dense"]["macs_matmul_tokens_dropped"]


@pytest.mark.parametrize("name", ["search_steps", "search_steps_w1_zero"])
def test_search_steps(name):
    """Three updates of weights and masks in float64, by our objective and optimizer."""
    golden = load_golden("vit_slim/deit_micro")
    (case,) = (one for one in golden["cases"] if one["name"] == name)
    model = micro(torch.float64).train()
    state = filled_state(golden["state_dict"])
    model.load_state_dict({key: one.double() for key, one in state.items()})
    objective = SparsitySearch(*case["extra"]["w1,w2,w3"])
    recipe = read_recipe("search", harness.get_variant("vit_slim_deit_s"))
    context = SimpleContext(model, recipe.changed(label_smoothing=0.0))
    objective.setup(context)
    found = sorted(
        (group["weight_decay"], len(list(group["params"])), sum(map(torch.numel, group["params"])))
        for group in weight_decay_groups(model, recipe)
    )
    assert found == [
        (one["weight_decay"], one["n_tensors"], one["n_params"])
        for one in case["extra"]["param_groups"]
    ]
    optimizer = create_optimizer(model, recipe)
    images = golden_input(case["input_shape"]).double()
    labels = torch.tensor(case["extra"]["labels"])
    for step in case["steps"]:
        optimizer.zero_grad()
        parts = objective.loss(model, images, labels, context)
        parts["loss"].backward()
        assert parts["loss"].item() == pytest.approx(step["loss"], rel=1e-6)
        assert parts["base"].item() == pytest.approx(step["ce"], rel=1e-6)
        sums = [one.item() for one in penalties(model).values()]
        assert sums == pytest.approx(step["l1"], rel=1e-6)
        for key, norm in step.get("grad_l2", {}).items():
            assert model.get_parameter(key).grad.norm().item() == pytest.approx(norm, rel=1e-6)
        optimizer.step()
        after = step["after"]
        for key, total in after["zeta_sum"].items():
            assert model.get_parameter(key).sum().item() == pytest.approx(total, rel=1e-6)
        assert model.head.weight.norm().item() == pytest.approx(after["head_weight_l2"], rel=1e-6)
        assert model.pos_embed.norm().item() == pytest.approx(after["pos_embed_l2"], rel=1e-6)


class SimpleContext:
    """What the objective reads of a run."""

    def __init__(self, model, recipe):
        self.model, self.recipe = model, recipe


def test_penalty_is_divided_by_the_number_of_processes():
    model = filled("deit_micro")
    whole = SparsitySearch().penalty(model).item()
    assert released_search().penalty(model).item() == pytest.approx(whole / RELEASED_PROCESSES)
    with pytest.raises(ValueError, match="0 or more"):
        SparsitySearch(attention=-1)


def test_frozen_weights_leave_masks_and_norms():
    model = micro()
    SparsitySearch(tokens=0.0).setup(SimpleContext(model, None))
    assert not model.blocks[0].attn.patch_zeta.requires_grad
    SparsitySearch(tokens=0.0, freeze_weights=True).setup(SimpleContext(model, None))
    learning = {name for name, one in model.named_parameters() if one.requires_grad}
    assert learning == {
        name for name, _ in model.named_parameters() if "zeta" in name or "norm" in name
    }


@torch.no_grad()
def test_decompressed_is_soft_again():
    model = filled("deit_micro")
    images = golden_input([2, 3, 56, 56])
    soft = model(images)
    compress(model, 0.5, 0.5, 0.5)
    assert not torch.allclose(model(images), soft)
    assert not model.blocks[0].mlp.zeta.requires_grad
    decompress(model)
    assert torch.equal(model(images), soft)
    assert all(one.requires_grad for one in model.parameters())


@torch.no_grad()
def test_a_plain_deit_checkpoint_starts_a_search():
    """Only the masks are missing; they keep their constants."""
    golden = load_golden("vit_slim/deit_tiny")
    state = filled_state(golden["state_dict"], masks="initial")
    assert not any(key.endswith("zeta") for key in state)
    model = harness.load_official("vit_slim_deit_ti", {"model": state})
    (case,) = (one for one in golden["cases"] if one["name"] == "soft_initial_masks")
    assert_matches(model(golden_input(case["input_shape"])), case)


def test_both_heads_of_a_distilled_model_count():
    with on_meta():
        plain, distilled = (
            harness.build("vit_slim_deit_ti", 1000, base=f"deit_ti{kind}")
            for kind in ("", "_distilled")
        )
        layout = constant_scores(12, (3, 64), 768, 198)
        small = slim(distilled, scores=random_scores(layout)).eval()
    head = 192 * 1000
    assert conventions.macs(distilled, 224) == conventions.macs(plain, 224) + head
    assert conventions.matmul_macs(small, small.kept) == count_macs(small, 224).total


def test_recipes_say_what_the_authors_did():
    small, base = (harness.get_variant(f"vit_slim_deit_{size}") for size in ("s", "b"))
    search = read_recipe("search", small)
    assert (search.epochs, search.batch_size, search.scheduler) == (50, 1024, "constant")
    assert (search.peak_lr, search.weight_decay, search.warmup_epochs) == (5e-4, 1e-3, 0)
    assert (search.mixup, search.repeats, search.color_jitter) == (0.8, 3, 0.4)
    assert read_recipe(base.spec.recipe, base).batch_size == 512
    retrain = read_recipe("retrain", small)
    assert (retrain.epochs, retrain.peak_lr, retrain.weight_decay) == (300, 1e-3, 0.05)
    assert "imagenet" in TRACKS
