"""TF-TAS's experiments, on tiny settings; ranking and pruning by themselves."""

import base64
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.training import TrainedModel
from reproductions.autoformer.space import Config
from reproductions.tf_tas import correlation as correlation_module
from reproductions.tf_tas import experiments as experiments_module
from reproductions.tf_tas.correlation import PROXIES, SIZES, correlation
from reproductions.tf_tas.experiments import pick, search
from reproductions.tf_tas.pruning import PARTS, cut_smallest, pruning
from reproductions.tf_tas.ranking import kendall, partial_kendall, percentile, rank

# ---- ranking -------------------------------------------------------------------------------------


def test_kendall():
    assert kendall([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert kendall([1, 1, 1], [1, 2, 3]) == 0


def test_partial_kendall_takes_the_common_cause_away():
    rng = np.random.default_rng(0)
    size = rng.normal(size=400)
    one, two = (size + 0.5 * rng.normal(size=400) for _ in range(2))
    assert kendall(one, two) > 0.4
    assert abs(partial_kendall(one, two, size)) < 0.08
    assert abs(partial_kendall(np.exp(one), two**3, np.exp(size))) < 0.08  # only orders matter
    own = rng.normal(size=400)  # something that both share beyond size
    assert partial_kendall(one + own, two + own, size) > 0.2
    assert partial_kendall(size, two, size) == 0
    assert partial_kendall(one, two, np.ones(400)) == kendall(one, two)


def test_rank_has_an_interval_and_needs_pairs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    found = rank(x, x + rng.normal(size=60), resamples=200)
    assert found.interval[0] < found.tau < found.interval[1] and found.n == 60
    assert found.interval[1] - found.interval[0] < 0.5
    wide = rank(x[:8], (x + rng.normal(size=60))[:8], resamples=200)
    assert wide.interval[1] - wide.interval[0] > found.interval[1] - found.interval[0]
    assert rank(x, -x, resamples=50).tau == -1
    for left, right in (([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4], [1, 2, 3])):
        with pytest.raises(ValueError, match="at least 4 pairs"):
            rank(left, right)


def test_percentile():
    assert percentile(5, [1, 2, 3, 4]) == 100
    assert percentile(2, [1, 2, 3, 4]) == 37.5


# ---- pruning -------------------------------------------------------------------------------------


def test_only_the_smallest_weights_of_the_part_are_cut():
    torch.manual_seed(0)
    model = harness.build("vit_micro")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    cut = cut_smallest(model, PARTS["MLP"], 0.25)
    after = model.state_dict()
    changed = {name for name, one in after.items() if not torch.equal(one, before[name])}
    assert changed and all(".mlp.fc" in name and name.endswith("weight") for name in changed)
    mlps = [name for name in before if ".mlp.fc" in name and name.endswith("weight")]
    total = sum(before[name].numel() for name in mlps)
    assert cut == sum((after[name] == 0).sum() for name in mlps) == int(0.25 * total)
    gone = torch.cat([before[name][after[name] == 0].abs() for name in mlps])
    kept = torch.cat([after[name][after[name] != 0].abs() for name in mlps])
    assert gone.max() <= kept.min()


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_is_a_fraction(fraction):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        cut_smallest(nn.Linear(2, 2), {"mlp"}, fraction)


def test_pruning_experiment():
    result = pruning("tiny", fractions=(0.95,), limit=100)
    by_part = {(row["part"], row["fraction"]): row for row in result.rows}
    assert by_part["MLP", 0.95]["lost"] > 20  # nearly nothing is left of the MLPs
    assert "pruning" in result.figures and result.findings[0].outcome in ("reproduced", "deviates")


# ---- search and correlation ----------------------------------------------------------------------


def test_search_experiment(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLIVIT_HOME", str(tmp_path))
    result = search("tiny", population=8, free=6)
    window = [row for row in result.rows if row["what"] == "window"]
    assert len(window) == 8 and all(0.2e6 <= row["params"] <= 0.25e6 for row in window)
    best = max(row["dss"] for row in window)
    assert {row["percentile"] for row in window if row["dss"] == best} == {93.8}
    assert result.findings[0].outcome == "reproduced"
    assert "CPU seconds" in result.findings[0].evidence
    assert len(list((tmp_path / "searches" / "tf_tas").glob("*.jsonl"))) == 2
    again = search("tiny", population=8, free=6)  # read back, not scored again
    assert [row["dss"] for row in again.rows] == [row["dss"] for row in result.rows]


def test_correlation_experiment(monkeypatch, tmp_path):
    """Training is replaced: a subnet's "accuracy" is its number of heads plus a trace of noise."""
    trained = []

    def pretend(model, track, seed, **options) -> TrainedModel:
        trained.append(model)
        assert track == "fashion_mini" and options["epochs"] == 1
        return type("Run", (), {"value": lambda self, metric: heads_of(model.config)})()

    def heads_of(config: Config) -> float:
        return sum(config.num_heads) + 0.01 * len(trained)

    monkeypatch.setattr(correlation_module, "train", pretend)
    result = correlation("tiny", subnets=6, equal=4, batch=4, resamples=50)
    proxies = {row["name"]: row for row in result.rows if row["what"] == "proxy"}
    groups = {name: [row for row in result.rows if row["what"] == f"subnet ({name})"]
              for name in ("space", "equal")}  # fmt: skip
    assert set(proxies) == {*SIZES, *PROXIES}
    assert len(groups["space"]) == 6 and len(groups["equal"]) == 4 and len(trained) == 10
    assert all(0.225e6 <= row["params"] <= 0.235e6 for row in groups["equal"])
    for name in PROXIES:
        for group, column in (("space", "tau"), ("equal", "tau_equal")):
            scores = [row["detail"][name] for row in groups[group]]
            wanted = kendall(scores, [row["top1"] for row in groups[group]])
            assert proxies[name][column] == pytest.approx(wanted, abs=1e-3)
        low, high = proxies[name]["detail"]["tau"]
        assert -1 <= low <= high <= 1
    assert proxies["params"]["tau_fixed_size"] is None
    assert proxies["dss_shipped"]["tau_equal"] is not None
    assert all(set(row) == set(result.rows[0]) for row in result.rows)
    assert [one["value"] for one in result.published][:1] == [0.65]
    assert len(result.findings) == 3 and "correlation" in result.figures


class Pretended:
    """A finished training: a subnet with as many right answers as it is told."""

    def __init__(self, model: nn.Module, right: int) -> None:
        bits = np.arange(100) < right
        packed = base64.b64encode(np.packbits(bits).tobytes()).decode()
        detail = {"bits": packed, "n": 100}
        self.model, self.top1 = model, float(right)
        self.records = [SimpleNamespace(metric="top1", detail=detail, variant="x")]

    def value(self, metric: str) -> float:
        return self.top1 if metric == "top1" else 1.0


@pytest.mark.parametrize(("own", "outcome"), [(90, "reproduced"), (40, "deviates")])
def test_pick_experiment(monkeypatch, own, outcome):
    asked = []

    def pretend(name, track, *, seed, options, **rest) -> Pretended:
        asked.append((name, seed, bool(options)))
        right = {"tf_tas_micro": own, "autoformer_micro": 80, "vit_micro": 70}[name]
        right = 60 if options else right
        return Pretended(harness.build(name, **options), right + seed)

    monkeypatch.setattr(experiments_module, "train", pretend)
    result = pick("tiny", population=20, seeds=(0, 1), controls=True)
    repeatable, duel, control = result.findings
    assert duel.outcome == control.outcome == outcome
    assert "20:" in repeatable.evidence
    assert [row["what"] for row in result.rows][-2:] == ["random subnet"] * 2
    assert asked[:2] == [("tf_tas_micro", 0, False), ("tf_tas_micro", 1, False)]
    configs = [row["config"] for row in result.rows if row["what"] == "random subnet"]
    assert len(set(configs)) == 2 and all(row["params"] <= 258_600 for row in result.rows[-2:])


def test_unknown_scales_and_options():
    with pytest.raises(ReplivitError, match="no scale 'huge'; there are tiny, small, paper"):
        correlation("huge")
    with pytest.raises(ReplivitError, match=r"no option 'epoch'; there are .*epochs"):
        correlation("tiny", epoch=3)


def test_every_experiment_of_the_paper_can_be_found():
    paper = harness.get_paper("tf_tas")
    assert set(paper.facts.experiments) == {"correlation", "search", "pick", "pruning"}
    for spec in paper.facts.experiments.values():
        assert callable(paper.resolve(spec.run))
