"""Recipes: found by name, checked, varied; the protocols of the tracks."""

from __future__ import annotations

import pytest

from harness.data import TRACKS, get_track
from harness.errors import ReplivitError
from harness.registry import get_variant
from harness.training.recipe import Recipe, default_recipe, read_recipe, resolve_recipe


def test_small_tracks_have_one_protocol():
    fashion = default_recipe(None, get_track("fashion_mini").protocol)
    assert (fashion.epochs, fashion.batch_size, fashion.lr) == (12, 128, 1e-3)
    assert (fashion.optimizer, fashion.weight_decay, fashion.scheduler) == ("adamw", 0.05, "cosine")
    assert (fashion.warmup_epochs, fashion.label_smoothing) == (1, 0.1)
    assert fashion.augment == "crop_flip" and not fashion.mixes
    cifar = default_recipe(None, get_track("cifar10").protocol)
    assert cifar.epochs == 30 and cifar.changed(epochs=12) == fashion


@pytest.mark.parametrize("track", TRACKS)
def test_every_protocol_is_a_recipe(track):
    assert default_recipe(None, get_track(track).protocol).epochs > 0


def test_imagenet_is_trained_as_deit_was():
    recipe = default_recipe(None, get_track("imagenet").protocol)
    assert recipe.name == "deit_imagenet"
    assert recipe.peak_lr == pytest.approx(1e-3)  # 5e-4 * 1024 / 512
    assert (recipe.epochs, recipe.mixup, recipe.cutmix, recipe.repeats) == (300, 0.8, 1.0, 3)
    assert recipe.augment == "rand-m9-mstd0.5-inc1" and recipe.drop_path == 0.1


def test_batch_scales_the_rate_only_where_the_recipe_says_so():
    assert Recipe(lr=1e-3, batch_size=256).peak_lr == 1e-3
    assert Recipe(lr=1e-3, batch_size=256, lr_reference_batch=512).peak_lr == 5e-4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs: 3\nepoch: 4\n", ["line 2", "epoch", "unknown key"]),
        ("lr: -1\n", ["line 1", "lr", "greater than 0"]),
        ("epochs: 2\nclip: hard\n", ["line 2", "clip", "'norm', 'value' or 'agc'"]),
        ("ema_final: true\n", ["ema_final needs ema_decay"]),
        ("batch_size: 10\naccumulation: 3\n", ["10", "3 passes"]),
        ("extends: nothing\n", ["no recipe 'nothing'", "small_track"]),
        ("extends: mistake\n", ["cannot extend itself"]),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, text, words):
    path = tmp_path / "mistake.yaml"
    path.write_text(text)
    with pytest.raises(ReplivitError) as caught:
        read_recipe(path)
    for word in words:
        assert word in str(caught.value)


def test_files_that_extend_each_other_are_one_sentence(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"extends: {two}\n")
    two.write_text(f"extends: {one}\n")
    with pytest.raises(ReplivitError, match=r"one\.yaml: a recipe cannot extend itself"):
        read_recipe(one)


def test_unknown_recipe_lists_the_known():
    with pytest.raises(ReplivitError, match="deit_imagenet, small_track"):
        read_recipe("deit")


def test_a_file_extends_another(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: small_track\nlr: 3.0e-4\nema_final: true\nema_decay: 0.99\n")
    mine, base = read_recipe(path), read_recipe("small_track")
    assert mine == base.changed(name="mine", lr=3e-4, ema_final=True, ema_decay=0.99)


def test_changed_is_checked():
    recipe = Recipe()
    assert recipe.changed(lr=2e-3).lr == 2e-3 and recipe.lr == 1e-3
    with pytest.raises(ReplivitError, match=r"no such key; known: .*lr"):
        recipe.changed(learning_rate=1)
    with pytest.raises(ReplivitError, match="epochs"):
        recipe.changed(epochs=0)


def test_which_recipe_holds(toy_paper):
    plain, own = get_variant("toy_net"), get_variant("toy_recipe")
    protocol = get_track("fashion_mini").protocol
    assert resolve_recipe(None, plain, "fashion_mini", protocol).epochs == 12
    # the paper's own recipe holds on the variant's own track only
    of_paper = resolve_recipe(None, own, "fashion_mini", protocol)
    assert (of_paper.name, of_paper.lr, of_paper.epochs) == ("own", 7e-3, 300)
    elsewhere = resolve_recipe(None, own, "cifar10", get_track("cifar10").protocol)
    assert elsewhere.epochs == 30
    changed = resolve_recipe({"lr": 1e-2}, own, "fashion_mini", protocol)
    assert (changed.lr, changed.epochs) == (1e-2, 300)
    other = resolve_recipe({"extends": "small_track", "lr": 1e-2}, own, "fashion_mini", protocol)
    assert (other.lr, other.epochs) == (1e-2, 12)
    with pytest.raises(ReplivitError, match="own"):  # another paper's recipes stay its own
        read_recipe("own")
