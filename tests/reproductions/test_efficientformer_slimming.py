"""The method: MetaPaths, the latency table and gradual slimming."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import harness
from harness.measurement.latency import Effort
from reproductions.efficientformer import latency_table, slimming, slimming_experiment
from reproductions.efficientformer.blocks import Block, Meta3D, Meta4D
from reproductions.efficientformer.supernet import (
    GRID,
    AnnealTemperature,
    Architecture,
    MetaPath,
    SuperNet,
)


def supernet(**options) -> SuperNet:
    torch.manual_seed(0)
    return SuperNet(
        (2, 2, 2), (32, 32, 48), 4, 16, strides=(1, 1), key_dim=4, num_heads=2, attn_ratio=2,
        layer_scale_init_value=0.5, **options,
    )  # fmt: skip


IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# ---- MetaPath ------------------------------------------------------------------------------------


def meta_path(noise="uniform") -> MetaPath:
    torch.manual_seed(0)
    return MetaPath(Meta4D(16), Meta3D(16, key_dim=4, num_heads=2, resolution=2), noise)


@pytest.mark.parametrize("noise", ["uniform", "gumbel", "none"])
def test_branch_weights_sum_to_one_and_become_one_hot(noise):
    path = meta_path(noise)
    with torch.no_grad():
        path.alpha.copy_(torch.tensor([0.2, 0.9, 0.4]))
    for temperature in (10.0, 1.0, 1e-4):
        path.temperature = temperature
        assert float(path.weights().sum().detach()) == pytest.approx(1, abs=1e-6)
    assert float(path.weights().max().detach()) == pytest.approx(1, abs=1e-6)
    path.temperature = 1e4
    assert torch.allclose(path.weights(), torch.full((3,), 1 / 3), atol=1e-2)


def test_a_supernet_under_another_noise_is_another_run(monkeypatch):
    told = []
    monkeypatch.setattr(harness, "train", lambda *_, **given: told.append(given["options"]))
    for noise in ("uniform", "gumbel"):
        slimming_experiment._train_supernet(
            slimming_experiment.SETTINGS["tiny"], noise, "cpu", None
        )
    assert told == [{}, {"noise": "gumbel"}]


def test_a_misspelt_noise_is_refused():
    with pytest.raises(ValueError, match="no noise 'gumble'; there are uniform, gumbel, none"):
        meta_path("gumble")


def test_noise_is_uniform_as_printed_or_gumbel_and_absent_in_evaluation():
    torch.manual_seed(0)
    means = {}
    for noise in ("uniform", "gumbel"):
        path = meta_path(noise)
        logits = torch.stack([path.weights().log() for _ in range(4000)]).detach()
        differences = logits[:, 0] - logits[:, 1]  # eps_0 - eps_1, as alpha is zero
        means[noise] = float(differences.var())
        path.eval()
        assert torch.equal(path.weights(), path.weights())
    assert means["uniform"] == pytest.approx(2 / 12, rel=0.1)
    assert means["gumbel"] == pytest.approx(2 * torch.pi**2 / 6, rel=0.1)


def test_output_is_the_weighted_sum_of_the_branches():
    path = meta_path().eval()
    for scale in (name for name in path.parameters() if name.ndim == 1 and len(name) == 16):
        torch.nn.init.normal_(scale)
    with torch.no_grad():
        path.alpha.copy_(torch.tensor([0.2, 0.9, 0.4]))
        x = torch.randn(2, 16, 2, 2)
        tokens = path.branches["3d"](x.flatten(2).mT).mT.unflatten(2, (2, 2))
        a, b, c = path.weights()
        expected = a * path.branches["4d"](x) + b * tokens + c * x
        assert torch.allclose(path(x), expected, atol=1e-6)
        assert not torch.allclose(path(x), x, atol=1e-2)


def test_importance_compares_with_identity():
    path = meta_path()
    assert path.importance() == pytest.approx(2)
    with torch.no_grad():
        path.alpha.copy_(torch.tensor([1.0, 1.0, 0.0]))
    assert path.importance() == pytest.approx(2 * np.e)
    assert MetaPath(Meta4D(16)).importance() == pytest.approx(1)


def test_alpha_and_all_weights_get_gradients():
    net = supernet().train()
    net(IMAGES).square().sum().backward()
    silent = [name for name, one in net.named_parameters() if one.grad is None]
    assert not silent
    assert all(bool(path.alpha.grad.abs().sum() > 0) for _, _, path in net.meta_paths())


def test_early_stages_have_no_3d_branch():
    kinds = {stage: path.kinds for stage, _, path in supernet().meta_paths()}
    assert kinds == {
        0: ("4d", "identity"), 1: ("4d", "3d", "identity"), 2: ("4d", "3d", "identity")
    }  # fmt: skip


def test_supernet_is_deterministic_under_a_seed():
    first, second = supernet(), supernet()
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    torch.manual_seed(3)
    a = first.train()(IMAGES)
    torch.manual_seed(3)
    assert torch.equal(second.train()(IMAGES), a)
    assert not torch.equal(second(IMAGES), a), "other noise, other mixture"


def test_temperature_falls_to_its_end():
    class Recipe:
        epochs = 5

    class Context:
        model, recipe, epoch = supernet(), Recipe, 0

    seen = []
    for Context.epoch in range(5):
        AnnealTemperature(1.0, 0.1).on_epoch_start(Context)
        seen.append(next(path.temperature for _, _, path in Context.model.meta_paths()))
    assert seen[0] == 1 and seen[-1] == pytest.approx(0.1) and sorted(seen, reverse=True) == seen
    with pytest.raises(ValueError, match="above 0"):
        Context.model.set_temperature(0)


# ---- architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "widths,paths,sentence",
    [
        ((16, 16, 24), (("4d",), ("4d",), ("4d",)), "multiples of 16"),
        ((16, 16), (("4d",), ("3d",), ("3d",)), "2 widths for 3 stages"),
        ((16, 16, 16), (("3d",), ("3d",), ("3d",)), "only the last 2 stages"),
        ((16, 16, 16), (("4d",), ("3d", "4d"), ("3d",)), "4D blocks must come before"),
        ((16, 16, 16), (("4d",), ("3d",), ("4d",)), "4D blocks must come before"),
    ],
)
def test_architectures_outside_the_space_are_refused(widths, paths, sentence):
    with pytest.raises(ValueError, match=sentence):
        Architecture(widths, paths)


def test_inherited_network_computes_what_the_chosen_branches_compute():
    net = supernet().eval()
    chosen = Architecture(
        net.largest.widths, (("4d", "identity"), ("4d", "3d"), ("identity", "3d"))
    )
    plain = net.inherit(chosen).eval()
    assert [type(one) for one in plain.modules() if isinstance(one, Block)] == [
        Meta4D, Meta4D, Meta3D, Meta3D,
    ]  # fmt: skip
    with torch.no_grad():
        for stage, position, path in net.meta_paths():
            kind = chosen.paths[stage][position]
            path.alpha.copy_(torch.tensor([100.0 if one == kind else 0.0 for one in path.kinds]))
        assert torch.allclose(plain(IMAGES), net(IMAGES), atol=1e-5)


def test_narrower_network_takes_the_first_channels():
    net = supernet()
    architecture = net.largest.with_width(2, 32).with_width(0, 16)
    plain = net.inherit(architecture)
    source = net.network[4][0].branches["3d"].token_mixer
    target = next(one for one in plain.network[4] if isinstance(one, Meta3D)).token_mixer
    assert torch.equal(target.qkv.weight, source.qkv.weight[:, :32])
    assert torch.equal(target.proj.weight, source.proj.weight[:32])
    assert torch.equal(plain.patch_embed[3].weight, net.patch_embed[3].weight[:16, :8])
    assert torch.equal(plain.network[1].proj.weight, net.network[1].proj.weight[:, :16])


# ---- slimming ------------------------------------------------------------------------------------


def linear_table(net: SuperNet) -> latency_table.LatencyTable:
    """A made-up table: cost grows with width, 3D blocks cost three times as much."""
    cost = {}
    for key in latency_table.modules(net):
        kind, *numbers = key.split("/")
        size = float(numbers[-1]) + (float(numbers[-2]) if kind == "embedding" else 0)
        cost[key] = size * {"3d": 3e-5, "4d": 1e-5}.get(kind, 1e-6)
    return latency_table.LatencyTable(cost)


def capacity(architecture: Architecture) -> float:
    """A made-up accuracy: every channel of every block counts, late ones more."""
    return sum(architecture.widths[s] * (1 + s + (k == "3d")) for s, _, k in architecture.blocks())


@settings(max_examples=25, deadline=None)
@given(
    target=st.floats(0.25, 0.95),
    scores=st.lists(st.floats(0.1, 5), min_size=6, max_size=6),
    seed=st.none() | st.integers(0, 5),
)
def test_slimming_keeps_its_promises(target, scores, seed):
    net = supernet()
    table, start = linear_table(net), net.largest
    places = [(stage, at) for stage, at, _ in net.meta_paths()]
    goal = target * table.latency(start)
    random = None if seed is None else np.random.default_rng(seed)
    importance = dict(zip(places, scores, strict=True))
    steps = slimming.slim(start, goal, table, capacity, importance, random)
    latencies = [step.latency_s for step in steps]
    assert all(later < earlier for earlier, later in itertools.pairwise(latencies))
    assert latencies[-1] <= goal
    assert all(latency > goal for latency in latencies[:-1]), "it stops as soon as it may"
    for step in steps:
        kinds = [kind for _, _, kind in step.architecture.blocks()]
        assert kinds == sorted(kinds, reverse=True), "4D* 3D*"
        assert "3d" not in step.architecture.paths[0]
        assert all(width % GRID == 0 and width >= GRID for width in step.architecture.widths)
        assert min(step.architecture.depths) >= 1
        assert step.latency_s == pytest.approx(table.latency(step.architecture))
        assert step.accuracy == capacity(step.architecture)


def test_the_three_actions():
    net = supernet()
    importance = {(stage, at): 1.0 + stage + 0.1 * at for stage, at, _ in net.meta_paths()}
    found = slimming.actions(net.largest, importance)
    assert found["remove path"].paths[0] == ("identity", "4d"), "the least important path"
    assert found["3D to 4D"].paths == (("4d", "4d"), ("4d", "3d"), ("3d", "3d")), "the first 3D"
    assert found["narrow stage"].widths == (16, 32, 48), "the least important stage"
    smallest = Architecture((16, 16, 16), (("4d",), ("4d",), ("4d",)))
    assert slimming.actions(smallest, importance) == {}


def test_greedy_takes_the_smallest_drop_per_millisecond():
    net = supernet()
    table = linear_table(net)
    importance = net.importance()
    candidates = slimming.actions(net.largest, importance)
    start = table.latency(net.largest)
    losses = {"remove path": 8.0, "3D to 4D": 0.5, "narrow stage": 9.0}
    scores = {candidates[name]: 90 - loss for name, loss in losses.items()}
    steps = slimming.slim(
        net.largest, 0.97 * start, table, lambda one: scores.get(one, 90.0), importance
    )
    assert steps[1].action == "3D to 4D"
    saved = (start - table.latency(candidates["3D to 4D"])) * 1e3
    assert steps[1].drop_per_ms == pytest.approx(0.5 / saved)


def test_unreachable_target_is_a_sentence():
    net = supernet()
    table = linear_table(net)
    with pytest.raises(harness.ReplivitError, match="cannot be reached"):
        slimming.slim(net.largest, 1e-9, table, capacity, net.importance())
    with pytest.raises(harness.ReplivitError, match="no uniform width"):
        slimming.scale_uniformly(net.largest, 1e-9, table)


def test_uniform_scaling_is_the_widest_within_the_target():
    net = supernet()
    table = linear_table(net)
    target = 0.7 * table.latency(net.largest)
    scaled = slimming.scale_uniformly(net.largest, target, table)
    assert scaled.paths == net.largest.paths
    assert table.latency(scaled) <= target < table.latency(net.largest)
    assert scaled.widths != (GRID,) * 3


def test_latency_table_covers_the_space_and_survives_a_file(tmp_path):
    net = supernet()
    effort = Effort(
        budget_s=0.2, min_rounds=2, max_rounds=2, palindromes=1, block_s=1e-5, warm_up_s=1e-4,
        warm_up_limit_s=1e-3,
    )  # fmt: skip
    table = latency_table.measure_table(net, batch_size=1, effort=effort)
    assert set(table.seconds) == set(latency_table.modules(net))
    assert all(value > 0 for value in table.seconds.values())
    assert {"4d/0/16", "3d/1/32", "3d/2/48", "stem/16", "embedding/1/16/32", "head/32"} <= set(
        table.seconds
    )
    assert "3d/0/16" not in table.seconds
    table.save(tmp_path / "table.json")
    again = latency_table.LatencyTable.load(tmp_path / "table.json")
    assert again.latency(net.largest) == table.latency(net.largest)
    with pytest.raises(harness.ReplivitError, match=r"no entry 'stem/64'"):
        table.latency(net.largest.with_width(0, 64))


def test_table_adds_up_the_parts():
    net = supernet()
    architecture = Architecture((16, 32, 48), (("4d", "4d"), ("4d", "identity"), ("3d",)))
    assert sorted(latency_table.parts(architecture)) == [
        "3d/2/48", "4d/0/16", "4d/0/16", "4d/1/32", "embedding/0/16/32", "embedding/1/32/48",
        "head/48", "stem/16",
    ]  # fmt: skip
    assert set(latency_table.parts(architecture)) <= set(latency_table.modules(net))


def test_recalibration_takes_statistics_of_the_network_itself():
    net = supernet()
    plain = net.inherit(net.largest)
    norm = plain.patch_embed[1]
    before = norm.running_mean.clone()
    slimming.recalibrate(plain, IMAGES, batch_size=12)
    with torch.no_grad():
        expected = plain.patch_embed[0](IMAGES).mean(dim=(0, 2, 3))
    assert torch.allclose(norm.running_mean, expected, atol=1e-5)
    assert not torch.allclose(norm.running_mean, before, atol=1e-2)
    assert norm.momentum == 0.1 and not plain.training


def test_accuracy_counts_right_answers():
    class Echo(torch.nn.Module):
        def forward(self, x):
            return x

    logits = torch.eye(4).repeat(3, 1)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 3, 3, 3, 3])
    assert slimming.accuracy(Echo(), logits, labels, batch_size=5) == pytest.approx(75)
