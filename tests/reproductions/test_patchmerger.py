"""PatchMerger: the module, and the two public networks built with it."""

from __future__ import annotations

import pytest
import torch
from golden_tools import (
    assert_matches,
    fill_value,
    filled_state_dict,
    golden_cases,
    golden_input,
    load_golden,
)
from torch import nn

import harness
from harness.measurement.macs import count_macs
from harness.meta import on_meta
from reproductions.patchmerger.insertion import assignments, mergers
from reproductions.patchmerger.merger import PatchMerger
from reproductions.patchmerger.model import NormedPatchEmbed, kept, spread_layers

#: fixture -> our variant
NETWORKS = {
    "tokenreduction_ti_k07": "patchmerger_deit_ti_k07",
    "lucidrains_ti_m8": "patchmerger_vit_ti",
}
#: function of functions.json -> options of the module
FORMS = {
    "PatchMerger_unscaled": {},
    "PatchMerger_scaled": {"scale": True},
    "PatchMerger_paper_formula": {"norm": False},
}
networks = pytest.mark.parametrize("fixture", NETWORKS)


def filled_merger(num_outputs: int, dim: int, **options) -> PatchMerger:
    """A merger under the fixtures' fill."""
    merger = PatchMerger(dim, num_outputs, **options)
    for key, value in merger.state_dict().items():
        value.copy_(torch.from_numpy(fill_value(key, tuple(value.shape))))
    return merger


def random_merger(num_outputs: int = 5, dim: int = 12, **options) -> PatchMerger:
    torch.manual_seed(0)
    merger = PatchMerger(dim, num_outputs, **options)
    with torch.no_grad():
        for one in merger.norm.parameters():
            one.add_(0.3 * torch.randn_like(one))
    return merger


def build_on_meta(name: str, **options) -> nn.Module:
    with on_meta():
        return harness.build(name, **options).eval()


def count(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


# the module


@pytest.mark.parametrize("case", golden_cases("patchmerger/functions"))
@torch.no_grad()
def test_module_equals_the_fixtures(case):
    arguments, expected = case["args"], case["expected"]
    tokens = golden_input(arguments["shape"], arguments["seed"])
    merger = filled_merger(arguments["M"], tokens.shape[-1], **FORMS[case["function"]])
    assert_matches(merger(tokens), expected["out"])
    if "values" in expected:
        torch.testing.assert_close(
            merger(tokens), torch.tensor(expected["values"]), rtol=1e-5, atol=1e-6
        )
    if "attention" in expected:
        assert_matches(merger.assignment(tokens), expected["attention"])
    if "params" in expected:
        assert count(merger) == expected["params"]
        shapes = [[key, list(one.shape), "float32"] for key, one in merger.state_dict().items()]
        assert shapes == expected["state_dict"]


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@torch.no_grad()
def test_outputs_are_the_assignment_times_the_tokens(options):
    merger = random_merger(num_prefix_tokens=2, **options)
    x = torch.randn(3, 2 + 9, 12)
    weights = merger.assignment(x)
    assert weights.shape == (3, 5, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5))
    out = merger(x)
    assert torch.equal(out[:, :2], x[:, :2])
    torch.testing.assert_close(out[:, 2:], weights @ merger.norm(x[:, 2:]))


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@torch.no_grad()
def test_order_of_the_tokens_does_not_matter(options):
    merger = random_merger(num_prefix_tokens=1, **options)
    x = torch.randn(2, 1 + 9, 12)
    shuffled = torch.cat([x[:, :1], x[:, 1:][:, torch.randperm(9)]], dim=1)
    assert not torch.equal(shuffled, x)
    torch.testing.assert_close(merger(shuffled), merger(x))


@torch.no_grad()
def test_order_of_the_queries_is_the_order_of_the_outputs():
    merger = random_merger()
    x, order = torch.randn(2, 9, 12), torch.tensor([3, 0, 4, 1, 2])
    expected = merger(x)[:, order]
    merger.queries.copy_(merger.queries[order].clone())
    torch.testing.assert_close(merger(x), expected)


@torch.no_grad()
def test_outputs_stay_in_the_convex_hull():
    """In every direction no output goes further than the furthest normalised token."""
    merger = random_merger(init_std=3.0)
    x = torch.randn(4, 9, 12)
    directions = torch.randn(12, 500)
    tokens, out = merger.norm(x) @ directions, merger(x) @ directions
    assert (out.amax(1) <= tokens.amax(1) + 1e-5).all()
    assert (out.amin(1) >= tokens.amin(1) - 1e-5).all()
    assert (out.amax(1) > tokens.mean(1)).any(), "not merely means"


@torch.no_grad()
def test_any_number_of_tokens_goes_in_and_may_be_fewer_than_come_out():
    merger = random_merger(num_outputs=5)
    for count_in in (1, 3, 40):
        assert merger(torch.randn(2, count_in, 12)).shape == (2, 5, 12)
    one = torch.randn(2, 1, 12)
    torch.testing.assert_close(merger(one), merger.norm(one).expand(-1, 5, -1))


def test_queries_start_with_scores_of_one():
    """The default of both forms; standard deviation 1 without a scale gives sqrt(C)."""

    def score_std(**options) -> float:
        torch.manual_seed(0)
        merger = PatchMerger(256, 64, **options)
        tokens = nn.functional.layer_norm(torch.randn(100, 256), (256,))
        return float((merger.queries.detach() @ tokens.T * merger.scale).std())

    assert score_std() == pytest.approx(1, rel=0.05)
    assert score_std(scale=True) == pytest.approx(1, rel=0.05)
    assert score_std(init_std=1.0) == pytest.approx(16, rel=0.05)


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@torch.no_grad()
def test_deployed_module_is_equal_and_has_no_affine_norm(options):
    merger = random_merger(num_prefix_tokens=1, **options).eval()
    x = torch.randn(3, 10, 12)
    deployed = harness.deploy(merger, example_inputs=(x,))
    assert count(deployed) == deployed.queries.numel()
    torch.testing.assert_close(deployed(x), merger(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(deployed.assignment(x), merger.assignment(x))
    deployed.deploy_()  # twice changes nothing
    torch.testing.assert_close(deployed(x), merger(x), rtol=1e-5, atol=1e-6)


# the two public networks


@networks
@torch.no_grad()
def test_network_equals_the_fixture(fixture, tmp_path):
    golden = load_golden(f"patchmerger/{fixture}")
    path = tmp_path / "official.pth"
    torch.save({"model": filled_state_dict(golden["state_dict"], golden["fill"])}, path)
    model = harness.load_official(NETWORKS[fixture], path)
    case = golden["cases"][0]
    images = torch.cat([golden_input([1, 3, 224, 224], seed) for seed in case["input_seeds"]])
    assert_matches(model(images), case)
    stages = assignments(model, images)
    for stage in case.get("stages", ()):
        weights = stages[stage["block"]]
        assert weights.shape[1] == stage["tokens_out"]
        assert_matches(weights, stage["soft_assignment"])
        chosen = weights.argmax(dim=1)[:, :16]  # the output that weighs a token most
        assert chosen.tolist() == stage["hard_assignment_first16"]
    if "features_after_last_block" in case:
        seen = []
        model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model(images)
        assert_matches(seen[0], case["features_after_last_block"])


@networks
def test_counts_equal_the_fixture(fixture):
    golden = load_golden(f"patchmerger/{fixture}")
    model = build_on_meta(NETWORKS[fixture])
    assert count(model) == golden["params"]
    assert sum(map(count, mergers(model).values())) == golden["params_detail"]["merger"]
    counted = count_macs(model, 224)
    assert counted.total == golden["macs_torch_flop_counter"]
    fvcore = golden["macs_fvcore"]["by_operator"]
    assert counted.total == sum(fvcore.values()) - fvcore["layer_norm"]


#: DeiT size, keep ratio (None: one merger of 8 outputs) -> million parameters, G multiply-adds as
#: measured with the public code (matrix products and convolutions only).
MEASURED = {
    ("ti", 0.9): (5.810, 1.092), ("ti", 0.7): (5.776, 0.793), ("ti", 0.5): (5.751, 0.591),
    ("ti", 0.25): (5.731, 0.431), ("s", 0.9): (22.236, 3.979), ("s", 0.7): (22.168, 2.914),
    ("s", 0.5): (22.119, 2.166), ("s", 0.25): (22.078, 1.563), ("b", 0.9): (86.938, 15.134),
    ("b", 0.7): (86.803, 11.136), ("b", 0.5): (86.704, 8.271), ("b", 0.25): (86.621, 5.929),
}  # fmt: skip


@pytest.mark.parametrize(("size", "keep_ratio"), MEASURED)
def test_counts_of_all_keep_ratios(size, keep_ratio):
    params, macs = MEASURED[size, keep_ratio]
    model = build_on_meta(f"patchmerger_deit_{size}_k07", keep_ratio=keep_ratio)
    assert count(model) / 1e6 == pytest.approx(params, abs=6e-4)
    assert count_macs(model, 224).total / 1e9 == pytest.approx(macs, abs=6e-4)


def test_counts_of_a_single_merger():
    """The dossier's DeiT-Ti with 8 tokens: 5.719 M; a merger adds M C + 2 C."""
    model = build_on_meta("patchmerger_deit_ti")
    assert count(model) == count(build_on_meta("deit_ti")) + 8 * 192 + 2 * 192 == 5_719_336
    merger = count_macs(model, 224).modules
    blocks = next(one for one in merger.children if one.name == "blocks")
    own = next(one for one in blocks.children if one.name == "merger6")
    assert own.macs == 2 * 8 * 196 * 192


def test_kept_tokens():
    assert kept(0.9, 196, 3) == [176, 158, 142]
    assert kept(0.7, 196, 3) == [137, 96, 67]
    assert kept(0.5, 196, 3) == [98, 49, 24]
    assert kept(0.25, 196, 3) == [49, 12, 3]
    assert kept(1, 196, 3) == [196] * 3
    assert kept(0.7, 196, 0) == []
    assert spread_layers(12, 1) == [6] and spread_layers(12, 3) == [3, 6, 9]


def test_patches_run_over_rows_then_columns_then_colours():
    embed = NormedPatchEmbed(patch_size=2, in_chans=3, embed_dim=4, img_size=(4, 6))
    seen = []
    embed.norm_pixels.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.arange(72.0).view(1, 3, 4, 6)
    embed(image)
    assert seen[0].shape == (1, 6, 12)
    patch = image[0, :, 2:4, 4:6]  # the last of the second row
    assert torch.equal(seen[0][0, 5], patch.permute(1, 2, 0).flatten())
