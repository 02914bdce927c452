"""EfficientFormerV2's method: supernet, Mobile Efficiency Score, joint search, experiments."""

import random
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import harness
from harness.measurement.latency import Effort
from harness.meta import on_meta
from reproductions.efficientformer_v2 import (
    experiments,
    ladder,
    search_experiment,
    search_setup,
)
from reproductions.efficientformer_v2.model import EfficientFormerV2
from reproductions.efficientformer_v2.search import (
    Cost,
    CostTable,
    MobileEfficiency,
    actions,
    build_unit,
    greedy_search,
    scaled_widths,
    units_of,
    units_of_space,
)
from reproductions.efficientformer_v2.supernet import (
    ElasticConvNorm,
    SandwichRule,
    SearchSpace,
    Subnet,
    Supernet,
)

SPACE = SearchSpace(
    widths=((8, 16), (16, 24), (16, 24, 32), (24, 32)), depths=(1, 2, 2, 3), expansions=(1.5, 2, 3),
    num_heads=2, key_dim=8, attn_ratio=2, stem_stride=2,
)  # fmt: skip
NARROW = SearchSpace(
    widths=((8,), (8,), (16, 24), (24,)), depths=(1, 1, 2, 2), expansions=(2, 3),
    num_heads=2, key_dim=8, attn_ratio=2, stem_stride=2,
)  # fmt: skip
TINY = Effort(
    budget_s=0.2, min_rounds=2, max_rounds=2, palindromes=1, block_s=1e-4, warm_up_s=0.0,
    warm_up_limit_s=0.001,
)  # fmt: skip


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    """A supernet whose weights, scales and norms all matter."""
    torch.manual_seed(0)
    net = Supernet(SPACE, 10, 32, layer_scale_init=0.5)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.normal_(1, 0.1)
    return net.eval()


def counted(architecture) -> int:
    with on_meta():
        model = EfficientFormerV2(architecture, 10, 32, distillation=False)
    return sum(one.numel() for one in model.parameters())


def table_of(space: SearchSpace, seconds=lambda unit, params: params * 1e-9) -> CostTable:
    """Real parameters, and latencies made up by `seconds`."""
    entries = {}
    for unit in units_of_space(space):
        with on_meta():
            module, _ = build_unit(unit, space, 32, 10)
        params = sum(one.numel() for one in module.parameters())
        entries[unit] = Cost(params, seconds(unit, params))
    return CostTable(entries)


# ---- supernet ------------------------------------------------------------------------------------


@torch.no_grad()
def test_largest_subnet_is_the_plain_model(supernet):
    images = torch.randn(2, 3, 32, 32)
    largest = SPACE.uniform("largest")
    plain = supernet.extract(largest)
    supernet.select(largest)
    assert plain.architecture.depths == SPACE.depths
    assert torch.equal(supernet(images), plain(images))


@torch.no_grad()
def test_every_subnet_equals_its_extracted_network(supernet):
    rng, images = random.Random(0), torch.randn(2, 3, 32, 32)
    seen = set()
    for subnet in [SPACE.uniform("smallest"), *(SPACE.sample(rng) for _ in range(12))]:
        supernet.select(subnet)
        output, plain = supernet(images), supernet.extract(subnet)
        assert torch.equal(output, plain(images))
        assert sum(one.numel() for one in plain.parameters()) == counted(SPACE.architecture(subnet))
        seen.add(round(float(output.sum()), 4))
    assert len(seen) == 13  # they do differ


def test_each_width_owns_its_norm(supernet):
    largest, smallest = SPACE.uniform("largest"), SPACE.uniform("smallest")
    net = Supernet(SPACE, 10, 32).train()
    norms = {
        name: module for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)
    }
    net.select(smallest)
    net(torch.randn(4, 3, 32, 32))
    moved = {name for name, norm in norms.items() if norm.num_batches_tracked > 0}
    assert moved and len(moved) < len(norms)
    net.select(largest)
    net(torch.randn(4, 3, 32, 32))
    both = {name for name, norm in norms.items() if norm.num_batches_tracked > 1}
    assert not both  # every elastic norm of one network is foreign to the other
    conv = net.stages[2].blocks[0].mlp.fc1
    assert isinstance(conv, ElasticConvNorm)
    assert {key: norm.num_features for key, norm in conv.norms.items()} == conv.channels
    assert conv.channels["16x1_5"] == 24 and conv.channels["32x3"] == 96


def test_sandwich_adds_the_gradients_of_four_networks():
    torch.manual_seed(0)
    net = Supernet(SPACE, 10, 32, drop_path_rate=0.0)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    rule = SandwichRule()
    random.seed(5)
    chosen = dict(rule.sandwich(SPACE))
    assert list(chosen) == ["max", "min", "random1", "random2"]
    assert chosen["max"] == SPACE.uniform("largest")
    assert chosen["min"] == SPACE.uniform("smallest")
    for subnet in chosen.values():
        net.select(subnet)
        F.cross_entropy(net(images), labels).backward()
    wanted = {
        name: one.grad.clone() for name, one in net.named_parameters() if one.grad is not None
    }
    net.zero_grad()
    context = SimpleNamespace(
        model=net, autocast=nullcontext, backward=lambda loss: loss.backward(),
        recipe=SimpleNamespace(label_smoothing=0.0),
    )  # fmt: skip
    random.seed(5)
    parts = rule.step(net, images, labels, context)
    assert list(parts) == ["loss", "max", "min", "random1", "random2"]
    assert net.subnet == SPACE.uniform("largest")
    for name, parameter in net.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_sandwich_training_teaches_all_widths():
    """Two easy classes: after a few steps the largest and the smallest network know them."""
    torch.manual_seed(0)
    random.seed(0)
    net = Supernet(SPACE, 2, 32, drop_path_rate=0.0, layer_scale_init=0.1)
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    labels = torch.arange(32) % 2
    images = torch.randn(32, 3, 32, 32) + 2.0 * labels.view(-1, 1, 1, 1)
    context = SimpleNamespace(
        model=net, autocast=nullcontext, backward=lambda loss: loss.backward(),
        recipe=SimpleNamespace(label_smoothing=0.0),
    )  # fmt: skip
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(
            {k: float(v) for k, v in SandwichRule().step(net, images, labels, context).items()}
        )
        optimizer.step()
    assert losses[-1]["max"] < 0.5 * losses[0]["max"]
    assert losses[-1]["min"] < 0.8 * losses[0]["min"]


def test_subnets_are_valid_and_expressible():
    rng = random.Random(1)
    for _ in range(50):
        subnet = SPACE.sample(rng)
        architecture = SPACE.architecture(subnet)
        assert all(depth >= 1 for depth in architecture.depths)
        assert all(width in SPACE.widths[i] for i, width in enumerate(architecture.widths))
        assert [len(one) for one in architecture.expansions] == list(architecture.depths)
        assert sum(architecture.attention_blocks) <= sum(architecture.depths[2:])
    with pytest.raises(ValueError, match="ascending"):
        SearchSpace(widths=((16, 8),) * 4, depths=(1, 1, 1, 1))


# ---- score and table -----------------------------------------------------------------------------


def test_mobile_efficiency_score():
    score = MobileEfficiency(unit=Cost(3e6, 1e-3))
    assert score(Cost(3e6, 1e-3)) == pytest.approx(100)
    assert score(Cost(3.5e6, 0.9e-3)) == pytest.approx(102.9, abs=0.05)  # S0 by those constants
    assert score(Cost(12e6, 1e-3)) == pytest.approx(50)  # four times the size: half
    assert score(Cost(3e6, 2e-3)) == pytest.approx(50)  # twice as slow: half
    flat = MobileEfficiency(unit=Cost(3e6, 1e-3), alpha_params=0)
    assert flat(Cost(9e9, 0.5e-3)) == pytest.approx(200)


def test_parts_add_up_to_the_network():
    table = table_of(SPACE)
    rng = random.Random(2)
    for _ in range(10):
        architecture = SPACE.architecture(SPACE.sample(rng))
        assert table.cost(architecture).params == counted(architecture)
    foreign = scaled_widths(architecture, 3.0)
    with pytest.raises(harness.ReplivitError, match="knows no part"):
        table.cost(foreign)


def test_measured_table_covers_the_space():
    space = SearchSpace(
        widths=((8,), (8,), (8,), (8, 16)), depths=(1, 1, 1, 1), expansions=(2,),
        num_heads=2, key_dim=8, attn_ratio=2, stem_stride=2,
    )  # fmt: skip
    table = CostTable.measure(space, 32, 10, effort=TINY)
    assert set(table.entries) == set(units_of_space(space))
    assert all(cost.latency > 0 for cost in table.entries.values())
    whole = space.architecture(space.uniform("largest"))
    assert table.cost(whole).latency == pytest.approx(
        sum(table.entries[unit].latency for unit in units_of(whole))
    )


# ---- the search ----------------------------------------------------------------------------------


def capacity(subnet: Subnet) -> float:
    """A made-up accuracy that falls with everything that is taken away."""
    return 50 + 0.1 * sum(subnet.widths) + sum(map(sum, subnet.expansions)) + sum(subnet.attention)


def walk(target: float = 0.4, score=None, accuracy=capacity):
    table = table_of(SPACE)
    whole = table.cost(SPACE.architecture(SPACE.uniform("largest")))
    score = score or MobileEfficiency(unit=whole)
    goal = Cost(whole.params, target * whole.latency)
    return table, whole, greedy_search(SPACE, table, score, accuracy, goal)


def test_search_reaches_its_target_with_rising_score():
    table, whole, steps = walk()
    assert steps[0].subnet == SPACE.uniform("largest") and steps[0].mes == pytest.approx(100)
    assert steps[-1].cost.latency <= 0.4 * whole.latency < steps[-2].cost.latency
    assert all(low.mes < high.mes for low, high in pairwise(steps))
    for step in steps:
        architecture = SPACE.architecture(step.subnet)
        assert table.cost(architecture) == step.cost
        EfficientFormerV2(architecture, 10, 32, distillation=False)


def test_each_step_is_the_cheapest_in_accuracy_per_score():
    table, whole, steps = walk()
    score = MobileEfficiency(unit=whole)
    for now, then in pairwise(steps):
        ratios = {}
        for action in actions(SPACE, now.subnet):
            gain = score(table.cost(SPACE.architecture(action.result))) - now.mes
            if gain > 0:
                ratios[action.result] = (now.accuracy - capacity(action.result)) / gain
        assert ratios[then.subnet] == min(ratios.values())
        assert then.evaluations == len(
            [1 for action in actions(SPACE, now.subnet)
             if table.cost(SPACE.architecture(action.result)) != now.cost]
        )  # fmt: skip


def test_search_does_not_depend_on_the_units():
    usual = [str(step.action) for step in walk()[2]]
    units = MobileEfficiency(unit=Cost(3e6, 1e-3))
    assert [str(step.action) for step in walk(score=units)[2]] == usual


def test_actions_take_one_small_step_each():
    subnet = SPACE.uniform("largest")
    pool = actions(SPACE, subnet)
    kinds = [action.kind for action in pool]
    assert kinds.count("A_C") == 4 and kinds.count("A_E") == sum(SPACE.depths)
    assert kinds.count("A_N") == 2 + 2 + 3  # the only block of stage 1 has to stay
    assert kinds.count("A_N attention") == 2
    for action in pool:
        result = action.result
        changed = (
            (result.widths != subnet.widths)
            + sum(a != b for a, b in zip(result.expansions, subnet.expansions, strict=True))
            + (result.attention != subnet.attention and action.kind == "A_N attention")
        )
        assert changed == 1
    assert actions(SPACE, SPACE.uniform("smallest")) == []


def test_unreachable_target():
    with pytest.raises(harness.ReplivitError, match="below what the space can reach"):
        walk(target=0.001)


def test_uniform_scaling_keeps_depth_and_rounds_widths():
    whole = SPACE.architecture(SPACE.uniform("largest"))
    half = scaled_widths(whole, 0.5)
    assert half.depths == whole.depths and half.expansions == whole.expansions
    assert half.widths == (8, 16, 16, 16)  # 12 rounds to the even multiple
    assert all(width % 8 == 0 for width in scaled_widths(whole, 0.33).widths)


# ---- experiments ---------------------------------------------------------------------------------


def test_ladder_counts_the_first_three_rows_exactly():
    result = ladder.ladder()
    counted_rows = [(row["params_m"], row["macs_g"]) for row in result.rows[:3]]
    assert counted_rows == [(12.2502, 1.3001), (12.2775, 1.3001), (12.3725, 1.326)]
    assert all(row["measured"] == "not measured" and row["reason"] for row in result.rows[3:])
    outcomes = [finding.outcome for finding in result.findings]
    assert outcomes == ["reproduced"] * 3 + ["not measured"] * 6 + ["deviates"]
    assert "-0.2 points" in result.findings[-1].evidence
    assert len(result.rows) == 9 and set(result.figures) == {"ladder"}


def test_stride_attention_small():
    result = experiments.stride_attention(sizes=(64,), networks=("s0",), seconds=0.05)
    assert [row["what"] for row in result.rows] == ["mixer", "S0", "S1", "S2", "L"]
    for row in result.rows:
        assert row["macs_strided"] < row["macs_full"]
        assert (row["latency_ratio"] is None) == (row["what"] in ("S1", "S2", "L"))
    s0 = next(row for row in result.rows if row["what"] == "S0")
    assert s0["ratio_low"] <= s0["latency_ratio"] <= s0["ratio_high"]
    assert result.findings[-1].outcome == "not measured"
    assert len(result.published) == 8 and result.conditions.threads == 1
    with pytest.raises(harness.ReplivitError, match="no scale 'huge'"):
        experiments.stride_attention(scale="huge")


def test_stride_findings_follow_the_numbers():
    row = {"what": "mixer", "image_size": 224, "batch": 1, "latency_ratio": 0.5,
           "ratio_low": 0.45, "ratio_high": 0.55, "status": "noisy"}  # fmt: skip
    larger = {**row, "image_size": 448, "latency_ratio": 0.2, "ratio_low": 0.1, "ratio_high": 0.3}
    assert "batch 1, noisy" in experiments._mixer_findings([row])[0].evidence
    good = [finding.outcome for finding in experiments._mixer_findings([row, larger])]
    bad = [
        finding.outcome
        for finding in experiments._mixer_findings([row, {**larger, "ratio_high": 1.2}])
    ]
    assert good == ["reproduced", "reproduced"] and bad == ["deviates", "deviates"]


def test_a_supernet_of_other_choices_is_another_run():
    space = search_setup.SCALES["small"].space
    assert search_experiment._told(space) == {}
    fewer = replace(space, widths=((32,), (48,), (80,), (96,)))  # the same weights at the start
    assert search_experiment._told(fewer) == {"space": repr(fewer)}


def test_search_experiment_end_to_end(monkeypatch):
    """Everything but the long trainings: the networks keep their first weights."""

    def untrained(model, track, recipe, seed, **options):
        if options.get("evaluate") is False:
            return SimpleNamespace(model=model.eval())
        return SimpleNamespace(records=harness.evaluate(model.eval(), track))

    monkeypatch.setattr(search_experiment, "train", untrained)
    result = harness.run(
        "efficientformer_v2/search", space=NARROW, search_images=100, random_subnets=2, target=0.8,
        latency_batch=1, timing_seconds=0.2,
    )  # fmt: skip
    kinds = [row["what"] for row in result.rows]
    assert kinds[0] == "walk" and kinds.count("random") == 2
    assert kinds[-2:] == ["found", "uniform"]
    assert len({tuple(row) for row in result.rows}) == 1  # the same columns
    steps = [row for row in result.rows if row["what"] == "walk"]
    assert steps[0]["mes"] == pytest.approx(100)
    assert all(low["mes"] < high["mes"] for low, high in pairwise(steps))
    assert [finding.outcome for finding in result.findings].count("not measured") == 0
    assert result.figure_files and result.record.detail["rows"] == result.rows


def test_search_options_are_checked():
    with pytest.raises(harness.ReplivitError, match="no option 'epochs'; there are space, track"):
        search_experiment.search(epochs=3)
    with pytest.raises(harness.ReplivitError, match="between 0 and 1"):
        search_experiment.search(target=2)
