"""The reference rows: counts, checkpoints, image sizes, and the file of facts."""

from __future__ import annotations

import pytest
import timm
import torch
from golden_tools import load_golden
from timm.models.vision_transformer import VisionTransformer

import harness
from harness import registry
from harness.measurement.macs import count_macs
from harness.meta import on_meta

GOLDEN = {row["timm"]: row for row in load_golden("baselines/macs_224")["rows"]}
ROWS = {
    variant.name: variant.spec.args["timm_model"]
    for variant in harness.variants("baselines")
    if "timm_model" in variant.spec.args
}
rows = pytest.mark.parametrize("name", ROWS)


def build_on_meta(name: str, **options):
    with on_meta():
        return harness.build(name, **options).eval()


def test_every_pinned_row_is_here():
    assert sorted(ROWS.values()) == sorted(GOLDEN)
    assert harness.get_paper("baselines").facts.reference


@rows
def test_parameters_equal_the_pinned_ones(name):
    model = build_on_meta(name)
    pinned = GOLDEN[ROWS[name]]
    assert sum(one.numel() for one in model.parameters()) == pinned["params"]
    assert sum(one.numel() for one in model.buffers()) == pinned["buffers"]


@rows
def test_multiply_adds_equal_the_pinned_ones(name):
    pinned = GOLDEN[ROWS[name]]["torch_flop_counter_fused"]["half"]
    assert count_macs(build_on_meta(name), 224).total == pinned


@pytest.mark.parametrize("name", ["deit_ti", "deit_ti_distilled"])
def test_checkpoint_of_deit_loads_as_it_is(name, tmp_path):
    """Names are those of the official repository (wrapper key `model`), which timm kept."""
    torch.manual_seed(1)
    source = timm.create_model(ROWS[name])
    names = set(source.state_dict())
    assert {"cls_token", "pos_embed", "blocks.11.attn.qkv.bias", "head.weight"} <= names
    assert ({"dist_token", "head_dist.bias"} <= names) == (name == "deit_ti_distilled")
    path = tmp_path / "deit.pth"
    torch.save({"model": source.state_dict()}, path)
    loaded = harness.load_official(name, path)
    images = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():  # bit for bit in the precision in which both take the same products
        assert torch.equal(loaded.double()(images), source.eval().double()(images))


def test_checkpoint_of_another_row_names_it(tmp_path):
    path = tmp_path / "deit.pth"
    torch.save(timm.create_model("deit_tiny_distilled_patch16_224").state_dict(), path)
    with pytest.raises(harness.ReplivitError, match="it fits deit_ti_distilled"):
        harness.load_official("deit_ti", path)


def test_distilled_rows_average_their_logits():
    """Evaluation gives the mean of both heads' logits (not of their probabilities)."""
    torch.manual_seed(0)
    model = harness.build("deit_ti_distilled").eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = model.forward_features(images)
        expected = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
        torch.testing.assert_close(model(images), expected)
        model.train().set_distilled_training(True)
        assert len(model(images)) == 2


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("deit_ti", 256),
        ("deit_ti", (224, 320)),
        ("swin_t", 288),
        ("resnet50", 97),
        ("vit_micro", 64),
    ],
)
def test_other_image_sizes(name, size):
    model = build_on_meta(name, image_size=size)
    height, width = (size, size) if isinstance(size, int) else size
    classes = registry.get_variant(name).spec.num_classes
    assert model(torch.empty(2, 3, height, width, device="meta")).shape == (2, classes)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("deit_ti", 225, "multiple of 16, not 225"),
        ("swin_t", 226, "multiple of 4, not 226"),
        ("vit_micro", (32, 30), r"multiple of 4, not \(32, 30\)"),
        ("resnet50", 0, "whole number of pixels"),
        ("vit_micro", -32, "whole number of pixels"),
    ],
)
def test_image_sizes_that_cannot_be_are_one_sentence(name, size, message):
    with pytest.raises(ValueError, match=message):
        harness.build(name, image_size=size)


def test_vit_micro_is_a_plain_vit_of_timm():
    torch.manual_seed(0)
    model = harness.build("vit_micro").eval()
    assert type(model) is VisionTransformer
    assert model.patch_embed.num_patches == 64 and model.num_prefix_tokens == 1
    assert sum(one.numel() for one in model.parameters()) == 258_506
    assert count_macs(model, 32).total == 19_416_448
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = model.forward_intermediates(images, indices=[2, 5], intermediates_only=True)
    assert [one.shape for one in maps] == [(2, 64, 8, 8)] * 2


def test_vit_micro_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="64 does not divide into 5 heads"):
        harness.build("vit_micro", num_heads=5)


def test_stochastic_depth_grows_with_depth():
    for name in ("vit_micro", "deit_ti"):
        rates = [
            getattr(block.drop_path1, "drop_prob", 0.0)
            for block in build_on_meta(name, drop_path_rate=0.1).blocks
        ]
        assert rates[0] == 0 and rates[-1] == pytest.approx(0.1) and rates == sorted(rates)


def test_inputs_are_those_of_the_weights():
    def spec(name):
        config = build_on_meta(name).pretrained_cfg
        return config["mean"][0], config["interpolation"], config["crop_pct"]

    assert spec("deit_ti") == (0.485, "bicubic", 224 / 256)
    assert spec("vit_b16") == (0.5, "bicubic", 0.9)
    assert spec("resnet50") == (0.485, "bilinear", 0.875)
    assert spec("swin_t") == (0.485, "bicubic", 0.9)


def test_published_rows_speak_of_what_is_built():
    """Every number is attached to its model, except the 384-pixel ones, which say why not."""
    published = harness.get_paper("baselines").facts.published
    for row in published:
        if "@384" in row.variant:
            assert row.of is None and "384" in row.reason
        else:
            assert row.of in ROWS
    assert {row.of for row in published} - {None} == set(ROWS)


def test_numbers_of_fvcore_are_compared_with_fvcore():
    facts = harness.get_paper("baselines").facts
    marked = {row.of for row in facts.published if row.against == "macs_fvcore"}
    assert marked == set(ROWS)
    for row in facts.published:
        if row.against == "macs_fvcore":
            unfused = GOLDEN[ROWS[row.of]]["fvcore_unfused"]["macs"] / 1e9
            assert row.value == pytest.approx(unfused, abs=0.005), row
