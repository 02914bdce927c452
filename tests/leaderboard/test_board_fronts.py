"""Pareto fronts: who is on them, and how sure that is."""

import pytest
from display_case import make_paper, record, timing, trained

from leaderboard.fronts import all_fronts, axis_pairs, probabilities, standing
from leaderboard.tables import arrange


def board_of(tmp_path, records, names="abc", track="imagenet"):
    variants = {f"p_{name}": {"build": "model:a", "track": track} for name in names}
    return arrange(records, [make_paper(tmp_path, "p", variants=variants)], [])


def share(board, axes, view=None):
    return dict(
        zip((r.name for r in board.rows), probabilities(board.rows, axes, view), strict=True)
    )


def test_counts_without_intervals_give_a_certain_front(tmp_path):
    records = []
    for name, params, macs in (("p_a", 1e6, 3e9), ("p_b", 2e6, 2e9), ("p_c", 2e6, 3e9)):
        records += [record(name, "params", int(params)), record(name, "macs", int(macs))]
    assert share(board_of(tmp_path, records), ("params", "macs")) == {"p_a": 1, "p_b": 1, "p_c": 0}


def test_equal_models_are_both_on_the_front(tmp_path):
    records = [record(f"p_{x}", metric, 5) for x in "ab" for metric in ("params", "macs")]
    found = share(board_of(tmp_path, records, "ab"), ("params", "macs"))
    assert found == {"p_a": 1, "p_b": 1}


def test_overlapping_intervals_are_a_tie_and_disjoint_ones_are_not(tmp_path):
    records = [record(f"p_{x}", "params", 5) for x in "abc"]
    records += [*timing("p_a", 10, 1.00), *timing("p_b", 10, 1.005), *timing("p_c", 10, 1.5)]
    board = board_of(tmp_path, records)
    found = share(board, ("params", "latency_ratio"), board.default_view)
    assert standing(found["p_a"]) == standing(found["p_b"]) == "tie"
    assert found["p_a"] > found["p_b"] and standing(found["p_c"]) == ""


def test_a_contended_time_is_never_ranked_closer_than_ten_percent(tmp_path):
    def chance(**status):
        records = [record(f"p_{x}", "params", 5) for x in "ab"]
        records += timing("p_a", 10, 1.0, spread=0.001)
        records += timing("p_b", 10, 1.05, spread=0.001, **status)
        board = board_of(tmp_path, records, "ab")
        return share(board, ("params", "latency_ratio"), board.default_view)["p_b"]

    assert chance() == 0
    assert standing(chance(status="contended", reason="busy")) == "tie"


def test_tracks_do_not_compete(tmp_path):
    records = [record("p_a", "params", 9), record("p_a", "macs", 9)]
    records += [record("m", "params", 1), record("m", "macs", 1)]
    assert share(board_of(tmp_path, records, "a"), ("params", "macs")) == {"p_a": 1, "m": 1}


def test_top1_prefers_what_was_measured_over_what_was_printed(tmp_path):
    printed = {
        "variant": "A", "of": "p_a", "metric": "top1", "value": 99.0, "unit": "%", "source": "s",
        "seen": True,
    }  # fmt: skip
    variants = {f"p_{x}": {"build": "model:a"} for x in "ab"}
    paper = make_paper(tmp_path, "p", variants=variants, published=[printed])
    records = [record(f"p_{x}", "macs", 5) for x in "ab"]
    records += [trained("p_b", 0, 90.0, track="imagenet")]
    assert share(arrange(records, [paper], []), ("macs", "top1")) == {"p_a": 1, "p_b": 0}
    records += [trained("p_a", 0, 80.0, track="imagenet")]
    assert share(arrange(records, [paper], []), ("macs", "top1")) == {"p_a": 0, "p_b": 1}


def test_rows_without_both_numbers_have_no_probability(tmp_path):
    board = board_of(tmp_path, [record("p_a", "params", 5)], "ab")
    assert share(board, ("params", "macs")) == {"p_a": None, "p_b": None}


def test_the_page_gets_every_pair_for_every_view(tmp_path):
    records = [*timing("p_a", 1, 1.0), *timing("p_a", 1, 1.0, backend="deploy")]
    board = board_of(tmp_path, [*records, record("p_a", "params", 5)], "a")
    fronts = all_fronts(board)
    assert len(fronts) == 2
    assert set(fronts[0]) == {f"{x}|{y}" for x, y in axis_pairs()}
    assert fronts[1]["params|latency"] == [1.0] and fronts[1]["params|macs"] == [None]


@pytest.mark.parametrize(
    "p, word", [(1, "front"), (0.95, "front"), (0.5, "tie"), (0.05, ""), (0, "")]
)
def test_words_for_probabilities(p, word):
    assert standing(p) == word
