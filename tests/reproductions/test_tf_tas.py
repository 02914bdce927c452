"""TF-TAS's networks: the found subnets and the PiT space, against the authors' outputs."""

import random

import pytest
import torch
from golden_tools import assert_matches, filled_state_dict, golden_cases, golden_input, load_golden

import harness
from harness.errors import ReplivitError
from harness.measurement.macs_fvcore import count_macs_fvcore
from harness.meta import on_meta
from reproductions.autoformer.space import get_space
from reproductions.autoformer.supernet import Supernet
from reproductions.tf_tas.conventions import count_flops
from reproductions.tf_tas.model import FOUND, MICRO_WINDOW, tf_tas
from reproductions.tf_tas.pit import (
    PIT_FOUND,
    PIT_SPACES,
    PitConfig,
    PoolingTransformer,
    as_config,
    tf_tas_pit,
)

SPACE_T = load_golden("tf_tas/autoformer_space_t")
#: Parameters and the repository's count_flops.
COUNTS = {
    "tf_tas_t": (6_200_776, 1_378_687_912),
    "tf_tas_s": (23_935_336, 5_012_782_320),
    "tf_tas_b": (56_470_792, 11_630_347_960),
    "tf_tas_pit_t": (4_732_120, None),
    "tf_tas_pit_xs": (10_643_464, None),
    "tf_tas_pit_s": (24_966_496, None),
}


def params_of(model: torch.nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


# ---- subnets of AutoFormer's space ---------------------------------------------------------------


@torch.no_grad()
def test_logits_and_counts_of_the_found_subnet():
    case = SPACE_T["cases"][0]
    assert case["kind"] == "logits"
    model = harness.load_official("tf_tas_t", filled_state_dict(SPACE_T["state_dict"]))
    assert_matches(model(golden_input(case["input_shape"])), case)
    assert model.config.num_heads == tuple(case["extra"]["config"]["num_heads"])
    assert model.config.mlp_ratios == tuple(case["extra"]["config"]["mlp_ratio"])
    assert params_of(model) == case["params"]
    assert count_flops(model, 224) == case["tf_tas_count_flops"]


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    with on_meta():
        model = harness.build(name)
    params, flops = COUNTS[name]
    assert params_of(model) == params
    if flops is not None:
        assert count_flops(model, 224) == flops


def test_the_formula_counts_the_patches_of_any_image():
    with on_meta():
        small, large = (tf_tas(1000, side) for side in (112, 224))
    assert count_flops(small, 112) < count_flops(large, 224) / 4  # a quarter of the patches


def test_found_subnets_fit_and_the_micro_one_lies_in_its_window():
    for name, config in FOUND.items():
        get_space(name).check_fits(config)
    with on_meta():
        micro = Supernet(get_space("micro"), 10, 32)
    low, high = MICRO_WINDOW
    assert get_space("micro").contains(FOUND["micro"])
    assert low <= micro.params_of(FOUND["micro"]) / 1e6 <= high


def test_another_configuration_can_be_built():
    config = {"depth": 2, "embed_dim": 192, "num_heads": [3, 4], "mlp_ratios": 3.5}
    model = harness.build("tf_tas_t", config=config)
    assert len(model.blocks) == 2 and model.blocks[1].attn.num_heads == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "huge"}, "no subnet for space 'huge'; it has t, s, b, micro"),
        ({"config": {"depth": 15, "embed_dim": 192, "num_heads": 3, "mlp_ratios": 4}}, "1 to 14"),
        ({"config": {"depth": 12, "embed_dim": 192, "num_heads": 9, "mlp_ratios": 4}}, "1 to 4"),
        ({"image_size": 100}, "multiple of 16"),
    ],
)
def test_what_cannot_be_built_is_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        tf_tas(**{"num_classes": 10, "image_size": 224, **options})


def test_a_checkpoint_of_another_supernet_is_named():
    with on_meta():
        other = Supernet(get_space("s"), 1000, 224).state_dict()
    with pytest.raises(ReplivitError, match=r"dimension 448 .* supernet of AutoFormer-T has 256"):
        harness.load_official("tf_tas_t", other)


# ---- the PiT space -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden_cases("tf_tas/pit_t"))
def test_pit_against_the_authors(case):
    golden = load_golden("tf_tas/pit_t")
    config = case["extra"]["config"]
    size = case["extra"].get("image_size", 224)
    assert PIT_FOUND["t"] == PitConfig(
        config["depth"], config["num_heads"], config["base_dim"][0], config["mlp_ratio"]
    )
    model = harness.build("tf_tas_pit_t", image_size=size).eval()
    assert list(model.state_dict()) == [name for name, _, _ in golden["state_dict"]]
    entries = [[name, list(one.shape), "float32"] for name, one in model.state_dict().items()]
    model.load_state_dict(filled_state_dict(entries))
    with torch.no_grad():
        assert_matches(model(golden_input(case["input_shape"])), case["expect"])
    assert params_of(model) == case["expect"]["params"]
    wanted = case["expect"]["macs_fvcore"]["by_op"]
    counted = count_macs_fvcore(model, size).by_operator
    for operator in ("conv", "linear"):
        assert counted[operator] == wanted[operator]


def test_pit_takes_rectangles_and_refuses_other_sizes():
    model = tf_tas_pit(5, (64, 96)).eval()
    assert model.pos_embed.shape[2:] == (7, 11)
    assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 5)
    with pytest.raises(ValueError, match="built for 64x96 pixels, not 64x64"):
        model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="at least the patch's 16 pixels"):
        tf_tas_pit(5, 8)


def test_pit_initialisation_is_the_released_one():
    torch.manual_seed(0)
    model = tf_tas_pit(10, 224)
    assert 0.95 < model.patch_embed.conv.weight.std() < 1.05  # N(0, 1), unlike torch's own
    assert 0.015 < model.pos_embed.std() < 0.025
    assert model.head.bias.eq(0).all()


def test_pit_drop_path_grows_over_all_stages():
    model = tf_tas_pit(10, 224, drop_path_rate=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for stage in model.transformers
             for block in stage.blocks]  # fmt: skip
    assert rates == pytest.approx([0.2 * index / 10 for index in range(10)])


@pytest.mark.parametrize("name", PIT_SPACES)
def test_pit_spaces_hold_what_was_found_and_what_they_sample(name):
    space, rng = PIT_SPACES[name], random.Random(0)
    space.check(PIT_FOUND[name])
    drawn = {space.sample(rng) for _ in range(50)}
    assert len(drawn) > 40
    sizes = [space.params_of(space.check(one)) for one in drawn]
    low, high = space.params_of(space.smallest()), space.params_of(space.largest())
    assert low <= min(sizes) and max(sizes) <= high
    for config in (space.smallest(), PIT_FOUND[name]):
        with on_meta():
            built = PoolingTransformer(config, 10, 192)
        assert space.params_of(config, 10, 192) == params_of(built)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_dim": 41}, "base_dim 41 is not in the space PiT-T; it is one of 16, 24, 32, 40"),
        ({"mlp_ratio": 3}, "mlp_ratio 3 is not .* one of 2, 4, 6, 8"),
        ({"depth": (2, 5, 4)}, "depth of stage 2 5 is not .* one of 4, 6, 8"),
        ({"num_heads": (2, 4, 12)}, "num_heads of stage 3 12 is not .* one of 2, 4, 8"),
    ],
)
def test_outside_the_pit_space(change, message):
    config = as_config({**vars(PIT_FOUND["t"]), **change})
    with pytest.raises(ValueError, match=message):
        PIT_SPACES["t"].check(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depth": (1, 4, 2)}, "a PiT configuration is a mapping with depth, num_heads"),
        (dict(depth=(1, 4), num_heads=(2, 4, 8), base_dim=16, mlp_ratio=2), "depth must be 3"),
        (dict(depth=(1, 4, 2), num_heads=(4, 2, 8), base_dim=16, mlp_ratio=2), "2 after 4"),
        (dict(depth=(1, 4, 2), num_heads=(2, 4, 8), base_dim=0, mlp_ratio=2), "must be positive"),
    ],
)
def test_pit_configurations_that_cannot_be_built(given, message):
    with pytest.raises(ValueError, match=message):
        as_config(given)


def test_unknown_pit_size():
    with pytest.raises(ValueError, match="no PiT space 'xl'; there are t, xs, s"):
        tf_tas_pit(10, 224, size="xl")


def test_pit_learns_through_every_stage():
    model = PoolingTransformer(PitConfig((1, 1, 1), (1, 2, 4), 8, 2), 3, 64)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in model.parameters())
