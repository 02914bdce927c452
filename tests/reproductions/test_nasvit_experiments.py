"""NASViT's search, its training through the harness, and its experiments at the tiny scale."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import harness
from harness import environment
from harness.errors import ReplivitError
from harness.registry import get_variant
from harness.training import read_recipe, train
from reproductions.nasvit import experiment_setup
from reproductions.nasvit.conflict import measure_conflict
from reproductions.nasvit.counting import macs_of, params_of
from reproductions.nasvit.evolution import Evolution, Settings, config_of
from reproductions.nasvit.experiment_setup import choose_setting
from reproductions.nasvit.fitness import SubnetAccuracy
from reproductions.nasvit.judging import judge
from reproductions.nasvit.named import named_configs
from reproductions.nasvit.pareto import scores_file
from reproductions.nasvit.search import SLACK, TARGETS, find
from reproductions.nasvit.space import MICRO, NASVIT, Config
from reproductions.nasvit.supernet import Supernet
from reproductions.nasvit.techniques import ARMS
from reproductions.nasvit.training import ConflictAware

SMALL = Settings(population=6, mutations=3, crossovers=3, iterations=4, min_macs=2, max_macs=8,
                 bucket=2)  # fmt: skip


def size(configs: list[Config]) -> list[float]:
    return [params_of(MICRO, one, 10) for one in configs]


# ---- evolution -----------------------------------------------------------------------------------


def test_evolution_keeps_one_champion_per_size():
    result = Evolution(MICRO, size, SMALL, num_classes=10, seed=1).run()
    for bucket, one in result.champions.items():
        config = config_of(MICRO, one.genes)
        assert config.genes == one.genes and MICRO.check(config)
        assert one.cost == macs_of(MICRO, config, 10) and 2e6 <= one.cost <= 8e6
        same = [other for other in result.scores.entries if round(other.cost / 2e6) * 2 == bucket]
        assert one.fitness == max(other.fitness for other in same)
    front = result.front()
    assert [one.cost for one in front] == sorted(one.cost for one in front)
    assert [one.fitness for one in front] == sorted({one.fitness for one in front})
    assert result.best(2, 5).cost <= 5e6
    with pytest.raises(ValueError, match="met no network of 100 to 200 M"):
        result.best(100, 200)
    first = [one.fitness for one in result.scores.entries if one.phase == "random"]
    last = [one.fitness for one in result.champions.values()]
    assert max(last) > max(first) and sum(last) / len(last) > sum(first) / len(first)


def test_a_killed_search_goes_on_and_draws_the_same(tmp_path):
    path, left = tmp_path / "search.jsonl", 8

    def stops(configs: list[Config]):
        nonlocal left
        for value in size(configs):
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            yield value

    wanted = Evolution(MICRO, size, SMALL, num_classes=10).run()
    with pytest.raises(KeyboardInterrupt):
        Evolution(MICRO, stops, SMALL, num_classes=10, state=path).run()
    left = math.inf
    calls = []

    def counted(configs: list[Config]):
        calls.extend(configs)
        return size(configs)

    found = Evolution(MICRO, counted, SMALL, num_classes=10, state=path).run()
    assert found.scores.entries == wanted.scores.entries
    assert found.champions == wanted.champions
    assert len(calls) == len(wanted.scores) - 8
    again = Evolution(MICRO, stops, SMALL, num_classes=10, state=path)
    left = 0
    assert again.run().champions == wanted.champions, "a finished one scores nothing"
    with pytest.raises(ReplivitError, match="seed"):
        Evolution(MICRO, size, SMALL, num_classes=10, seed=5, state=path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"min_macs": 20, "max_macs": 30}, "no network of micro has 20 to 30 M multiply-adds; it"),
        ({"min_macs": 9, "max_macs": 8}, "the budget is empty"),
        ({"population": 0}, "population of at least 1"),
        ({"mutation_probability": 2}, "mutation_probability must be between 0 and 1"),
    ],
)
def test_impossible_searches_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Evolution(MICRO, size, Settings(**{**vars(SMALL), **changes}), num_classes=10)


def test_the_search_by_size_stays_in_its_budgets():
    few = Settings(population=30, mutations=30, crossovers=30, iterations=12, min_macs=189,
                   max_macs=330, bucket=4)  # fmt: skip
    found = find(few, 1, {"a0": 208, "a1": 309})
    for name, target in (("a0", 208), ("a1", 309)):
        assert (target - SLACK) * 1e6 <= macs_of(NASVIT, found[name]) <= target * 1e6
    assert params_of(NASVIT, found["a1"]) > params_of(NASVIT, found["a0"])
    with pytest.raises(ValueError, match="met no network of 398 to 400 M multiply-adds"):
        find(replace(few, iterations=0), 1, {"a2": 400})


@pytest.mark.slow
def test_networks_of_our_search_are_what_it_finds():
    known = named_configs()
    assert find() == {name: known[name] for name in TARGETS}


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One home for all trainings of this file, so that experiments share their runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPLIVIT_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def trained(method: ConflictAware, accumulation: int = 1, **options) -> tuple[Supernet, list[dict]]:
    torch.manual_seed(0)
    net = Supernet(MICRO, 10, 32)
    recipe = {"batch_size": 16, "warmup_epochs": 0, "accumulation": accumulation}
    run = train(net, "fashion_mini", recipe, 0, objective=method, hold_out=9968, quiet=True,
                device="cpu", evaluate=False, **options)  # fmt: skip
    return net, run.history


def test_supernet_trains_and_projection_waits(home, tmp_path):
    """Both recipes of gradients are the same until projection begins."""
    with_it, history = trained(ConflictAware(plain_share=0), epochs=1, out=tmp_path / "a")
    early, _ = trained(ConflictAware(plain_share=0.5), epochs=1, out=tmp_path / "c")
    plain, _ = trained(ConflictAware(projection=False), epochs=1, out=tmp_path / "d")
    assert set(history[0]) >= {"loss", "largest", "smallest", "random1", "random2"}
    weights = [one.classifier.weight for one in (with_it, early, plain)]
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(weights[1], weights[2])
    assert with_it.config == MICRO.largest()
    with pytest.raises(ReplivitError, match="accumulation 1"):
        trained(ConflictAware(), epochs=1, out=tmp_path / "e", accumulation=2)


def test_measuring_conflict_leaves_no_trace():
    torch.manual_seed(0)
    net = Supernet(MICRO, 10, 32).eval()
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = measure_conflict(net, images, labels)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not net.training and all(one.grad is None for one in net.parameters())
    assert net.config == MICRO.largest()
    assert found.attention.any() and not found.attention.all()
    assert (found.projected[~found.exempt] >= -1e-5).all()
    assert found.share == pytest.approx((found.before < 0).mean())
    again = measure_conflict(net, images, labels)
    assert (again.before == found.before).all(), "the same seed compares the same networks"


def test_calibration_makes_subnets_usable():
    """Statistics of the wrong width make a network blind; images set them right."""
    torch.manual_seed(0)
    net = Supernet(MICRO, 2, 32)
    with torch.no_grad():
        for one in net.modules():
            if isinstance(one, torch.nn.BatchNorm2d):
                one.weight.fill_(1)
                one.running_mean.normal_(0, 50)
    images = torch.randn(64, 3, 32, 32)
    judged = SubnetAccuracy(net, [images], [(images, torch.zeros(64, dtype=torch.int64))])
    with torch.no_grad():
        blind = net.set_config(MICRO.smallest()).eval()(images)
        sees = judged.network(MICRO.smallest())(images)
    assert blind.std(0).max() < 0.1 * sees.std(0).max()
    assert 0 <= judged(MICRO.smallest()) <= 100


# ---- experiments ---------------------------------------------------------------------------------


def test_experiments_run(home):
    conflict = harness.run("nasvit/gradient_conflict", scale="tiny")
    assert len(conflict.rows) == 4 and set(conflict.figures) == {"histogram", "curve"}
    for row in conflict.rows:
        assert 0 <= row["conflict_percent"] <= 100
        convolutional = row["trained"].startswith("convolutions")
        assert (row["in_attention_percent"] is None) == convolutional
    assert conflict.findings[2].outcome == "reproduced"
    assert all(one.outcome == "not measured" for one in conflict.findings[:2])

    pareto = harness.run("nasvit/pareto", scale="tiny")
    macs = {row["network"]: row["macs_m"] for row in pareto.rows}
    assert macs["smallest"] == pytest.approx(macs_of(MICRO, MICRO.smallest(), 10) / 1e6, abs=1e-3)
    assert macs["largest"] == max(row["macs_m"] for row in pareto.rows)
    again = harness.run("nasvit/pareto", scale="tiny")
    assert again.rows == pareto.rows

    table = harness.run("nasvit/techniques", scale="tiny")
    assert table.rows[0]["trained"] == "all techniques"
    assert len(table.rows) == 6 and len(table.findings) == 5
    assert len({row["largest_top1"] for row in table.rows}) > 1, "arms differ"
    runs = list((environment.home() / "training" / "nasvit_micro" / "fashion_mini").iterdir())
    assert len(runs) == len(ARMS), "no two arms share a training"


def test_a_search_of_another_size_has_its_own_scores():
    usual, longer = choose_setting("small", {}), choose_setting("small", {"iterations": 5})
    one, two = scores_file(usual, "a" * 64), scores_file(longer, "a" * 64)
    assert one.name == "pareto-aaaaaaaaaaaa.jsonl"
    assert two.name == "pareto-aaaaaaaaaaaa-iterations5.jsonl"
    assert scores_file(choose_setting("small", {"workers": 2}), "a" * 64) == one


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epoch": 1}, "no option 'epoch'; there are space"),
        ({"epochs": 0}, "option epochs must be a whole number from 1 on, not 0"),
        ({"seeds": (1, 1)}, "seeds must be whole numbers that differ"),
        ({"space": "nano"}, "no space 'nano'"),
    ],
)
def test_impossible_experiments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        choose_setting("tiny", options)
    with pytest.raises(ReplivitError, match="no scale 'huge'"):
        choose_setting("huge", {})


def test_findings_follow_the_numbers():
    assert judge("x", [3.0, 3.1, 3.2], [1.0, 1.0, 1.3], "points").outcome == "reproduced"
    other = judge("x", [1.0, 1.0, 1.3], [3.0, 3.1, 3.2], "points")
    assert other.outcome == "deviates" and "other way round" in other.evidence
    assert "no difference" in judge("x", [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], "points").evidence
    assert judge("x", [1.0], [0.0], "points").outcome == "not measured"


def test_recipes_of_the_experiments_are_read():
    """The simplified one hardly regularises; what it replaces does."""
    for setting in experiment_setup.SCALES.values():
        weak, strong = (
            read_recipe(experiment_setup.RECIPES / f"{name}.yaml")
            for name in (setting.recipe, setting.strong_recipe)
        )
        assert weak.weight_decay == 0 < strong.weight_decay
        assert weak.mixup <= 0.01 < strong.mixup and weak.random_erasing < strong.random_erasing


def test_recipe_on_imagenet_is_the_released_one():
    recipe = read_recipe("imagenet", get_variant("nasvit_supernet"))
    assert (recipe.epochs, recipe.batch_size, recipe.warmup_epochs) == (400, 64, 5)
    rates = (recipe.peak_lr, recipe.warmup_lr, recipe.min_lr)  # all follow the batch there
    assert rates == pytest.approx([64 / 512 * one for one in (3e-4, 5e-7, 5e-6)])
    assert (recipe.mixup, recipe.cutmix, recipe.random_erasing) == (0.01, 0.01, 0.01)
    assert recipe.augment == "rand-n1-m1-mstd0.5-inc1" and not recipe.drop_path
    assert recipe.ema_decay == 0.99985 and recipe.ema_final
