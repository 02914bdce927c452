"""Mergers inside timm's vision transformers: where they stand, what they see, what is refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import harness
from harness.measurement.macs import count_macs
from harness.meta import on_meta
from harness.training.recipe import read_recipe
from reproductions.patchmerger.convert import from_token_reduction, from_vit_pytorch
from reproductions.patchmerger.insertion import (
    assignments,
    insert_merger,
    mergers,
    over_patches,
)


def build_on_meta(name: str, **options) -> nn.Module:
    with on_meta():
        return harness.build(name, **options).eval()


def small_vit(**options) -> timm.models.VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
    return timm.models.VisionTransformer(num_classes=5, **(sizes | options)).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 3},
        {"global_pool": "map"},
        {"init_values": 0.1, "pre_norm": True, "qk_norm": True},
    ],
    ids=["class token", "pooled", "registers", "map", "scales"],
)
@torch.no_grad()
def test_any_timm_vit_takes_mergers(options):
    model = small_vit(**options)
    images = torch.randn(2, 3, 32, 32)
    insert_merger(model, [1, 3], [6, 2])
    model.eval()
    assert model.forward_features(images).shape == (2, model.num_prefix_tokens + 2, 24)
    assert model(images).shape == (2, 5)
    assert {layer: one.num_outputs for layer, one in mergers(model).items()} == {1: 6, 3: 2}


@torch.no_grad()
def test_distilled_models_keep_both_tokens():
    torch.manual_seed(0)
    model = insert_merger(timm.create_model("deit_tiny_distilled_patch16_224"), 6, 4).eval()
    assert model.forward_features(torch.randn(1, 3, 224, 224)).shape == (1, 2 + 4, 192)


@torch.no_grad()
def test_tokens_before_the_merger_are_those_of_the_parent():
    dense = small_vit()
    model = insert_merger(copy.deepcopy(dense), 2, 3)
    images = torch.randn(2, 3, 32, 32)
    seen = []
    mergers(model)[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    expected = dense.forward_intermediates(
        images, indices=[1], output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )[0]
    torch.testing.assert_close(seen[0][:, 1:], expected[0])
    torch.testing.assert_close(seen[0][:, :1], expected[1])


def test_a_second_merger_can_follow_and_names_stay():
    model = insert_merger(insert_merger(small_vit(), 3), 1, 5, scale=True)
    names = ["0", "merger1", "1", "2", "merger3", "3"]
    assert [name for name, _ in model.blocks.named_children()] == names
    assert list(mergers(model)) == [1, 3]
    assert list(mergers(insert_merger(insert_merger(small_vit(), 0), 2))) == [0, 2]
    assert set(small_vit().state_dict()) < set(model.state_dict())


def test_mergers_take_the_precision_and_mode_of_the_model():
    model = insert_merger(small_vit().double().train(), 0)
    merger = mergers(insert_merger(model, 2))[2]
    assert merger.queries.dtype is torch.float64 and merger.training


def test_dense_checkpoint_is_a_start():
    model = harness.build("patchmerger_micro")
    found = harness.load_weights(model, harness.build("vit_micro").state_dict(), strict=False)
    assert not found.unexpected and not found.mismatched
    assert found.missing == tuple(f"blocks.merger3.{one}" for one in (
        "queries", "norm.weight", "norm.bias"
    ))  # fmt: skip
    with pytest.raises(harness.ReplivitError, match=r"merger6\.queries"):
        harness.load_official("patchmerger_deit_ti", build_dense_ti())


def build_dense_ti() -> dict[str, torch.Tensor]:
    return {
        key: torch.zeros(one.shape) for key, one in build_on_meta("deit_ti").state_dict().items()
    }


def test_foreign_checkpoints_are_refused_by_name():
    with pytest.raises(harness.ReplivitError, match="which has no 'cls_token'"):
        harness.load_official("patchmerger_vit_ti", build_dense_ti())
    with pytest.raises(harness.ReplivitError, match=r"no 'transformer\.layers\.0\.7\.weight'"):
        from_vit_pytorch({"transformer.layers.0.7.weight": torch.zeros(1)})


def test_recipe_of_inserted_mergers_is_that_of_its_source():
    recipe = read_recipe("inserted", harness.get_variant("patchmerger_deit_s_k07"))
    assert (recipe.epochs, recipe.warmup_epochs, recipe.lr_updates) == (30, 20, "step")
    assert recipe.peak_lr == 1e-3 * 512 / 1024 and recipe.batch_size // recipe.accumulation == 256
    assert (recipe.mixup, recipe.cutmix, recipe.drop_path, recipe.repeats) == (0.8, 1.0, 0.1, 3)


def test_places_of_mergers_are_told_by_their_number():
    state = {f"blocks.{one}.attn.proj.bias": torch.zeros(1) for one in range(12)}
    state |= {f"cluster_layers.{one}.queries": torch.zeros(1) for one in range(3)}
    assert set(from_token_reduction(state)) - set(state) == {
        f"blocks.merger{one}.queries" for one in (3, 6, 9)
    }


@torch.no_grad()
def test_maps_over_patches_are_products():
    model = insert_merger(small_vit(), [1, 2], [6, 2])
    images = torch.randn(3, 3, 32, 32)
    maps = assignments(model, images)
    assert {layer: tuple(one.shape) for layer, one in maps.items()} == {1: (3, 6, 16), 2: (3, 2, 6)}
    whole = over_patches(maps)
    torch.testing.assert_close(whole[1], maps[1])
    torch.testing.assert_close(whole[2], maps[2] @ maps[1])
    torch.testing.assert_close(whole[2].sum(-1), torch.ones(3, 2))
    assert all(not one._forward_pre_hooks for one in model.modules()), "hooks are removed"


@torch.no_grad()
def test_other_image_sizes_use_the_same_queries():
    small = harness.build("patchmerger_micro", image_size=32)
    large = harness.build("patchmerger_micro", image_size=(48, 64))
    assert mergers(small)[3].queries.shape == mergers(large)[3].queries.shape == (8, 64)
    assert large.eval()(torch.randn(1, 3, 48, 64)).shape == (1, 10)


# bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_outputs": 0}, "at least 1, not 0"),
        ({"num_outputs": -3}, "at least 1, not -3"),
        ({"num_outputs": 8.0}, "whole number of tokens, at least 1, not 8.0"),
        ({"num_outputs": True}, "whole number of tokens, at least 1, not True"),
        ({"init_std": -1.0}, "init_std must not be negative, not -1.0"),
        ({"keep_ratio": "0.5"}, r"must lie in \(0, 1\], not '0.5'"),
        ({"layers": 6}, "no block 6 .* layers are 0 to 5"),
        ({"layers": -1}, "no block -1 .* layers are 0 to 5"),
        ({"layers": (2, 2)}, "a merger before block 2 already"),
        ({"layers": (1, 2), "num_outputs": (8,)}, "2 layers need 2 num_outputs, not 1"),
        ({"layers": 2.5}, "no block 2.5 "),
        ({"keep_ratio": 0}, r"must lie in \(0, 1\], not 0"),
        ({"keep_ratio": 1.1}, r"must lie in \(0, 1\], not 1.1"),
        ({"keep_ratio": 0.2}, "leaves none of 64 patches after 3 mergers; the least is 0.250"),
        ({"keep_ratio": 0.5, "num_outputs": 8}, "num_outputs or keep_ratio, not both"),
        ({"image_size": 30}, "multiple of 4, not 30"),
        ({"base": "swin_t", "image_size": 224}, "not into a SwinTransformer"),
        ({"base": "resnet50", "keep_ratio": 0.7, "image_size": 224}, "not into a ResNet"),
        ({"base": "vit_mikro"}, "did you mean vit_micro"),
    ],
)
def test_bad_input_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        harness.build("patchmerger_micro", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 225}, "multiple of 16, not 225"),
        ({"image_size": 0}, "whole number of pixels"),
        ({"num_heads": 5}, "192 does not divide into 5 heads"),
        ({"layers": 12}, "layers are 0 to 11"),
    ],
)
def test_bad_input_of_the_pooled_layout(options, message):
    with pytest.raises(ValueError, match=message):
        harness.build("patchmerger_vit_ti", **options)


def test_without_places_there_is_no_merger():
    model = build_on_meta("patchmerger_deit_ti_k07", layers=())
    assert mergers(model) == {} and len(model.blocks) == 12


def test_dense_parent_of_the_pooled_layout():
    dense = build_on_meta("patchmerger_vit_s", layers=())
    assert mergers(dense) == {}
    assert count_macs(dense, 224).total / 1e9 == pytest.approx(4.574, abs=5e-4)
    assert count_macs(build_on_meta("patchmerger_vit_s"), 224).total / 1e9 == pytest.approx(
        2.403, abs=5e-4
    )
