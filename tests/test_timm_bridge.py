"""Variants as timm models."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch

import harness
import reproductions  # noqa: F401  (offers the variants to timm)
from harness.errors import ReplivitError
from harness.timm_bridge import PREFIX, register_all


def test_every_variant_is_listed_once():
    names = [PREFIX + variant.name for variant in harness.variants()]
    assert sorted(timm.list_models(f"{PREFIX}*")) == sorted(names)
    assert all(timm.is_model(name) for name in names)


def test_names_of_timm_are_not_taken():
    ours = type(timm.create_model("replivit_vit_micro"))
    assert timm.list_models("resnet50") == ["resnet50"]
    assert ours is type(timm.create_model("vit_tiny_patch16_224", depth=1))


def test_options_reach_the_builder():
    model = timm.create_model(
        "replivit_vit_micro", num_classes=4, img_size=(16, 24), depth=2, drop_path_rate=0.1
    ).eval()
    assert model(torch.randn(2, 3, 16, 24)).shape == (2, 4)
    assert len(model.blocks) == 2
    assert model.pretrained_cfg["input_size"] == (3, 16, 24)
    assert model.pretrained_cfg["num_classes"] == 4


def test_dropout_reaches_a_builder_that_knows_it():
    model = timm.create_model("replivit_vit_micro", drop_rate=0.25)
    assert model.head_drop.p == 0.25


def test_unknown_option_is_one_sentence():
    with pytest.raises(
        ReplivitError, match="vit_micro takes no option 'keep_ratio'; it takes: patch"
    ):
        timm.create_model("replivit_vit_micro", keep_ratio=0.7)


def test_weights_that_are_not_shipped_are_one_sentence():
    with pytest.raises(ReplivitError, match="deit_ti ships no weights for imagenet"):
        timm.create_model("replivit_deit_ti", pretrained=True)


def test_entry_points_have_docstrings():
    assert timm.model_entrypoint("replivit_deit_ti").__doc__.startswith("DeiT-Ti")


def test_registering_again_changes_nothing():
    before = timm.list_models(f"{PREFIX}*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # timm says that it overwrites
        register_all()
    assert timm.list_models(f"{PREFIX}*") == before
