"""ATS against the authors' outputs and the second implementation's: kept tokens, logits, counts."""

from functools import partial

import numpy as np
import pytest
import timm
import torch
from golden_tools import assert_matches, filled_state_dict, golden_input, load_golden
from torch import nn
from torch.nn import functional as F

import harness
from harness.checkpoints import load_official
from harness.measurement.macs import count_macs
from harness.meta import on_meta
from reproductions.ats import conventions, released, sampling
from reproductions.ats.convert import from_official
from reproductions.ats.model import insert_ats

#: fixture -> options of the variant
NETWORKS = {
    "deit_ti_keepshape": {"mode": "released_keepshape"},
    "deit_ti_drop": {"mode": "released"},
    "tokenreduction_ti_k07": {"mode": "tokenreduction", "tokens": 0.7, "stages": [3, 6, 9]},
    "tokenreduction_ti_k09": {"mode": "tokenreduction", "tokens": 0.9, "stages": [3, 6, 9]},
}
FUNCTIONS = {
    case["name"]: case
    for name in ("functions", "functions_tokenreduction")
    for case in load_golden(f"ats/{name}")["cases"]
}


def official(name: str, **changes) -> nn.Module:
    """The fixture's model with the authors' filled weights, loaded as a user would."""
    fixture = load_golden(f"ats/{name}")
    state = filled_state_dict(fixture["state_dict"], skip=("*out_zero_mask",))
    for key, shape, _ in fixture["state_dict"]:
        if key.endswith("out_zero_mask"):
            state[key] = torch.zeros(shape)
    return load_official("ats_deit_ti", state, **(NETWORKS[name] | changes))


def images_of(case: dict) -> torch.Tensor:
    return torch.cat([golden_input([1, *case["input_shape"][1:]], s) for s in case["input_seeds"]])


def patches_kept(stages: list[dict]) -> list[list[list[int]]]:
    """The fixture's incoming positions, stage by stage, as patches of the image."""
    found, before = [], None
    for stage in stages:
        key = "ids_in_output_order"
        rows = stage[key if key in stage else "ids_incoming_positions"]
        rows = [row[:count] for row, count in zip(rows, stage["valid_out"], strict=True)]
        if before is not None:
            rows = [[own[place] for place in row] for own, row in zip(before, rows, strict=True)]
        before = rows
        found.append([[place - 1 for place in row[1:]] for row in rows])
    return found


# ---- whole networks ------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_keep_the_same_tokens_and_give_the_same_logits(name):
    model = official(name)
    for case in load_golden(f"ats/{name}")["cases"]:
        logits, kept = model.forward_with_tokens(images_of(case))
        ours = [[row[row >= 0].tolist() for row in stage] for stage in kept]
        assert ours == patches_kept(case["stages"]), case["name"]
        assert_matches(logits, case)


@torch.inference_mode()
def test_second_implementation_in_the_padded_layout():
    model = official("tokenreduction_ti_k07", layout="padded")
    (case,) = load_golden("ats/tokenreduction_ti_k07")["cases"]
    logits, kept = model.forward_with_tokens(images_of(case))
    ours = [[row[row >= 0].tolist() for row in stage] for stage in kept]
    assert ours == patches_kept(case["stages"])
    assert_matches(logits, case)


@torch.inference_mode()
def test_released_result_depends_on_the_batch_as_the_fixture_says():
    model = official("deit_ti_drop")
    case = load_golden("ats/deit_ti_drop")["cases"][-1]
    images = images_of(case)
    together, alone = model(images), model(images[1:2])
    assert (together[1] - alone[0]).abs().max() > 1e-3


# ---- counts --------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("name", ["deit_ti_drop", "deit_ti_keepshape"])
def test_the_paper_rule_gives_fvcores_count(name):
    fixture = load_golden(f"ats/{name}")
    model = official(name)
    _, kept = model.forward_with_tokens(images_of(fixture["cases"][0])[:1])
    counts = conventions.tokens_in_blocks(model, kept)
    if name.endswith("keepshape"):
        counts = np.full_like(counts, counts.max())
    assert conventions.macs_of_counts(model, counts, released=True) == [
        fixture["macs_fvcore"]["total"]
    ]


@torch.inference_mode()
def test_params_are_those_of_the_parent_and_of_the_fixture():
    fixture = load_golden("ats/deit_ti_drop")
    with on_meta():
        model = harness.build("ats_deit_ti")
        parents = {name: harness.build(f"deit_{name}") for name in ("ti", "s", "b")}
        ours = {name: harness.build(f"ats_deit_{name}") for name in ("ti", "s", "b")}
    params = sum(one.numel() for one in model.parameters())
    assert params == fixture["params_detail"]["learned"] == 5_717_416
    for name, parent in parents.items():
        assert {key: value.shape for key, value in parent.state_dict().items()} == {
            key: value.shape for key, value in ours[name].state_dict().items()
        }


@torch.inference_mode()
def test_formula_and_counter_agree_image_by_image():
    torch.manual_seed(0)
    model = harness.build("ats_micro", tokens=0.6).eval()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.1 * torch.randn_like(one))
    images = torch.randn(4, 3, 32, 32)
    _, kept = model.forward_with_tokens(images)
    formula = conventions.macs_of_counts(model, conventions.tokens_in_blocks(model, kept))
    for image, value in zip(images, formula, strict=True):
        assert count_macs(model, inputs=image[None]).total == value
    dense = harness.build("vit_micro").eval()
    assert conventions.dense_macs(model) == count_macs(dense, 32).total


# ---- functions of the released code --------------------------------------------------------------


def drawn(seed: int, shape: list[int]) -> torch.Tensor:
    return golden_input(shape, seed)


def attention_inputs(case: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention, values and tokens of the fixture's function cases."""
    batch, heads, tokens, dim = case["args"]["shape"]
    seed = case["args"]["seed"]
    attention = (drawn(seed, [batch, heads, tokens, tokens]) * case["args"]["scale"]).softmax(-1)
    values = drawn(seed + 1, [batch, heads, tokens, dim])
    for row, dead in enumerate(case["args"].get("zero_values", [])):
        values[row, :, dead] = 0
    return attention, values, drawn(seed + 2, [batch, tokens, heads * dim])


def test_scores_in_ascending_order():
    case = FUNCTIONS["scores"]
    attention, values, _ = attention_inputs(case)
    scores = sampling.significance(attention[:, :, 0], values)[:, 1:]
    ordered, order = (scores / scores.sum(1, keepdim=True)).sort(dim=1)
    torch.testing.assert_close(ordered, torch.tensor(case["expected"]["sorted_scores"]))
    assert order.tolist() == case["expected"]["sorted_indices"]


def test_distinct_indices():
    case = FUNCTIONS["unique"]
    indices, size = torch.tensor(case["args"]["indices"]), case["args"]["max_value"]
    hit = torch.zeros(len(indices), size, dtype=torch.bool).scatter(1, indices, True)
    width = indices.shape[1]
    filled = sampling.first_places(hit, width)
    ours = filled.where(torch.arange(width) < hit.sum(1, keepdim=True), size)
    assert ours.tolist() == case["expected"]["values"]


def test_grid():
    case = FUNCTIONS["grid"]
    cdf = torch.tensor(case["args"]["normalized_cdf"])
    ours = released.sample_grid(cdf, case["args"]["n_tokens"] - 1)
    torch.testing.assert_close(ours, torch.tensor(case["expected"]["values"]))


@pytest.mark.parametrize("name", ["its_small", "its_shrunk_sequence", "its_with_removed_tokens"])
def test_inverse_transform_sampling(name):
    case = FUNCTIONS[name]
    expected = case["expected"]
    attention, values, tokens = attention_inputs(case)
    scores = sampling.significance(attention[:, :, 0], values)[:, 1:]
    order, hit = released.sampled_sorted(scores, case["args"]["n_ref_tokens"] - 1)
    if name != "its_with_removed_tokens":  # the order of equal scores (zeros) has no meaning
        assert order.tolist() == expected["sorted_indices"]
    counts = hit.sum(1) + 1
    size = tokens.shape[1]
    policy = (torch.arange(size) < counts[:, None]).float()
    assert policy.long().tolist() == expected["policy"]
    index = F.pad(order.gather(1, sampling.first_places(hit, size - 1)) + 1, (1, 0))
    chosen = torch.stack([own[rows] for own, rows in zip(tokens, index, strict=True)])
    assert_matches(chosen * policy[..., None], expected["selected_x"])
    rows = torch.stack([own[:, rows] for own, rows in zip(attention, index, strict=True)])
    rows = rows * policy[:, None, :, None]
    assert_matches(rows, expected["selected_attn"])
    torch.testing.assert_close(
        rows[:, 0, :, 0], torch.tensor(expected["attn_rows_first_head_first_column"])
    )


def block_of(case: dict) -> nn.Module:
    """timm's block with the fixture's weights, in evaluation mode."""
    expected, (_, _, dim, heads) = case["expected"], case["args"]["shape"]
    block = timm.models.vision_transformer.Block(
        dim, heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)
    )
    state = filled_state_dict(expected["state_dict"], skip=("*out_zero_mask",))
    if "qkv.weight" in state:  # the sampler alone: attention without norms and MLP
        block.norm1, block.norm2, block.mlp = nn.Identity(), nn.Identity(), Zero()
        state = {f"attn.{key}": value for key, value in state.items()}
    block.load_state_dict(state)
    return block.eval()


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def masked(case: dict, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    policy = torch.ones(x.shape[:2])
    for row, dead in enumerate(case["args"].get("masked", [])):
        policy[row, dead] = 0
    return x * policy[..., None], policy


@torch.inference_mode()
@pytest.mark.parametrize("name", ["sampler_keep_shape", "sampler_drop", "sampler_masked_input"])
def test_sampler(name):
    """The block without norms and MLP gives selected input plus output; the input is known."""
    case = FUNCTIONS[name]
    seed, shape, expected = case["args"]["seed"], case["args"]["shape"][:3], case["expected"]
    x, policy = masked(case, drawn(seed, shape))
    raw, _ = masked(case, drawn(seed + 1, shape))
    block = block_of(case)
    drop, points = case["args"]["drop_tokens"], case["args"]["n_ref_tokens"] - 1
    both, policy, index = released.sampling_block(block, x, policy, points, drop)
    assert policy.long().tolist() == expected["policy"]
    live = policy[..., None]
    chosen = torch.stack([own[rows] for own, rows in zip(x, index, strict=True)]) * live
    assert_matches(both - chosen, expected["out"])
    chosen = torch.stack([own[rows] for own, rows in zip(raw, index, strict=True)]) * live
    assert_matches(chosen, expected["selected_x"])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["ats_block", "ats_block_drop"])
def test_block_that_samples(name):
    case = FUNCTIONS[name]
    x = drawn(case["args"]["seed"], case["args"]["shape"][:3])
    drop, points = case["args"]["drop_tokens"], case["args"]["n_ref_tokens"] - 1
    out, policy, _ = released.sampling_block(
        block_of(case), x, torch.ones(x.shape[:2]), points, drop
    )
    assert policy.long().tolist() == case["expected"]["policy"]
    assert_matches(out, case["expected"])


@torch.inference_mode()
def test_plain_block_with_removed_tokens():
    case = FUNCTIONS["plain_block_with_mask"]
    x, policy = masked(case, drawn(case["args"]["seed"], case["args"]["shape"][:3]))
    assert_matches(released.plain_block(block_of(case), x, policy), case["expected"])


@pytest.mark.parametrize("name", ["k_138_of_197", "k_ratio_0.7"])
def test_the_released_code_fails_below_all_tokens(name):
    """Theirs raises a RuntimeError about shapes; ours says what the limit is."""
    case = FUNCTIONS[name]
    assert case["expected"]["raises"] == "RuntimeError"
    limit = case["args"]["NUM_TOKENS"][3]
    with on_meta(), pytest.raises(ValueError, match="limit at all 196 patches"):
        harness.build("ats_deit_ti", mode="released", tokens=limit)


# ---- functions of the second implementation ------------------------------------------------------


@pytest.mark.parametrize("name", ["tr_sampling", "tr_sampling_masked"])
def test_second_implementation_samples(name):
    case = FUNCTIONS[name]
    expected, limit = case["expected"], case["args"]["K"]
    attention, values, _ = attention_inputs(case)
    for row, dead in enumerate(case["args"].get("masked", [])):
        attention[row, :, :, dead] = 0
    scores = sampling.significance_by_head(attention[:, :, 0], values)[:, 1:]
    normal = scores / (scores.sum(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(
        normal[:, :8], torch.tensor(expected["scores"])[:, :8], rtol=1e-5, atol=1e-6
    )
    hit = sampling.sampled_by_tokenreduction(scores, limit)
    ours = [[0, *(row.nonzero()[:, 0] + 1).tolist()] for row in hit]
    theirs = [
        [place for place, live in zip(ids, mask, strict=True) if live]
        for ids, mask in zip(expected["ids"], expected["new_mask"], strict=True)
    ]
    assert ours == theirs


# ---- checkpoints ---------------------------------------------------------------------------------


def test_zero_masks_are_left_out_and_must_be_zero():
    state = {
        "cls_token": torch.zeros(1, 1, 4),
        "patch_embed.proj.weight": torch.zeros(4, 3, 2, 2),
        "blocks.3.attn.out_zero_mask": torch.zeros(1, 4),
    }
    assert list(from_official(state)) == ["cls_token", "patch_embed.proj.weight"]
    state["blocks.3.attn.out_zero_mask"][0, 1] = 1
    with pytest.raises(harness.ReplivitError, match=r"blocks.3.attn.out_zero_mask is not zero"):
        from_official(state)
    with pytest.raises(harness.ReplivitError, match="no vision transformer with a class token"):
        from_official({"stem.weight": torch.zeros(1)})
    with pytest.raises(harness.ReplivitError, match="lacks 'cls_token' and starts with 'patch_"):
        from_official({"patch_embed.proj.weight": torch.zeros(1)})


@torch.inference_mode()
def test_weights_of_the_dense_parent_fit_as_they_are():
    torch.manual_seed(0)
    parent = timm.create_model("deit_tiny_patch16_224", num_classes=7, img_size=64).eval()
    ours = load_official("ats_deit_ti", parent.state_dict(), image_size=64)
    same = insert_ats(timm.create_model("deit_tiny_patch16_224", num_classes=7, img_size=64))
    same.load_state_dict(parent.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert ours.num_classes == 7
    torch.testing.assert_close(ours(images), same.eval()(images))
