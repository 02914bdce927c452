"""PatchMerger's experiments: what they count exactly, what they claim, how they refuse."""

from __future__ import annotations

import pytest

import harness
from harness.effect import CONTROL, PARENT
from harness.measurement.macs import count_macs
from harness.meta import on_meta
from harness.record import RecordStore
from reproductions.patchmerger.effect_experiment import CLAIMS, MERGED, arms_of
from reproductions.patchmerger.experiments import CLAIMED, Network

SMALL_PLACEMENT = {
    "size": "ti", "layers": (3, 6, 9), "outputs": (1, 8), "image_sizes": (64, 96),
    "timed_sizes": ("ti",), "batch_sizes": (1,), "seconds": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def placement(tmp_path_factory):
    """One run for all tests of this file."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPLIVIT_HOME", str(home))
        return harness.run(
            "patchmerger/placement", scale="tiny", store=RecordStore(home / "records"),
            **SMALL_PLACEMENT,
        )  # fmt: skip


def finding(result, words: str):
    return next(one for one in result.findings if words in one.claim)


def test_placement_has_a_row_per_network(placement):
    keys = ("model", "image_size", "before_block", "outputs", "batch")
    found = [tuple(row[key] for key in keys) for row in placement.rows]
    assert found == [
        ("deit_ti", 64, None, None, 1),
        ("deit_ti", 64, 3, 8, 1),
        ("deit_ti", 64, 6, 8, 1),
        ("deit_ti", 64, 9, 8, 1),
        ("deit_ti", 64, 6, 1, 1),
        ("deit_ti", 96, None, None, 1),
        ("deit_ti", 96, 6, 8, 1),
        ("deit_s", 64, None, None, None),
        ("deit_s", 64, 6, 8, None),
        ("deit_b", 64, None, None, None),
        ("deit_b", 64, 6, 8, None),
    ]
    assert len({tuple(row) for row in placement.rows}) == 1, "all rows have the same columns"
    assert [len(files) for files in (placement.figures, placement.figure_files)] == [1, 2]
    assert placement.record.value == len(placement.rows)


def test_placement_counts_and_times_each_network(placement):
    for row in (placement.rows[4], placement.rows[6]):
        network = Network("ti", row["image_size"], row["before_block"], row["outputs"])
        with on_meta():
            assert row["macs"] == count_macs(network.build(), row["image_size"]).total
    for row in placement.rows:
        if row["batch"] is None:
            assert row["ms"] is None and row["speedup"] is None
        else:
            assert row["ms"] > 0 and row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        if row["outputs"] is None:
            assert row["macs_ratio"] == 1 and row["speedup"] in (None, 1)


def test_placement_multiply_adds_are_a_line_in_the_layer(placement):
    by_layer = {row["before_block"]: row["macs"] for row in placement.rows[1:4]}
    assert by_layer[9] - by_layer[6] == by_layer[6] - by_layer[3] > 0
    assert "a line explains 100.0% of the MACs' variance" in finding(placement, "Earlier").evidence


def test_placement_says_what_it_saw(placement):
    """At 64 pixels there are 16 patches to save on: less than the claimed range."""
    claimed = finding(placement, "fewer FLOPs")
    fewer = [100 * (1 - 1 / row["macs_ratio"]) for row in placement.rows if row["outputs"] == 8]
    assert min(fewer) < CLAIMED[0] and claimed.outcome == "deviates"
    assert "deit_b 23.4 %" in claimed.evidence
    assert "deit_ti" in finding(placement, "less runtime").evidence
    same = finding(placement, "at every image size")
    assert same.outcome == "reproduced" and "at 64, 96 px" in same.evidence
    assert finding(placement, "quality").outcome == "not measured"
    assert {row["metric"] for row in placement.published} == {
        "flops_and_runtime_reduction", "output_tokens"
    }  # fmt: skip


@pytest.mark.parametrize("size", ["ti", "b"])
def test_claimed_range_holds_for_the_multiply_adds_at_224_pixels(size):
    with on_meta():
        dense, merged = Network(size, 224).macs(), Network(size, 224, 6, 8).macs()
    assert CLAIMED[0] < 100 * (1 - merged / dense) < CLAIMED[1]


def test_initialisation_shows_the_trap():
    result = harness.run("patchmerger/initialisation", scale="tiny", widths=(64, 256))
    assert [one.outcome for one in result.findings] == ["reproduced"] * 2
    rows = {(row["width"], row["form"]): row for row in result.rows[:6]}
    for width in (64, 256):
        trap, small = rows[width, "unscaled, std 1"], rows[width, "unscaled, std C^-0.5"]
        assert trap["score_std"] == pytest.approx(width**0.5, rel=0.1)
        assert small["score_std"] == pytest.approx(1, rel=0.1)
        assert trap["largest_weight"] > 0.6 > 0.1 > small["largest_weight"]
        assert trap["effective_tokens"] < 5 < 100 < small["effective_tokens"] < 196
        assert trap["room_to_learn"] < 0.5 < 0.9 < small["room_to_learn"]
    assert result.rows[-1]["tokens"] == "vit_micro, fashion_mini"


def test_arms_differ_from_their_parent_by_the_mergers_alone():
    from harness.effect import _check_start

    state = harness.build("vit_micro").state_dict()
    for arm in arms_of("patchmerger_micro").values():
        if arm.start == "parent":
            _check_start(arm, state, 10)
    assert {parent for parent in MERGED} == {
        harness.get_variant(name).spec.args["base"] for name in MERGED.values()
    }


def test_claims_speak_of_arms():
    names = {*arms_of("patchmerger_micro"), CONTROL, PARENT}
    for claim in CLAIMS:
        assert {claim.better, claim.than} <= names


def test_effect_trains_the_chosen_arms_and_answers_their_claims():
    result = harness.run(
        "patchmerger/effect", scale="tiny", arms=("inserted, no training", "inserted"),
        train_images=128, test_images=100, seconds=0,
    )  # fmt: skip
    arms = [row["arm"] for row in result.rows]
    assert arms == [PARENT, CONTROL, "inserted, no training", "inserted"]
    costs = {row["arm"]: row["MACs (M)"] for row in result.rows}
    assert costs[CONTROL] == pytest.approx(19.42, abs=0.01)
    assert costs["inserted"] == pytest.approx(11.01, abs=0.01)
    assert [one.claim for one in result.findings] == [
        "Inserted into a trained network, a merger costs at most a point",
        "An inserted merger needs training",
    ]
    assert "8 outputs in the middle" in result.notes


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("placement", {"scale": "huge"}, "no scale 'huge'; there are tiny, small, paper"),
        ("placement", {"patience": 1}, "no option 'patience'; there are size, layers"),
        ("placement", {"size": "xl"}, "no size 'xl'; there are ti, s, b"),
        ("initialisation", {"scale": "huge"}, "no scale 'huge'; there are tiny, small, paper"),
        ("effect", {"arms": "removed"}, "no arm 'removed'; there are: inserted, no training; ins"),
        ("effect", {"parent": "swin_t"}, "no merged variant of swin_t; there are some of vit_mic"),
        ("effect", {"scale": "huge"}, "no scale 'huge'"),
    ],
)
def test_wrong_options_are_one_sentence(name, options, message):
    with pytest.raises(harness.ReplivitError, match=message):
        harness.run(f"patchmerger/{name}", **options)
