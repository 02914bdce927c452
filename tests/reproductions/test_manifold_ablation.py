"""Manifold distillation: the ablation, its findings and its picture."""

from __future__ import annotations

import pytest
import torch

import harness
from harness.checkpoints import save_weights
from harness.effect import CONTROL, PARENT
from harness.experiment import Finding
from harness.tokens import sample_images
from reproductions.manifold_distillation import ablation as module
from reproductions.manifold_distillation.ablation import (
    ALL,
    DEFAULT,
    HARD,
    LABELS,
    OBJECTIVES,
    SOFT,
    claims_against,
    order_of,
)
from reproductions.manifold_distillation.losses import Weights
from reproductions.manifold_distillation.picture import manifold_figure, manifolds, points_of

SMALL = {"train_images": 128, "test_images": 100, "seconds": 0, "cost_images": 1}


@pytest.fixture
def teacher_weights(tmp_path):
    """A teacher that was never trained."""
    torch.manual_seed(0)
    path = tmp_path / "teacher.safetensors"
    save_weights(harness.build("manifold_distillation_teacher_micro"), path)
    return path


def test_arms_differ_in_their_objective_alone(teacher_weights):
    result = harness.run(
        "manifold_distillation/ablation", scale="tiny", arms=[SOFT, ALL], start="parent",
        teacher_weights=teacher_weights, **SMALL,
    )  # fmt: skip
    assert [row["arm"] for row in result.rows] == [PARENT, CONTROL, SOFT, ALL]
    assert len({row["params"] for row in result.rows}) == 1
    assert len({row["images seen"] for row in result.rows[1:]}) == 1
    claims = [one.claim for one in result.findings]
    assert claims[:2] == [
        "All manifold terms beat soft answers alone", "Soft answers beat labels alone"
    ]  # fmt: skip
    assert result.findings[-1].outcome == "not measured"
    assert result.findings[-1].evidence == "without hard"
    assert "Teacher manifold_distillation_teacher_micro: 0.33 M parameters" in result.notes
    assert set(result.figures) == {"effect", "manifolds"}
    assert {row["value"] for row in result.published} >= {72.2, 74.5, 75.8, 76.4}


def test_from_scratch_labels_alone_are_an_arm(teacher_weights, monkeypatch):
    asked = {}

    def compare(arms, **options):
        asked.update(options, arms=arms)
        return made_up({}, [])

    monkeypatch.setattr(module, "compare_arms", compare)
    module.ablation(
        "small", [HARD, ALL], teacher_weights=teacher_weights, num_samples=7, test_images=50
    )
    assert [one.name for one in asked["arms"]] == [LABELS, HARD, ALL]
    assert {one.start for one in asked["arms"]} == {"scratch"}
    assert [one.than for one in asked["claims"]] == [LABELS]
    assert asked["arms"][0].objective is None and asked["parent_epochs"] == 1
    hard, every = (one.objective(None) for one in asked["arms"][1:])
    assert (hard.kind, hard.alpha, hard.num_samples) == ("hard", 0.5, 7)
    assert hard.teacher is every.teacher, "one teacher for all"
    assert every.terms == Weights() != hard.terms == Weights(0, 0, 0)


def test_claims_speak_of_arms():
    for labels in (CONTROL, LABELS):
        for claim in claims_against(labels):
            assert {claim.better, claim.than} <= {*OBJECTIVES, labels}
    assert {HARD, SOFT, ALL} < set(DEFAULT)


def made_up(means: dict[str, float], outcomes: list[str]) -> harness.ExperimentResult:
    rows = [{"arm": name, "top-1 (%)": value} for name, value in means.items()]
    return harness.ExperimentResult(rows, [Finding("step", one, "") for one in outcomes])


def test_order_is_judged_by_means_and_steps():
    arms = (CONTROL, HARD, SOFT, ALL)
    rising = dict(zip(arms, (70.0, 71.0, 72.0, 73.0), strict=True))
    good = ["reproduced"] * 3
    assert order_of(made_up(rising, good), arms).outcome == "reproduced"
    doubtful = order_of(made_up(rising, [*good[:2], "deviates"]), arms)
    assert doubtful.outcome == "deviates" and "1 of 3 steps" in doubtful.evidence
    other = order_of(made_up(rising | {ALL: 71.5}, good), arms)
    assert other.outcome == "deviates" and "another order" in other.evidence


def test_picture_shows_what_it_measures():
    torch.manual_seed(0)
    student = harness.build("manifold_distillation_micro").eval()
    teacher = harness.build("manifold_distillation_teacher_micro").eval()
    sample = sample_images(student, "fashion_mini", 12)
    points = points_of(student, -2, sample.inputs)
    assert points.shape == (12, 64, 64)
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(12, 64))
    within, across = manifolds(points, 3, 20).values()
    assert within.shape == (64, 64) and across.shape == (12, 12)
    torch.testing.assert_close(within[5, 9], points[3, 5] @ points[3, 9])
    torch.testing.assert_close(across[2, 7], points[2, 20] @ points[7, 20])
    figure = manifold_figure({"teacher": (teacher, -2), "student": (student, -2)}, sample)
    told = figure.axes[2].get_xlabel()  # image, teacher, student
    far = manifolds(points_of(teacher, -2, sample.inputs), 0, 32)["patch"]
    far = (far - manifolds(points, 0, 32)["patch"]).square().mean()
    assert told == f"{far:.3f}" and float(told) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "huge"}, "no scale 'huge'"),
        ({"arms": "bare"}, "no arm 'bare'; there are: hard; soft; soft . patch"),
        ({"start": "middle"}, "start is parent or scratch, not 'middle'"),
        ({"patience": 1}, "no option 'patience'"),
        ({"teacher": "no_such_net"}, "no variant and no timm model 'no_such_net' to teach"),
        ({"teacher": "manifold_deit_small"}, "manifold_deit_small ships no weights"),
        ({"track": "/nowhere"}, "the ablation needs a track .*fashion_mini"),
    ],
)
def test_wrong_options_are_one_sentence(options, message):
    with pytest.raises(harness.ReplivitError, match=message):
        harness.run("manifold_distillation/ablation", **{"scale": "tiny", **options})


def test_teacher_without_records_costs_nothing_known():
    from harness.effect import choose_setting

    assert module._cost("cait_s24_224", choose_setting("tiny", {})) == ""
