"""AutoFormer's supernets in training, their subnets' inherited accuracy, the experiments."""

from __future__ import annotations

import random

import pytest
import torch

import harness
from harness.errors import ReplivitError
from harness.evolution import Workers
from harness.training import train
from reproductions.autoformer import experiment_setup
from reproductions.autoformer.counting import params_of
from reproductions.autoformer.experiment_setup import Bench, choose_setting
from reproductions.autoformer.fitness import InheritedAccuracy
from reproductions.autoformer.sharing import ClassicalSupernet
from reproductions.autoformer.space import MICRO, Config
from reproductions.autoformer.supernet import Supernet
from reproductions.autoformer.training import OneSubnetPerStep, objective


def count_micro(config: Config) -> int:
    return params_of(MICRO, config, 10, 32)


# ---- inherited accuracy --------------------------------------------------------------------------


@pytest.fixture
def micro():
    torch.manual_seed(0)
    images = torch.randn(40, 3, 32, 32)
    return Supernet(MICRO, 10, 32).eval(), [(images, torch.arange(40) % 10)]


def test_inherited_accuracy_is_the_extracted_networks(micro):
    net, batches = micro
    images, labels = batches[0]
    accuracy, rng = InheritedAccuracy(net, batches), random.Random(0)
    configs = [MICRO.sample(rng) for _ in range(3)]
    values = list(Workers(accuracy)([*configs, configs[0]]))
    with torch.no_grad():
        expected = [
            100 * float((net.extract(one)(images).argmax(1) == labels).float().mean())
            for one in configs
        ]
    assert values == pytest.approx([*expected, expected[0]])


def test_workers_give_the_same_scores(micro):
    net, batches = micro
    rng = random.Random(0)
    configs = [MICRO.sample(rng) for _ in range(4)]
    accuracy = InheritedAccuracy(net, batches)
    with Workers(accuracy, 1) as fitness:
        assert list(fitness(configs)) == [accuracy(one) for one in configs]


# ---- training ------------------------------------------------------------------------------------


def few(epochs: int, model, out, objective_, **options):
    return train(
        model, "fashion_mini", {"batch_size": 32}, objective=objective_, hold_out=10_000 - 96,
        epochs=epochs, out=out, evaluate=False, quiet=True, device="cpu", **options,
    )  # fmt: skip


class Noting(OneSubnetPerStep):
    """Keeps the configurations of all steps."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self._seen = []

    def loss(self, model, images, targets, context):
        loss = super().loss(model, images, targets, context)
        self._seen.append(context.model.config)
        return loss


def test_one_random_subnet_per_step(tmp_path):
    torch.manual_seed(0)
    net = Supernet(MICRO, 10, 32)
    before = {key: one.clone() for key, one in net.state_dict().items()}
    noting = Noting(faithful_to_release=True)
    few(2, net, tmp_path / "run", noting)
    drawn = []
    for epoch in range(2):
        rng = random.Random(epoch)
        drawn += [MICRO.sample(rng) for _ in range(3)]
    assert noting._seen == drawn, "the released sequence restarts with the epoch's number"
    assert net.config == MICRO.full(), "and the supernet stands where it stood"
    moved = [key for key, one in net.state_dict().items() if not torch.equal(one, before[key])]
    assert "blocks.0.attn.qkv.weight" in moved and "head.weight" in moved
    deepest = max(one.depth for one in drawn)
    assert any(key.startswith(f"blocks.{deepest - 1}.") for key in moved)
    assert not any(key.startswith(f"blocks.{deepest}.") for key in moved)


def test_draws_do_not_depend_on_where_a_run_was_resumed():
    class Place:
        seed, epoch, step = 5, 1, 0
        model = Supernet.__new__(Supernet)

    object.__setattr__(Place.model, "space", MICRO)
    straight, resumed, place = OneSubnetPerStep(), OneSubnetPerStep(), Place()
    draws = []
    for step in range(4):
        place.step = step
        draws.append(straight.draw(place))
        assert straight.draw(place) == draws[-1], "a second pass of a step sees the same subnet"
    place.step = 3
    assert resumed.draw(place) == draws[3] and len(set(draws)) == 4
    place.seed = 6
    assert OneSubnetPerStep().draw(place) != draws[3]


def test_objective_wants_a_supernet(tmp_path):
    with pytest.raises(ReplivitError, match="is no supernet"):
        train("vit_micro", "fashion_mini", objective=OneSubnetPerStep(), out=tmp_path, quiet=True)
    with pytest.raises(ReplivitError, match="trains from scratch"):
        objective(weights="file")
    hook = harness.get_variant("autoformer_supernet_t").hook("objective")
    assert isinstance(hook(), OneSubnetPerStep)


def test_classical_sharing_has_a_set_for_each_candidate():
    torch.manual_seed(0)
    net, images = ClassicalSupernet(MICRO, 10, 32).eval(), torch.randn(2, 3, 32, 32)
    one = Config(5, 48, (2,) * 5, (2,) * 5)
    two = Config(5, 48, (2.5,) * 5, (2,) * 5)
    with torch.no_grad():
        for config in (one, two):
            dense = net.set_config(config).extract()
            torch.testing.assert_close(dense(images), net(images))
            assert sum(p.numel() for p in dense.parameters()) == count_micro(config)
    net.train().set_config(one)
    net(images).sum().backward()
    with_gradient = {key for key, p in net.named_parameters() if p.grad is not None}
    blocks = {key.split(".")[1:3][1] for key in with_gradient if key.startswith("layers.")}
    assert blocks == {"48_2_2"} and len(with_gradient) < len(list(net.parameters())) / 20
    with pytest.raises(ValueError, match=r"mlp_ratio 3\.5 is outside AutoFormer-micro"):
        net.set_config(Config(5, 48, (3.5,) * 5, (2,) * 5))


# ---- experiments ---------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLIVIT_HOME", str(tmp_path))
    return tmp_path


TINY = {"train_images": 128, "test_images": 100, "search_images": 50}


def test_evolution_experiment_runs_and_is_taken_up_again(home):
    result = harness.run("autoformer/evolution", scale="tiny", **TINY)
    assert [row["what"] for row in result.rows] == [
        "evolution, inherited", "random, inherited", "found, trained alone", "vit_micro",
    ]  # fmt: skip
    assert result.rows[0]["evaluations"] == result.rows[1]["evaluations"] == 12
    assert all(0.235e6 <= row["params"] <= 0.2586e6 for row in result.rows[:3])
    assert len(result.findings) == 4 and {one.stem for one in result.figure_files} == {
        "trace", "architecture",
    }  # fmt: skip
    traces = result.record.detail["traces"]
    assert [len(traces[name][0]) for name in ("evolution", "random")] == [12, 12]
    again = harness.run("autoformer/evolution", scale="tiny", **TINY)
    same = ("what", "top1_search", "top1_test", "config")
    assert [[row[key] for key in same] for row in again.rows] == [
        [row[key] for key in same] for row in result.rows
    ]
    assert len(list(home.glob("searches/**/*.jsonl"))) == 2


def test_entanglement_experiment_runs(home):
    result = harness.run("autoformer/entanglement", scale="tiny", **TINY)
    assert [(row["sharing"], row["subnet"]) for row in result.rows] == [
        (sharing, number) for sharing in ("entangled", "classical") for number in range(3)
    ]
    assert [row["alone"] is not None for row in result.rows] == [True, False, False] * 2
    assert len(result.findings) == 3 and len(result.published) >= 8
    assert {one.name for one in result.figure_files} == {"inherited.svg", "inherited.png"}


@pytest.mark.parametrize(("options", "message"), [
    ({"scale": "huge"}, "no scale 'huge'; there are tiny, small, paper"),
    ({"scale": "tiny", "width": 3}, "no option 'width'; there are space"),
    ({"scale": "tiny", "seeds": "0,x"}, "seeds must be whole numbers that differ, not '0,x'"),
    ({"scale": "tiny", "min_params": 1.0}, "window is empty"),
    ({"scale": "tiny", "rule": "mine"}, "no rule 'mine'; there are released, paper"),
    ({"scale": "tiny", "space": "x"}, "no search space 'x'"),
])  # fmt: skip
def test_wrong_options_of_the_experiments(options, message):
    options = dict(options)
    with pytest.raises(ValueError, match=message):
        choose_setting(options.pop("scale"), options)


@pytest.mark.parametrize(("space", "said"), [("micro", {}), ("b", {}), ("b8", {"space": "b8"})])
def test_supernets_of_equal_weights_and_other_draws_are_other_runs(monkeypatch, space, said):
    told = []
    monkeypatch.setattr(
        experiment_setup, "train", lambda *_, **given: told.append(given["options"])
    )
    bench = Bench(choose_setting("tiny", {"space": space}))
    bench._train(None, "autoformer_entangled", 0, None)
    assert told == [said]
