"""ATS's experiments: what they say follows from what they count."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import harness
from harness import ReplivitError
from harness.effect import choose_setting, trained_parent
from harness.meta import on_meta
from reproductions.ats import adaptive_cost, effect_experiment, sampling_experiment
from reproductions.ats.conventions import dense_macs, macs_of_counts, tokens_in_blocks
from reproductions.ats.sampling import sampled
from reproductions.ats.start import with_trained_weights


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("REPLIVIT_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return with_trained_weights("ats_micro", "fashion_mini")[0]


def test_adaptive_cost_adds_up():
    result = adaptive_cost.adaptive_cost("tiny")
    rows = {(row["what"], row["quantity"]): row for row in result.rows}
    dense = rows["dense parent", "MACs (M)"]["mean"]
    means = [rows[f"limit {limit}%", "MACs (M)"]["mean"] for limit in (25, 50, 75, 100)]
    assert means == sorted(means) and means[-1] < dense == pytest.approx(19.4164, abs=1e-3)
    release = [row["mean"] for what, row in rows.items() if what[0].startswith("release, batch")]
    assert len(release) == 3 and release == sorted(release) and release[0] < release[-1]
    largest = rows["release, batch 24, paper's rule", "MACs (M)"]
    assert largest["p5"] == largest["p95"] == largest["mean"]  # all cost what the longest does
    left = rows["limit 50%", "patches left at the end"]
    assert 1 <= left["p5"] < left["p95"] <= 32
    outcomes = {finding.claim: finding for finding in result.findings}
    assert outcomes["The number of tokens adapts to the image"].outcome == "reproduced"
    (printed,) = (one for one in result.findings if "off the shelf" in one.claim)
    assert printed.outcome == "not measured" and "trained on ImageNet" in printed.evidence
    assert {row["value"] for row in result.published} == {2.9, 3.4}
    titles = [axes.get_title() for axes in result.figures["adaptive_cost"].axes]
    assert titles == [
        "Tokens per image", "Multiply-adds per image", "The same images", "Latency per image"
    ]  # fmt: skip


def test_the_complaint_is_judged_by_the_counts(model):
    """The batch explains the gap only if its effect is as large, and no other cause is."""
    depth = len(model.blocks)
    few, many = np.full((2, depth + 1), 40), np.full((2, depth + 1), 60)
    whole = dense_macs(model)
    claims = [
        adaptive_cost._complaint(model, {1.0: few}, {1: few, 8: large}, whole).outcome
        for large in (few, many)
    ]
    assert claims == ["deviates", "reproduced"]
    other = adaptive_cost._complaint(model, {1.0: few}, {1: many, 8: many}, whole)
    assert other.outcome == "deviates"


def test_the_batch_of_the_release_is_judged_by_the_counts(model):
    few, many = np.full((2, 7), 40), np.full((2, 7), 60)
    assert adaptive_cost._batch_decides(model, {1: few, 8: few}).outcome == "reproduced"
    assert adaptive_cost._batch_decides(model, {1: few, 8: many}).outcome == "deviates"


def test_a_formula_that_is_wrong_stops_the_experiment(model):
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(ReplivitError, match="the counter sees"):
        adaptive_cost._check_formula(model, images, np.full((2, 7), 65))


def test_share_that_every_stage_keeps():
    with on_meta():
        reference = harness.build("ats_deit_s")
    assert adaptive_cost.keep_for(reference, 1e12) == 1
    keep = adaptive_cost.keep_for(reference, 2.9e9)
    stages = np.array([0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    counts = 1 + 196 * keep**stages
    assert macs_of_counts(reference, counts, released=True) == pytest.approx(2.9e9, rel=1e-6)


def test_tokens_in_blocks_counts_the_prefix_and_every_image(model):
    kept = [
        torch.tensor([[0, 1, 2], [5, -1, -1]]),
        torch.tensor([[0, 1], [5, -1]]),
        torch.tensor([[0, 1], [5, -1]]),
        torch.tensor([[0], [5]]),
    ]
    counts = tokens_in_blocks(model, kept)
    assert counts.tolist() == [[65, 65, 65, 4, 3, 3, 2], [65, 65, 65, 2, 2, 2, 2]]


def test_sampling_says_that_peaked_keeps_few():
    result = sampling_experiment.sampling("tiny")
    kept = [row["tokens kept"] for row in result.rows]
    assert kept == sorted(kept) and kept[0] < kept[-1] <= 32
    assert [finding.outcome for finding in result.findings] == ["reproduced", "reproduced"]
    effective = [row["effective number of tokens"] for row in result.rows]
    assert effective == sorted(effective) and 1 <= effective[0] < effective[-1] <= 64
    panels = [axes for part in result.figures["sampling"].subfigs for axes in part.axes]
    few, most = (int(panels[place].get_title().split()[0]) for place in (1, 4))
    assert few < most <= 32


@torch.inference_mode()
def test_first_stage_sees_what_the_model_sees(model):
    """Its scores give the choice that the whole model makes."""
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits, values = sampling_experiment.first_stage(model, images)
    hit = sampled(sampling_experiment.scores_of(model, logits, values), model.ats.limits[2])
    _, kept = model.forward_with_tokens(images)
    for own, row in zip(hit, kept[0], strict=True):
        assert own.nonzero()[:, 0].tolist() == row[row >= 0].tolist()


def test_effect_compares_with_and_without_training():
    result = effect_experiment.effect_on_images(
        "tiny", topk_tokens=[30, 25, 22, 19], train_images=128, test_images=50, cost_images=1,
        seconds=0,
    )  # fmt: skip
    arms = [next(iter(row.values())) for row in result.rows]
    for name in ("ATS", "ATS, no training", "top-k", "top-k, no training"):
        assert name in arms
    assert len(result.findings) >= len(effect_experiment.CLAIMS)
    assert {"kept", "kept_by_topk"} <= set(result.figures)
    assert all("ATS" in row["model"] for row in result.published)


def test_rival_keeps_as_many_on_average():
    model, _ = with_trained_weights("ats_micro", "fashion_mini", tokens=0.5)
    limits = effect_experiment.average_tokens(model, "fashion_mini", images=40)
    assert len(limits) == 4 and limits == sorted(limits, reverse=True)
    assert 32 >= limits[0] > limits[-1] > 8


def test_where_no_weights_ship_the_parent_of_the_run_is_looked_at(monkeypatch):
    nothing = SimpleNamespace(weights_file=lambda track: None)
    monkeypatch.setattr(effect_experiment, "get_variant", lambda name: nothing)
    setting = choose_setting("tiny", {"train_images": 128, "test_images": 50})
    model = effect_experiment._trained("ats_micro", 0.5, setting)
    parent = trained_parent(setting, 0).model.state_dict()
    own = model.state_dict()
    assert set(parent) <= set(own) and all(torch.equal(own[name], parent[name]) for name in parent)
    assert not model.training and len(effect_experiment.average_tokens(model, "fashion_mini")) == 4


@pytest.mark.parametrize("name", ["adaptive_cost", "sampling", "effect"])
def test_unknown_scale(name):
    with pytest.raises(ReplivitError, match="no scale 'huge'"):
        harness.run(f"ats/{name}", scale="huge")


def test_weights_that_are_not_there():
    with pytest.raises(ReplivitError, match="neither ats_deit_s nor deit_s ships weights"):
        with_trained_weights("ats_deit_s", "imagenet")
