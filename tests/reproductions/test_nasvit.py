"""NASViT's networks: equal to the authors', as a supernet and as dense networks."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from golden_tools import assert_matches, filled_state_dict, golden_cases, golden_input, load_golden

import harness
from harness.checkpoints import coverage
from harness.errors import ReplivitError
from harness.measurement.macs import count_macs
from harness.meta import on_meta
from reproductions.nasvit.calibration import calibrate
from reproductions.nasvit.convert import resize_table, to_subnet, to_supernet
from reproductions.nasvit.counting import macs_of, params_of, released_params
from reproductions.nasvit.named import named_configs, networks
from reproductions.nasvit.space import MICRO, MICRO_CNN, NASVIT, SPACES, Config
from reproductions.nasvit.subnet import Subnet
from reproductions.nasvit.supernet import SlicedBatchNorm2d, Supernet

FIXTURES = ("min", "subnet_f208", "subnet_f421")
SUBNETS = [
    pytest.param(name, case.values[0], id=f"{name}-{case.id}")
    for name in FIXTURES
    for case in golden_cases(f"nasvit/{name}")
]


@functools.cache
def official() -> dict[str, torch.Tensor]:
    """The authors' supernet with the fixtures' weights."""
    with torch.inference_mode(False):
        return filled_state_dict(load_golden("nasvit/supernet")["state_dict"])


def supernet(post_scale=()) -> Supernet:
    """Ours with these weights; `post_scale` as in a fixture."""
    with torch.inference_mode(False):
        net = harness.load_official("nasvit_supernet", official())
        with torch.no_grad():
            for name, factor in post_scale:
                for key, one in net.named_parameters():
                    if key.endswith(name):
                        one.mul_(factor)
    return net


# ---- against the authors' numbers ----------------------------------------------------------------


def test_supernet_has_the_authors_entries_and_parameters():
    fixture = load_golden("nasvit/supernet")
    net = harness.build("nasvit_supernet")
    found = coverage(net, to_supernet(official()))
    assert found.complete and not found.unexpected
    assert sum(one.numel() for one in net.parameters()) == fixture["params"]
    trained = sum(one.numel() for one in net.parameters() if one.requires_grad)
    assert trained == fixture["params_detail"]["requires_grad"]
    candidates = {key: tuple(map(tuple, fixture["candidates"][key])) for key in NASVIT.candidates}
    assert NASVIT.candidates == candidates
    assert NASVIT.resolutions == tuple(fixture["candidates"]["resolution"])
    blocks = list(NASVIT.blocks(NASVIT.largest()))
    assert [blocks[one[0]].stage for one in fixture["block_groups"]] == list(range(7))
    assert len(blocks) == fixture["block_groups"][-1][-1] + 1


@torch.no_grad()
@pytest.mark.parametrize("case", golden_cases("nasvit/supernet"))
def test_supernet_in_training_mode(case):
    """Batch statistics, every stage, and what became of the running statistics."""
    extra = case["extra"]
    net = supernet(extra["post_scale"]).set_config(extra["config"]).train()
    stages = []
    for number, stage in enumerate(net.stages):
        last = stage[net.config.depth[number] - 1]
        last.register_forward_hook(lambda _, __, output: stages.append(output))
    assert_matches(net(golden_input(case["input_shape"])), case)
    for output, (shape, total, norm) in zip(stages, extra["stage_outputs"], strict=True):
        assert list(output.shape) == shape
        output = output.double()
        assert abs(output.norm().item() - norm) <= 1e-5 * norm
        assert abs(output.sum().item() - total) <= 1e-5 * norm * output.numel() ** 0.5
    for key, wanted in extra["after"].items():
        if "bn_tracking" in key:  # never used, so not kept
            continue
        value = getattr(net.first_conv.bn, key.rpartition(".")[2])
        torch.testing.assert_close(value[:4], torch.tensor(wanted["first4"]), rtol=1e-5, atol=1e-6)
        assert value.sum().item() == pytest.approx(wanted["sum"], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name, case", SUBNETS)
def test_logits(name, case):
    """The dense network, extracted, converted from the supernet, and where asked calibrated."""
    extra, config = case["extra"], load_golden(f"nasvit/{name}")["config"]
    images = golden_input([2, *case["input_shape"][1:]])[: case["input_shape"][0]]
    net = supernet(extra.get("post_scale", ()))
    dense = net.extract(config)
    if "calibration_batches" in extra:
        batches = [golden_input(one["shape"], one["seed"]) for one in extra["calibration_batches"]]
        mean = calibrate(dense, batches).first_conv.bn.running_mean
        wanted = torch.tensor(extra["first_conv_bn_running_mean_first4"])
        torch.testing.assert_close(mean[:4], wanted, rtol=1e-4, atol=1e-7)
    assert_matches(dense(images), case)


@pytest.mark.parametrize("name", FIXTURES)
def test_counts(name):
    """Active parameters, the released ones by both rules, and multiply-adds, also by the module."""
    fixture = load_golden(f"nasvit/{name}")
    config, detail = Config.of(fixture["config"]), fixture["params_detail"]
    with on_meta():
        dense = Subnet(NASVIT, config)
    count = sum(one.numel() for one in dense.parameters())
    assert count == params_of(NASVIT, config) == detail["active"]["total"]
    assert released_params(NASVIT, config, leaves_only=False) == fixture["params"]
    leaves = released_params(NASVIT, config)
    assert leaves == round(1e6 * detail["official_counter_params_m"])
    assert macs_of(NASVIT, config) == fixture["macs_official"] == fixture["macs_exact_integer"]
    assert count_macs(Subnet(NASVIT, config), 224).total == fixture["macs_official"]
    assert count_macs(dense, 224).total == fixture["macs_official"], "without memory, too"


def test_sampling_mutation_and_crossover_repeat_the_released_draws():
    fixture = load_golden("nasvit/sampling")
    rng = random.Random(fixture["seed"])
    samples = [NASVIT.sample(rng) for _ in fixture["samples"]]
    for config, wanted in zip(samples, fixture["samples"], strict=True):
        assert config == Config.of(wanted["config"])
        assert macs_of(NASVIT, config) == wanted["macs_official"]
        assert params_of(NASVIT, config) == wanted["active_params"]
        assert released_params(NASVIT, config) / 1e6 == wanted["params_official_counter_m"]
    rng = random.Random(fixture["seed"] + 1)
    for wanted in fixture["mutations_prob0.2_of_sample0_seed_plus1"]:
        assert NASVIT.mutate(samples[0], 0.2, rng) == Config.of(wanted)
    kept = NASVIT.mutate(samples[0], 0.5, random.Random(fixture["seed"] + 2), keep_resolution=True)
    assert kept == Config.of(fixture["mutation_prob0.5_keep_resolution_seed_plus2"])
    rng = random.Random(fixture["seed"] + 3)
    for wanted in fixture["crossovers_of_samples_0_1_p0.5_seed_plus3"]:
        assert NASVIT.cross(samples[0], samples[1], rng) == Config.of(wanted)


def test_tables_of_another_window_are_resampled():
    case = next(
        one.values[0] for one in golden_cases("nasvit/modules") if "relpos" in one.values[0]["name"]
    )
    table = golden_input(case["input"]["shape"], case["input"]["seed"])
    resized = resize_table(table, 35)
    first = torch.tensor(case["first16_flat"])
    torch.testing.assert_close(resized.flatten()[:16], first, rtol=1e-5, atol=1e-6)
    assert resized.norm().item() == pytest.approx(case["l2"], rel=1e-6)
    assert resize_table(resized, 35) is resized


# ---- a network is a part of the supernet ---------------------------------------------------------


def shaken(net: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """As after some training: nothing is zero, nothing hides."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for one in net.parameters():
            one.add_(0.05 * torch.randn_like(one))
        for one in net.modules():
            if isinstance(one, torch.nn.BatchNorm2d):
                one.running_mean.normal_(0, 0.2)
                one.running_var.uniform_(0.5, 1.5)
    return net


@pytest.mark.parametrize("space", [MICRO, MICRO_CNN], ids=lambda one: one.name)
@pytest.mark.parametrize("switched", [True, False])
def test_extracted_networks_equal_the_supernet(space, switched):
    """In evaluation, in training, and after both were calibrated on the same images."""
    net, rng = shaken(Supernet(space, 10, 32, switched)), random.Random(0)
    images = torch.randn(4, 3, 32, 32)
    configs = [space.smallest(), space.largest(), *(space.sample(rng) for _ in range(2))]
    for config in configs:
        net.set_config(config).eval()
        dense = net.extract()
        with torch.no_grad():
            torch.testing.assert_close(dense(images), net(images), rtol=1e-5, atol=1e-5)
            assert dense.train()(images).allclose(net.train()(images), rtol=1e-4, atol=1e-4)
            one, two = calibrate(net, [images]), calibrate(dense, [images])
            torch.testing.assert_close(two(images), one(images), rtol=1e-4, atol=1e-4)
        assert sum(one.numel() for one in dense.parameters()) == params_of(space, config, 10)
    assert count_macs(dense, 32).total == macs_of(space, config, 10)
    assert all(one.momentum == 0.1 for one in net.modules() if isinstance(one, SlicedBatchNorm2d))


def test_extracted_networks_are_copies():
    """Unlike the released ones: a second extraction changes nothing, nor does training one."""
    net = shaken(Supernet(MICRO, 10, 32)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = net(images)
        first = net.extract(MICRO.smallest())
        wanted = first(images)
        net.extract(MICRO.largest())
        assert torch.equal(first(images), wanted) and torch.equal(net(images), before)
        for one in first.parameters():
            one.add_(1)
        assert torch.equal(net(images), before)
    assert len(first.state_dict()) < len(net.state_dict())


@torch.no_grad()
def test_the_kept_bias_follows_its_weights():
    """Position biases are made once in evaluation, and anew when a weight has changed."""
    net = shaken(Supernet(MICRO, 10, 32)).eval()
    dense, images = net.extract(), torch.randn(2, 3, 32, 32)
    before, attention = dense(images), dense.stages[2][1].attn
    kept = attention.mixed_bias()[1]
    assert attention.mixed_bias()[1] is kept
    attention.table.add_(torch.randn_like(attention.table))
    after = dense(images)
    assert not torch.allclose(after, before)
    assert torch.allclose(dense.train().eval()(images), after)
    dense.load_state_dict(net.extract().state_dict())
    assert torch.equal(dense(images), before)
    with torch.enable_grad():
        dense(images).sum().backward()
    assert attention.table.grad.any(), "with gradients it is part of the graph"


# ---- checkpoints ---------------------------------------------------------------------------------


@torch.inference_mode()
def test_both_kinds_of_official_checkpoints_make_the_same_network():
    """The supernet's, sliced; and a network's, as the authors' code extracts it in full width."""
    fixture = load_golden("nasvit/min")
    config, theirs = Config.of(fixture["config"]), official()
    dynamic = {}
    blocks = [f"{block.stage}.{block.index}" for block in NASVIT.blocks(NASVIT.largest())]
    for key, shape, dtype in fixture["state_dict"]:
        if not dtype.startswith("float"):
            continue
        parts = key.split(".")
        if parts[0] == "blocks":  # the released extraction numbers the active blocks only
            places = [f"{one.stage}.{one.index}" for one in NASVIT.blocks(config)]
            parts[1] = str(blocks.index(places[int(parts[1])]))
        elif parts[:2] == ["last_conv", "0"]:
            parts[1] = "final_expand_layer"
        elif parts[:2] == ["last_conv", "2"]:
            parts[1] = "feature_mix_layer"
        name = ".".join(parts)
        if name not in theirs:  # dynamic layers wrap each convolution, norm and the classifier
            head, leaf = name.rsplit(".", 1)
            name = f"{head}.{head.rsplit('.', 1)[-1]}.{leaf}"
        value = theirs[name]
        edge = (value.shape[-1] - shape[-1]) // 2 if len(shape) == 4 and shape[1] == 1 else 0
        if edge:
            value = value[..., edge:-edge, edge:-edge]
        dynamic[key] = value[tuple(map(slice, shape))]
    static = harness.load_official("nasvit_min", dynamic)
    sliced = harness.load_official("nasvit_min", theirs)
    images = golden_input([2, 3, 224, 224])
    assert torch.equal(static(images), sliced(images))
    with pytest.raises(ReplivitError, match="another configuration"):
        to_subnet(dynamic, named_configs()["f421"])
    with pytest.raises(ReplivitError, match="holds one extracted network"):
        to_supernet(dynamic)


def test_of_a_checkpoint_the_averaged_weights_are_loaded():
    """As the released loader does; every variant that takes official weights says so."""
    theirs = official()
    checkpoint = {"model": {key: 0 * one for key, one in theirs.items()}, "model_ema": theirs}
    loaded = harness.load_official("nasvit_min", checkpoint)
    wanted = theirs["classifier.linear.linear.bias"]
    assert torch.equal(loaded.classifier.bias, wanted) and wanted.any()
    keys = {one.spec.checkpoint_key for one in harness.variants("nasvit") if one.spec.convert}
    assert keys == {"model_ema"}


def test_wrong_checkpoints_are_one_sentence():
    for name in ("nasvit_supernet", "nasvit_min"):
        with pytest.raises(ReplivitError, match="no checkpoint of NASViT"):
            harness.load_official(name, {"cls_token": torch.zeros(1)})
        odd = {
            "first_conv.conv.conv.weight": torch.zeros(24, 3, 3, 3),
            "blocks.x.y": torch.zeros(1),
        }
        with pytest.raises(ReplivitError, match=f"no official checkpoint of {name}"):
            harness.load_official(name, odd)


# ---- bad input -----------------------------------------------------------------------------------


def changed(**genes) -> dict:
    return {**NASVIT.smallest().as_dict(), **genes}


@pytest.mark.parametrize(
    "config, message",
    [
        (changed(resolution=200), "resolutions 192, 224, 256 or 288, not 200"),
        (changed(depth=[3] * 7), r"depth\[0\] of nasvit is 1 or 2, not 3"),
        (changed(width=[16] * 3), "width of nasvit has 9 entries"),
        (changed(width="wide"), "whole numbers"),
        (changed(resolution=192.7), "whole numbers"),
        (changed(resolution=float("inf")), "whole numbers"),
        (changed(depth=[True, 3, 3, 3, 3, 3, 3]), "whole numbers"),
        ({"resolution": 192}, "a configuration has resolution, width"),
        ("a9", "no network 'a9' of nasvit; there are min, max"),
        (5, "a configuration has"),
    ],
)
def test_configurations_outside_the_space_are_refused(config, message):
    with on_meta(), pytest.raises(ValueError, match=message):
        harness.build("nasvit_min", config=config)


def test_images_must_be_square():
    with on_meta():
        net = harness.build("nasvit_min")
        with pytest.raises(ValueError, match="square images, not 224x192"):
            net(torch.empty(1, 3, 224, 192))
        with pytest.raises(ValueError, match="square images, not 224x192"):
            harness.build("nasvit_min", image_size=(224, 192))
        with pytest.raises(ValueError, match="no space 'nano'"):
            harness.build("nasvit_supernet", space="nano", config="min")
        with pytest.raises(ValueError, match="switched must be true or false, not 'no'"):
            harness.build("nasvit_supernet", switched="no")
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(Supernet(MICRO, 10, 32), [])


# ---- networks with a name ------------------------------------------------------------------------


def test_named_networks_cost_what_they_say():
    known = named_configs()
    for name, wanted in (("f208", 208), ("f309", 309), ("f421", 421), ("f528", 528), ("f591", 591),
                         ("f757", 757), ("a0", 208), ("a1", 309), ("a2", 421), ("a3", 528),
                         ("a4", 591), ("a5", 757)):  # fmt: skip
        macs = macs_of(NASVIT, known[name]) / 1e6
        assert abs(macs - wanted) <= (0.3 if name[0] == "f" else 2), name
    assert known["min"] == NASVIT.smallest() and known["max"] == NASVIT.largest()
    assert known["f208"] == Config.of(load_golden("nasvit/subnet_f208")["config"])
    assert all(one.space in SPACES and one.origin for one in networks().values())
    random.seed(421)
    draws = [NASVIT.sample() for _ in range(2520)]
    assert draws[-1] == known["f421"]
    assert NASVIT.size == 48_157_949_952
