"""`--against`: what is more than noise, and every way the old board can be unreadable."""

import base64
import json

import numpy as np
import pytest
from display_case import EPYC, LAPTOP, make_paper, make_store, record, timing, trained

from harness.errors import ReplivitError
from leaderboard.changes import compare_boards, load_old
from leaderboard.export import to_json
from leaderboard.tables import arrange


@pytest.fixture
def compare(tmp_path):
    """Compare two lists of records of the variant `p_a`."""
    papers = [make_paper(tmp_path, "p")]
    return lambda old, new: compare_boards(arrange(old, papers, []), arrange(new, papers, []))


def kinds(comparison):
    return [(one.kind, one.metric) for one in comparison.changes]


def test_times_change_only_when_intervals_are_disjoint(compare):
    slow, same, fast = timing("p_a", 10, 1.0), timing("p_a", 10.2, 1.02), timing("p_a", 8, 0.8)
    assert compare(slow, same).changes == [] and compare(slow, same).unchanged == 2
    found = compare(slow, fast)
    assert kinds(found) == [("better", "latency"), ("better", "latency_ratio")]
    assert found.changes[0].relative == pytest.approx(-0.2)
    assert (found.changes[0].old, found.changes[0].new) == ("10.00 ms", "8.000 ms")
    assert kinds(compare(fast, slow))[0] == ("worse", "latency")


def test_times_of_another_machine_are_new_but_the_ratio_travels(compare):
    found = compare(timing("p_a", 10, 1.0), timing("p_a", 5, 0.5, machine=LAPTOP))
    by_metric = {(one.metric, one.kind): one for one in found.changes}
    assert set(by_metric) == {("latency", "new"), ("latency", "gone"), ("latency_ratio", "better")}
    assert "another machine" in by_metric["latency_ratio", "better"].basis
    assert EPYC in by_metric["latency", "gone"].where


def test_counts_change_exactly(compare):
    one, two = [record("p_a", "params", 5_000_000)], [record("p_a", "params", 5_000_001)]
    assert kinds(compare(one, two)) == [("changed", "params")]
    assert compare(one, one).changes == []


def test_memory_has_a_threshold(compare):
    def memory(value):
        return [record("p_a", "memory_inference", value, conditions={"batch_size": 1})]

    assert compare(memory(100), memory(104)).changes == []
    assert kinds(compare(memory(100), memory(110))) == [("worse", "memory_inference")]


def scored(right, fingerprint="f" * 16):
    """A top-1 record of 1,000 images that keeps its bits."""
    bits = np.zeros(1000, dtype=bool)
    bits[list(right)] = True
    detail = {"bits": base64.b64encode(np.packbits(bits)).decode(), "n": 1000}
    given = {"track": "imagenet", "data_fingerprint": fingerprint}
    top1 = 100 * bits.mean()
    return [
        record("p_a", "top1", top1, conditions=given, interval=(top1 - 2, top1 + 2), detail=detail)
    ]


def test_top1_on_the_same_images_is_tested_in_pairs(compare):
    """20 images gained and none lost is certain, although the two intervals overlap."""
    found = compare(scored(range(800)), scored(range(820)))
    assert kinds(found) == [("better", "top1")] and "McNemar" in found.changes[0].basis
    assert compare(scored(range(800)), scored(range(10, 812))).changes == []
    assert compare(scored(range(800)), scored(range(820), "other")).changes == []


def test_bits_that_cannot_be_read_leave_the_intervals(compare):
    torn = scored(range(820))
    torn[0].detail["bits"] = "!"
    assert compare(scored(range(800)), torn).changes == []


def test_top1_over_seeds_uses_the_intervals(compare):
    old = [trained("p_a", seed, 80 + 0.1 * seed, track="imagenet") for seed in range(3)]
    new = [trained("p_a", seed, 85 + 0.1 * seed, track="imagenet") for seed in range(3)]
    assert kinds(compare(old, new)) == [("better", "top1")]


def test_new_gone_failed_and_mended(compare):
    ok = [record("p_a", "macs", 7)]
    broken = [record("p_a", "macs", None, status="failed", reason="segfault")]
    assert kinds(compare([], ok)) == [("new", "macs")]
    assert kinds(compare(ok, [])) == [("gone", "macs")]
    failed = compare(ok, broken)
    assert kinds(failed) == [("failed", "macs")] and failed.changes[0].basis == "segfault"
    assert kinds(compare(broken, ok)) == [("works again", "macs")]
    assert compare(broken, broken).changes == []


def test_json_folder_and_file_of_records_are_the_same_old_board(case, tmp_path):
    papers, store = case
    board = arrange(store.load(), papers, [])
    (tmp_path / "leaderboard.json").write_text(to_json(board))
    for path in (tmp_path / "leaderboard.json", tmp_path, store.folder, store.file):
        found = compare_boards(load_old(path, papers), board)
        assert found.changes == [] and found.unchanged > 100


@pytest.mark.parametrize(
    "text, sentence",
    [("not json", "is not JSON"), ("[]", "no list 'records'"), ('{"cells": []}', "no list"),
     ('{"schema_version": 1, "records": 5}', "no list 'records'"),
     ('{"schema_version": 9, "records": []}', "schema version 9"),
     ('{"schema_version": 1, "records": [{"value": 1}]}', "records.0"),
     ('{"schema_version": 1, "records": []}', "no records")],
)  # fmt: skip
def test_an_unreadable_old_board_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ReplivitError, match=sentence):
        load_old(path, [])


def test_a_missing_old_board_is_one_sentence(tmp_path):
    with pytest.raises(ReplivitError, match="cannot read"):
        load_old(tmp_path / "nowhere.json", [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReplivitError, match="no records"):
        load_old(tmp_path / "empty", [])


def test_the_json_of_a_board_reads_back(tmp_path):
    papers = [make_paper(tmp_path, "p")]
    store = make_store(tmp_path / "r", [record("p_a", "macs", None, status="failed", reason="x")])
    data = json.loads(to_json(arrange(store.load(), papers, [])))
    assert data["cells"][0]["value"] is None and data["cells"][0]["reason"] == "x"
