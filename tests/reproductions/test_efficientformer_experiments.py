"""The experiments' plumbing and verdicts, on timings and trainings that cost nothing."""

import types
from dataclasses import replace

import numpy as np
import pytest
import torch

import harness
from harness.measurement.latency import Effort, Timing, time_callables
from harness.training import read_recipe
from harness.training.optim import Schedule
from reproductions.efficientformer import experiments, slimming_experiment
from reproductions.efficientformer.supernet import SuperNet

RESULT = time_callables(
    {"a": lambda: None, "b": lambda: None},
    effort=Effort(budget_s=0.01, min_rounds=2, max_rounds=2, palindromes=1, warm_up_s=1e-3),
)["b"]


def timing(ratio: float, half_width: float = 0.01) -> Timing:
    return replace(
        RESULT, ratio=ratio, ratio_interval=(ratio - half_width, ratio + half_width),
        ratio_status="ok",
    )  # fmt: skip


@pytest.fixture
def fake_timer(monkeypatch):
    """Replaces the instrument; the test says how many times slower each operator is."""
    slowness: dict[str, float] = {}

    def fake(calls, **options):
        for call in calls.values():
            call()  # every operator really runs once
        return {name: timing(slowness.get(name, 1.0)) for name in calls}

    monkeypatch.setattr(experiments, "time_calls", fake)
    return slowness


@pytest.mark.parametrize(
    "ratio,half_width,outcome,words",
    [
        (1.5, 0.1, "reproduced", "1.50 times the time [1.40, 1.60]"),
        (0.8, 0.1, "deviates", "0.80 times"),
        (1.05, 0.1, "deviates", "no difference detected"),
    ],
)
def test_verdict_follows_the_interval(ratio, half_width, outcome, words):
    finding = experiments.slower("a claim", timing(ratio, half_width))
    assert finding.outcome == outcome and words in finding.evidence
    assert ("no difference" in finding.evidence) == ("no difference" in words)


def test_operator_latency(fake_timer):
    fake_timer.update({"HardSwish": 3.0, "in every block": 0.5})
    result = experiments.operator_latency(width=16, side=4)
    rows = {(row["question"], row["operator"]): row for row in result.rows}
    assert len(rows) == len(result.rows) == 13
    tokens, maps = (
        rows["MLP at equal MACs", name]["MACs (M)"]
        for name in ("3D: LN, linear", "4D: 1x1 convolution, folded BN")
    )
    assert tokens == maps == round(2 * 4 * 16 * 16 * 16 / 1e6, 2)
    outcomes = {finding.claim: finding.outcome for finding in result.findings}
    assert len(outcomes) == len(experiments.CLAIMS)
    assert outcomes["HardSwish is slower than GELU"] == "reproduced"
    assert outcomes["Reshaping in every block is slower than reshaping once"] == "deviates"
    assert set(result.figures) == {"operators"}


def test_ablation(fake_timer):
    fake_timer.update({"L1, deployed": 0.7})
    result = experiments.ablation(image_size=32)
    rows = {row["model"]: row for row in result.rows}
    assert rows["L1"]["params"] == 12_289_928 - 8 * (49 - 1)  # a bias table for one token
    assert rows["pooling -> identity"]["params"] == rows["L1"]["params"]
    more = rows["pooling -> depthwise 3x3"]["params"] - rows["L1"]["params"]
    assert more == 10 * (3 * 48 + 2 * 96 + 6 * 224 + 3 * 448)  # 3x3 weights and a bias per channel
    assert rows["one head"]["params"] == rows["L1"]["params"] - 449_000
    assert rows["L1, deployed"]["x L1"] == 0.7
    outcomes = {finding.claim: finding for finding in result.findings}
    assert outcomes["Folding batch norms makes the network faster"].outcome == "reproduced"
    assert outcomes["HardSwish instead of GELU slows the network down"].outcome == "deviates"
    published = [one for claim, one in outcomes.items() if " has " in claim]
    assert len(published) == 6 and all(one.outcome == "reproduced" for one in published)


def test_unknown_scale_and_option_are_sentences():
    with pytest.raises(harness.ReplivitError, match="no scale 'huge'"):
        experiments.operator_latency("huge")
    with pytest.raises(harness.ReplivitError, match="no scale 'huge'"):
        slimming_experiment.slimming("huge")
    with pytest.raises(harness.ReplivitError, match="no option 'epoch'"):
        slimming_experiment.slimming("tiny", epoch=3)
    with pytest.raises(harness.ReplivitError, match="between 0 and 1"):
        slimming_experiment.slimming("tiny", target=1.5)


def test_experiments_are_declared():
    names = {one.name.partition("/")[2] for one in harness.experiments("efficientformer")}
    assert names == {"operator_latency", "ablation", "slimming"}
    for one in harness.experiments("efficientformer"):
        assert callable(one.paper.resolve(one.spec.run))


# ---- slimming ------------------------------------------------------------------------------------


@pytest.fixture
def fake_training(monkeypatch):
    """Trains nothing: the more parameters, the more of 400 test images are right."""
    seen = []

    def fake(model, track, recipe, seed, **options):
        seen.append((options["name"], type(model), options["epochs"], seed))
        right = min(sum(one.numel() for one in model.parameters()) // 300 + seed, 400)
        bits = np.arange(400) < right
        from harness.evaluation import _record  # the record as evaluation writes it

        record = _record(
            "x", "top1", bits, harness.Conditions(), {}, dict(run_id="r", duration_s=0.0)
        )
        return types.SimpleNamespace(
            model=model, records=[record], value=lambda metric: record.value
        )

    monkeypatch.setattr(harness, "train", fake)
    return seen


def test_slimming_from_end_to_end(fake_training):
    result = slimming_experiment.slimming(
        "tiny", target=0.7, batch_size=1, table_s=0.2, score_images=60, recalibration_images=40,
        seeds=(0, 1, 2),
    )  # fmt: skip
    rows = {row["network"]: row for row in result.rows}
    assert list(rows) == ["largest", "greedy", "random actions", "uniform width"]
    goal = 0.7 * rows["largest"]["table (ms)"]
    for name in ("greedy", "random actions", "uniform width"):
        assert rows[name]["table (ms)"] <= goal + 1e-3
        assert rows[name]["seeds"] == 3 and rows[name]["std"] is not None
        assert rows[name]["params (M)"] < rows["largest"]["params (M)"]
    assert rows["largest"]["top-1 from scratch (%)"] is None
    assert fake_training[0][:2] == ("efficientformer_supernet", SuperNet)
    assert [one[0] for one in fake_training].count("efficientformer_slimmed") == 9
    gap = rows["greedy"]["top-1 from scratch (%)"] - rows["uniform width"]["top-1 from scratch (%)"]
    finding = result.findings[0]
    assert f"{gap:+.2f} points" in finding.evidence and "3 seeds" in finding.evidence
    assert (finding.outcome == "reproduced") == (gap > 0)


def test_one_seed_is_compared_image_by_image(fake_training):
    def run(right: int):
        record = harness.train(
            torch.nn.Linear(300 * right, 1, bias=False), "t", None, 0, name="", epochs=1
        )
        return [record]

    better = slimming_experiment._better("a", "b", {"a": run(390), "b": run(300)})
    assert better.outcome == "reproduced" and "400 test images, one seed" in better.evidence
    tie = slimming_experiment._better("a", "b", {"a": run(301), "b": run(300)})
    assert tie.outcome == "deviates" and "no difference detected" in tie.evidence


def test_held_out_images_are_disjoint_and_unaugmented():
    setting = replace(
        slimming_experiment.SETTINGS["tiny"], score_images=30, recalibration_images=20
    )
    images, labels, others = slimming_experiment.held_out_images(setting, None)
    again = slimming_experiment.held_out_images(setting, None)[0]
    assert images.shape == (30, 3, 32, 32) and others.shape == (20, 3, 32, 32)
    assert len(labels.unique()) == 10
    assert torch.equal(images, again)
    distances = torch.cdist(images.flatten(1), others.flatten(1))
    assert float(distances.min()) > 0
    with pytest.raises(harness.ReplivitError, match="20020 of 10,000 images cannot be held out"):
        slimming_experiment.held_out_images(replace(setting, score_images=20000), None)


# ---- the recipe ----------------------------------------------------------------------------------


def test_recipe_is_the_official_one():
    from golden_tools import load_golden

    recipe = read_recipe("imagenet", harness.get_variant("efficientformer_l1"))
    cases = load_golden("efficientformer/training")["cases"]
    case = next(one for one in cases if one["fn"] == "lr_schedule")
    assert recipe.epochs == case["in"]["epochs"]
    assert recipe.batch_size == case["in"]["batch_per_gpu"] * case["in"]["gpus"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.peak_lr)
    schedule = Schedule(optimizer, recipe, 2)
    used = {}
    for epoch in range(recipe.epochs):
        schedule.set(epoch, 1)
        used[str(epoch)] = optimizer.param_groups[0]["lr"]
    expected = case["expected"]
    assert recipe.peak_lr == expected["base_lr"]
    for epoch, rate in expected["lr_used_in_epoch"].items():
        assert used[epoch] == pytest.approx(rate, rel=1e-6), epoch
    assert sum(used.values()) == pytest.approx(expected["lr_sum_over_epochs"], rel=1e-6)
    assert (recipe.weight_decay, recipe.clip, recipe.clip_value) == (0.025, "agc", 0.01)
    assert (recipe.distillation, recipe.distillation_alpha) == ("hard", 0.5)
