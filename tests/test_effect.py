"""Arms against a control: the same start for all, pairs of runs, and words that fit the numbers."""

from __future__ import annotations

import base64
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import harness
from harness.effect import CONTROL, PARENT, Arm, Claim, Run, choose_setting, effect
from harness.effect_report import Difference, judge
from harness.environment import home
from harness.errors import ReplivitError
from harness.record import Conditions, make_record
from harness.training import Callback, CrossEntropy


class Counting(CrossEntropy):
    """Cross-entropy that remembers who its teacher is."""

    teachers: ClassVar[list[nn.Module]] = []

    def __init__(self, teacher: nn.Module) -> None:
        self.teachers.append(teacher)


class Steps(Callback):
    seen = 0

    def on_step_end(self, context) -> None:
        Steps.seen += 1


ARMS = (
    Arm(
        "dropout", "vit_micro", {"drop_rate": 0.5}, objective=Counting, callbacks=lambda: [Steps()]
    ),
    Arm("no training", "vit_micro", train=False),
    Arm("renamed", "vit_micro", train=False, adapt=lambda state: {**state}),
    Arm("scratch", "vit_micro", start="scratch"),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One tiny comparison, and the time and runs of asking for it again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPLIVIT_HOME", str(tmp_path_factory.mktemp("effect")))
        Counting.teachers.clear()
        first = effect(
            ARMS, scale="tiny", train_images=128, test_images=60, seconds=0.05,
            claims=[Claim("dropout helps", "dropout", CONTROL)],
            published=[{"model": "x", "top-1 (%)": 1.0}],
            pictures=lambda runs, setting: {"more": runs["dropout"][0].model},
        )  # fmt: skip
        steps = Steps.seen
        files = sorted(path.name for path in (home() / "training" / "vit_micro").rglob("run.json"))
        second = effect(ARMS, scale="tiny", train_images=128, test_images=60, seconds=0)
        return first, second, steps, files


def rows_of(result) -> dict[str, dict]:
    return {row["arm"]: row for row in result.rows}


def test_all_arms_have_rows_with_the_same_columns(tiny):
    first, *_ = tiny
    assert list(rows_of(first)) == [PARENT, CONTROL, *(arm.name for arm in ARMS)]
    assert len({tuple(row) for row in first.rows}) == 1
    rows = rows_of(first)
    assert [rows[name]["training"] for name in (PARENT, CONTROL, "no training", "scratch")] == [
        "parent", "+1 epochs", "none", "from scratch",
    ]  # fmt: skip
    params = sum(one.numel() for one in harness.build("vit_micro").parameters())
    assert rows["dropout"]["params"] == params
    assert (
        rows["dropout"]["MACs (M)"] == rows[CONTROL]["MACs (M)"] == pytest.approx(19.42, abs=0.01)
    )
    assert rows[CONTROL]["speed-up"].startswith("1.00")
    assert rows["dropout"]["time (ms)"] > 0 and rows[PARENT]["time (ms)"] is None


def test_training_is_charged(tiny):
    rows = rows_of(tiny[0])
    assert rows[CONTROL]["images seen"] == rows["dropout"]["images seen"] == 128
    assert rows["scratch"]["images seen"] == 256  # as long as parent and control together
    assert rows["no training"]["images seen"] == rows["no training"]["training (s)"] == 0
    assert tiny[2] == 1, "128 images are one step"


def test_untrained_arms_are_the_parent(tiny):
    rows = rows_of(tiny[0])
    for name in ("no training", "renamed"):
        assert rows[name]["top-1 (%)"] == rows[PARENT]["top-1 (%)"]
    assert rows[CONTROL]["top-1 (%)"] != rows[PARENT]["top-1 (%)"]


def test_objective_gets_a_copy_of_the_parent(tiny):
    (teacher, *_), runs = Counting.teachers, tiny[0].figures["more"]
    assert not teacher.training and teacher is not runs
    assert any(
        not torch.equal(a, b) for a, b in zip(teacher.parameters(), runs.parameters(), strict=True)
    )


def test_finished_runs_are_found_again(tiny):
    first, second, steps, files = tiny
    assert Steps.seen == steps, "nothing was trained again"
    assert len(files) == 4  # parent, control, dropout, scratch
    for before, after in zip(first.rows, second.rows, strict=True):
        assert before["top-1 (%)"] == after["top-1 (%)"]
        assert before["training (s)"] == after["training (s)"]


def test_equal_networks_that_are_not_timed_stand_in_rows(tiny):
    """A plot over one and the same cost would put all arms on top of each other."""
    first, second, *_ = tiny
    assert not {"time (ms)", "speed-up"} & set(second.rows[0])
    (axes,) = second.figures["effect"].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [CONTROL, *(arm.name for arm in ARMS)][::-1]
    assert len(first.figures["effect"].axes) == 2


def test_result_says_how_it_was_made(tiny):
    first = tiny[0]
    assert first.published == [{"model": "x", "top-1 (%)": 1.0}]
    assert "effect" in first.figures
    assert "Only 128 training images" in first.notes and "seeds 0;" in first.notes
    assert first.conditions.options["epochs"] == 1 and first.conditions.seed == 0
    (finding,) = first.findings
    assert finding.claim == "dropout helps" and "dropout does not beat dense control" in (
        finding.evidence
    )


def test_weights_that_do_not_fit_are_refused():
    arms = [Arm("wide", "efficientformer_micro", train=False)]
    with pytest.raises(ReplivitError, match="arm wide: the parent's weights do not make a effic"):
        effect(
            arms, scale="tiny", parent_weights=harness.get_variant("vit_micro").weights_file(),
            train_images=128, test_images=20,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "huge"}, "no scale 'huge'; there are tiny, small, paper"),
        ({"epoch": 3}, "no option 'epoch'; there are track, parent"),
        ({"seeds": (0, 0)}, r"whole numbers that differ, not \(0, 0\)"),
        ({"seeds": "0,x"}, "whole numbers that differ, not '0,x'"),
        ({"epochs": 0}, "option epochs must be a whole number from 1 on, not 0"),
        ({"seconds": "long"}, "option seconds must be a number from 0 on, not 'long'"),
        ({"batch_size": None}, "option batch_size must be a whole number from 1 on, not None"),
        ({"claims": [Claim("?", "nobody", CONTROL)]}, "no arm 'nobody'; there are parent, dense"),
        ({"arms": [Arm(PARENT, "vit_micro")]}, "arms need names of their own"),
    ],
)
def test_impossible_comparisons(options, message):
    arms = options.pop("arms", [])
    with pytest.raises(ReplivitError, match=message):
        effect(arms, **{"scale": "tiny", **options})


def test_settings_from_the_command_line():
    assert choose_setting("small", {"seeds": [3, 4]}).seeds == (3, 4)
    assert choose_setting("small", {"seeds": 5}).seeds == (5,)
    assert choose_setting("small", {"seeds": "3,4"}).seeds == (3, 4)
    assert choose_setting("small", {}).seeds == (0, 1, 2)
    assert choose_setting("tiny", {"train_images": None}).train_images is None


# the words


def runs_of(*seeds: np.ndarray) -> list[Run]:
    """Runs that are right on the given images."""
    made = []
    for seed, own in enumerate(seeds):
        packed = base64.b64encode(np.packbits(own).tobytes()).decode()
        record = make_record(
            "made", "top1", 100 * own.mean(), Conditions(), run_id="x",
            detail={"n": len(own), "bits": packed},
        )  # fmt: skip
        made.append(Run(seed, record, 0.0, 0, nn.Identity()))
    return made


def bits(right: int, total: int = 1000) -> np.ndarray:
    return np.arange(total) < right


def test_difference_is_paired_by_seed():
    better, worse = runs_of(bits(900), bits(820), bits(860)), runs_of(
        bits(880), bits(802), bits(839)
    )  # fmt: skip
    gap = Difference.of(better, worse)
    assert gap.points == pytest.approx((2.0 + 1.8 + 2.1) / 3)
    assert gap.seeds == 3 and 1.5 < gap.interval[0] < gap.points < gap.interval[1] < 2.5
    assert gap.p_value == pytest.approx(2 * 0.5**59)  # 59 images that only one arm gets right
    assert str(gap).startswith("+1.97 points [+1.") and str(gap).endswith("over 3 seeds")


def test_one_seed_is_judged_by_its_images():
    gap = Difference.of(runs_of(bits(900)), runs_of(bits(890)))
    assert gap.points == pytest.approx(1.0) and gap.seeds == 1
    assert gap.interval[0] < 1.0 < gap.interval[1]
    assert str(gap).endswith("over the images of one seed")


@pytest.mark.parametrize(
    ("than", "outcome", "words"),
    [
        ([700, 710, 690], "reproduced", "a beats b: +10"),
        ([900, 910, 895], "deviates", "a loses to b: -10"),
        ([800, 811, 789], "deviates", "a does not beat b, no difference detected: +0.00"),
    ],
)
def test_who_beats_whom(than, outcome, words):
    runs = {
        "a": runs_of(*(bits(one) for one in (800, 810, 790))),
        "b": runs_of(*(bits(one) for one in than)),
    }
    (finding,) = judge([Claim("a is better", "a", "b")], runs)
    assert finding.claim == "a is better" and finding.outcome == outcome
    assert finding.evidence.startswith(words)


def test_seeds_that_disagree_decide_nothing():
    """Pooled images are sure, seeds are not: that is no win."""
    runs = {"a": runs_of(bits(900), bits(800)), "b": runs_of(bits(700), bits(800))}
    (finding,) = judge([Claim("a is better", "a", "b")], runs)
    assert finding.outcome == "deviates" and "no difference detected" in finding.evidence


@pytest.mark.parametrize(("within", "outcome"), [(3.0, "reproduced"), (0.5, "deviates")])
def test_losing_at_most(within, outcome):
    runs = {
        "a": runs_of(bits(800), bits(810), bits(790)),
        "b": runs_of(bits(811), bits(819), bits(800)),
    }
    (finding,) = judge([Claim("a costs little", "a", "b", within=within)], runs)
    assert finding.outcome == outcome
    assert f"at most {within:g} points against b: -1.00 points" in finding.evidence
