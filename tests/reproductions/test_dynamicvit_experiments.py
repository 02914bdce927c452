"""DynamicViT's experiments: the counts of every printed row, the words, and that they run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import harness
from harness.effect import CONTROL, PARENT, SCALES, Arm, arm_recipe
from harness.errors import ReplivitError
from harness.measurement.macs import count_macs
from reproductions.dynamicvit import adaptive_cost as adaptive
from reproductions.dynamicvit import experiments, recount
from reproductions.dynamicvit import length_experiment as length
from reproductions.dynamicvit.effect_experiment import CLAIMS, arms

# printed counts


@pytest.mark.parametrize(
    ("variant", "options", "gmacs"),
    [
        ("dynamicvit_deit_ti_k07", {}, 0.805),
        ("dynamicvit_deit_ti_k07", {"keep_ratio": 0.5}, 0.604),
        ("dynamicvit_deit_s_k07", {}, 2.988),
        ("dynamicvit_lvvit_s_k07", {}, 4.664),
        ("dynamicvit_lvvit_s_k07", {"pruning_loc": []}, 6.569),
    ],
)
def test_paper_rule_gives_the_authors_counts(variant, options, gmacs):
    """Numbers of the authors' `calc_flops.py`, in G."""
    _, macs = recount._count(recount.Model(variant, options=options))
    assert macs / 1e9 == pytest.approx(gmacs, abs=6e-4)


@pytest.fixture(scope="module")
def printed():
    """All printed rows of models up to about 5 GMACs; larger ones are the experiment's."""
    real = recount._count
    with pytest.MonkeyPatch.context() as patch:
        known = {"deit_ti", "deit_s", "dynamicvit_deit_s_k07", "dynamicvit_deit_256_k07"}

        def count(model):
            if model.variant in known and not model.image_size:
                return real(model)
            return 1_000_000, 1_000_000_000

        patch.setattr(recount, "_count", count)
        return recount.recount_printed()


def test_every_printed_count_of_a_known_model_is_recounted(printed):
    names = {(one.name, one.metric) for one in printed}
    assert {("DynamicViT-DeiT-S/0.7", "macs_g"), ("DeiT-S", "params_m"), ("LV-ViT-M", "macs_g"),
            ("DynamicViT-S-384/0.7", "macs_g"), ("DynamicViT-B/0.7", "macs_g"),
            ("DynamicCNN-T/0.7", "macs_g"), ("DynamicSwin-T/0.7", "macs_g")} <= names  # fmt: skip
    assert len(printed) == len({(one.name, one.metric, one.printed) for one in printed})
    assert not any("PVT" in name for name, _ in names), "other papers' models are not ours to count"


def test_recount_reproduces_the_printed_numbers(printed):
    findings = {(one.name, one.metric, one.printed): one.finding for one in printed}
    for name, metric, value in (
        ("DeiT-S", "macs_g", 4.6), ("DeiT-S", "params_m", 22.1),
        ("DynamicViT-DeiT-S/0.7", "macs_g", 2.9),
    ):  # fmt: skip
        finding = findings[name, metric, value]
        assert finding.outcome == "reproduced", finding
        assert name in finding.claim and "by the paper's rule" in finding.evidence
    # the stand-in count of 1 G for the large ones must not pass for 8.5 G
    wrong = findings["DynamicViT-LV-ViT-M/0.7", "macs_g", 8.5]
    assert wrong.outcome == "deviates" and "-88.2%" in wrong.evidence


# speed


def made_row(keep: str, low: float, high: float, **changes) -> dict:
    row = {
        "base": "deit_s", "keep": keep, "batch": 8, "MACs (G)": 3.0, "by the paper (G)": 3.0,
        "MACs ratio": 1.54, "time (ms)": 10.0, "speed-up": (low + high) / 2, "low": low,
        "high": high, "timing": "ok",
    }  # fmt: skip
    return {**row, **changes}


@pytest.mark.parametrize(
    ("keep", "low", "high", "outcome"),
    [
        ("0.7", 1.45, 1.55, "reproduced"),
        ("0.7", 1.35, 1.50, "deviates"),
        ("0.9", 1.01, 1.05, "reproduced"),
        ("0.9", 0.99, 1.05, "deviates"),
    ],
)
def test_speed_is_judged_by_its_interval(keep, low, high, outcome):
    (finding,) = experiments._speed_findings([made_row(keep, low, high)])
    assert finding.outcome == outcome
    assert f"[{low:.2f}, {high:.2f}]" in finding.evidence and "1.54" in finding.evidence


def test_disturbed_timings_say_so():
    (finding,) = experiments._speed_findings([made_row("0.7", 1.5, 1.6, timing="contended")])
    assert finding.evidence.endswith("; contended")
    assert experiments._speed_findings([made_row("0.5", 1.5, 1.6), made_row("dense", 1, 1)]) == []


def test_published_speed_is_relative_to_the_dense_parent():
    rows = {row["model"]: row for row in experiments._published_speed()}
    assert rows["DeiT-S"]["speed-up"] == 1
    assert rows["DynamicViT-DeiT-S/0.7"]["speed-up"] == round(2062.1 / 1337.7, 3) == 1.542
    assert rows["DynamicViT-LV-ViT-M/0.7"]["speed-up"] == round(888.2 / 589.5, 3)


def test_keep_ratio_runs(own_home):
    result = harness.run("dynamicvit/keep_ratio", scale="tiny", ratios=(0.7, 0.5), seconds=0.2)
    assert [row["keep"] for row in result.rows] == ["dense", "0.7", "0.5"]
    dense, first, second = result.rows
    torch.manual_seed(0)
    parent = count_macs(harness.build("deit_ti"), 224).total
    assert dense["MACs (G)"] == round(parent / 1e9, 3) and dense["speed-up"] == 1
    assert 1.5 < first["MACs ratio"] < second["MACs ratio"] < 2.2
    assert second["low"] > 1, "half of the tokens gone cannot be slower than all of them"
    assert first["low"] <= first["speed-up"] <= first["high"]
    assert [path.name for path in result.figure_files] == ["keep_ratio.svg", "keep_ratio.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "huge"}, "no scale 'huge'"),
        ({"bases": ["vgg"]}, "no base 'vgg'; known: deit_ti"),
        ({"bases": "vgg"}, "no base 'vgg'; known: deit_ti"),
        ({"base": "deit_ti"}, "takes no option 'base'; it takes: bases, batch_sizes, ratios"),
        ({"batch_sizes": "eight"}, "option batch_sizes must be a whole number, not 'eight'"),
    ],
)
def test_keep_ratio_refuses(options, message):
    with pytest.raises(ReplivitError, match=message):
        harness.run("dynamicvit/keep_ratio", **options)


# adaptive cost


@pytest.fixture(scope="module")
def adaptive_result(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPLIVIT_HOME", str(tmp_path_factory.mktemp("adaptive")))
        return adaptive.adaptive_cost("tiny", images=6, repeats=3)


def test_adaptive_cost_is_for_variants_of_this_paper():
    with pytest.raises(ReplivitError, match="vit_micro is no variant of DynamicViT"):
        adaptive.adaptive_cost("tiny", variant="vit_micro")


def test_cost_is_the_same_for_every_image(adaptive_result):
    rows = {(row["model"], row["quantity"]): row for row in adaptive_result.rows}
    own = rows["dynamicvit_micro", "MACs (M)"]
    assert own["mean"] == own["p5"] == own["p95"] and own["n"] == 6
    counted = count_macs(harness.build("dynamicvit_micro"), 32).total
    assert own["mean"] == round(counted / 1e6, 4)
    assert own["mean"] < rows["vit_micro", "MACs (M)"]["mean"]
    paper = rows["dynamicvit_micro", "MACs by the paper's rule (M)"]
    assert paper["p5"] == paper["p95"] > own["p5"], "the rule adds layer norms"
    constant, *_ = adaptive_result.findings
    assert constant.outcome == "reproduced" and "1 different count(s) over 6" in constant.evidence


def test_which_tokens_stay_differs(adaptive_result):
    choices = [one for one in adaptive_result.findings if "tokens stay" in one.claim]
    assert [one.outcome for one in choices] == ["reproduced"] * 3
    assert "by lot it would be 69%" in choices[0].evidence  # 44 of 64


def test_cost_that_varies_would_be_seen():
    """A finding that could not fail would say nothing."""
    finding = adaptive._constant((10_000_000, 11_000_000), np.array([1e7, 1e7]))
    assert finding.outcome == "deviates" and "10.000 to 11.000 M" in finding.evidence
    noise = np.random.default_rng(0).random((10, 8)) * 0.01 + 1
    assert adaptive._time_follows_image(noise).outcome == "reproduced"
    slower = noise + np.linspace(0, 0.1, 8)
    assert adaptive._time_follows_image(slower).outcome == "deviates"
    same = torch.tensor([[1, 0, 1, 0]] * 3, dtype=torch.bool)
    assert adaptive._choice_differs(1, same).outcome == "deviates"


# effect


def test_arms_share_losses_and_differ_in_who_chooses():
    named = {arm.name: arm for arm in arms()}
    assert [dict(arm.options) for arm in named.values()] == [
        {"keep_ratio": 0.9}, {"keep_ratio": 0.7}, {"keep_ratio": 0.5},
        {"keep_ratio": 0.7, "scorer": "random"}, {"keep_ratio": 0.7, "scorer": "attention"},
    ]  # fmt: skip
    assert len({arm.objective for arm in named.values()}) == 1
    for claim in CLAIMS:
        assert {claim.better, claim.than} <= {*named, CONTROL, PARENT}


def test_prediction_modules_learn_faster_and_all_else_like_the_control():
    learned, *_, rival = arms("dynamicvit_deit_s_k07")
    changed = arm_recipe(learned, SCALES["paper"])
    assert (changed.peak_lr, changed.epochs, changed.warmup_epochs) == (1e-3, 30, 5)
    predictor, *_, rest = changed.parameter_groups
    assert predictor.match == ("score_predictor.*",) and predictor.lr_scale == 1
    assert rest.match == ("*",) and rest.lr_scale == 0.01
    for arm in (rival, Arm(CONTROL, "deit_s")):
        assert arm_recipe(arm, SCALES["paper"]).peak_lr == pytest.approx(1e-5)
    learned, *_, rival = arms()
    control = arm_recipe(Arm(CONTROL, "vit_micro"), SCALES["small"])
    assert arm_recipe(rival, SCALES["small"]) == control
    changed = arm_recipe(learned, SCALES["small"])
    assert (changed.peak_lr, control.peak_lr) == (1e-2, 5e-4)
    assert changed.peak_lr * changed.parameter_groups[-1].lr_scale == pytest.approx(5e-4)
    alike = {"lr": 5e-4, "parameter_groups": ()}
    assert changed.changed(**alike) == control.changed(**alike)


def test_effect_runs(own_home):
    result = harness.run(
        "dynamicvit/effect", scale="tiny", train_images=128, test_images=50, seconds=0
    )
    rows = {row["arm"]: row for row in result.rows}
    assert list(rows) == ["parent", CONTROL, *(arm.name for arm in arms())]
    macs = [rows[name]["MACs (M)"] for name in (CONTROL, *(arm.name for arm in arms()[:3]))]
    assert macs == sorted(macs, reverse=True), "fewer tokens, less work"
    assert rows["DynamicViT 0.7"]["params"] > rows[CONTROL]["params"]
    assert rows["random keep 0.7"]["params"] == rows[CONTROL]["params"]
    assert len(result.findings) == len(CLAIMS)
    assert {"effect", "kept", "kept_by_attention"} == set(result.figures)
    assert [row["top-1 (%)"] for row in result.published] == [
        78.2, 73.4, 79.3, 77.5, 78.1, 79.3, 77.4, 79.2, 79.3,
    ]  # fmt: skip


# training length


def test_training_length_asks_each_network_three_times(own_home):
    result = harness.run(
        "dynamicvit/training_length", scale="tiny", train_images=128, test_images=50
    )
    rows = {(row["arm"], row["extra epochs"]): row for row in result.rows}
    arms_by_length = [(arm, epochs) for arm in length.STYLES for epochs in (1, 2)]
    assert list(rows) == [(PARENT, 0), *arms_by_length]
    assert rows[CONTROL, 1]["against the control"] == ""
    for epochs in (1, 2):  # the same training behind all three
        asked = {rows[name, epochs]["training (s)"] for name in (length.AT_RANDOM, length.SAMPLED)}
        assert asked == {0.0} and rows[length.LEARNED, epochs]["training (s)"] > 0
    assert len(result.findings) == 6
    assert all("After 2 epochs" in finding.claim for finding in result.findings)
    again = harness.run(
        "dynamicvit/training_length", scale="tiny", train_images=128, test_images=50, lengths=2
    )
    assert again.rows == [row for row in result.rows if row["extra epochs"] != 1]


def test_a_network_is_asked_with_its_own_weights():
    torch.manual_seed(0)
    model = harness.build("dynamicvit_micro", 10).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.manual_seed(3)
        expected = model.forward_train(images).logits
        torch.manual_seed(3)
        assert torch.equal(length.Sampled(model)(images), expected)
    with pytest.raises(ReplivitError, match="say lengths=3,30"):
        length.training_length(epochs=3)
