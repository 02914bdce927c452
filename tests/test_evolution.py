"""Scores that outlive a kill, and candidates scored by several processes."""

from __future__ import annotations

import json
import math

import pytest

from harness.errors import ReplivitError
from harness.evolution import Score, Scores, Workers


def test_scores_are_found_again_and_not_computed_twice(tmp_path):
    path, asked = tmp_path / "deep" / "search.jsonl", []

    def fitness(genes):
        asked.extend(genes)
        return [sum(one) for one in genes]

    first = Scores(path, {"seed": 0})
    first.fill([(1, 2), (3, 4), (1, 2)], fitness, cost=max, phase="random")
    again = Scores(path, {"seed": 0})
    again.fill([(3, 4), (5, 6)], fitness, cost=max, phase="generation 1")
    assert asked == [(1, 2), (3, 4), (5, 6)]
    assert again.entries == Scores(path, {"seed": 0}).entries
    assert again[(5, 6)] == Score((5, 6), 11.0, 6, "generation 1")
    assert (3, 4) in again and (9, 9) not in again and len(again) == 3


def test_a_score_is_on_disk_before_the_next_is_computed(tmp_path):
    path = tmp_path / "search.jsonl"

    def fitness(genes):
        yield 1.0
        raise KeyboardInterrupt

    scores = Scores(path)
    with pytest.raises(KeyboardInterrupt):
        scores.fill([(1,), (2,)], fitness, cost=max, phase="random")
    assert [one.genes for one in Scores(path).entries] == [(1,)]


def test_a_torn_line_is_dropped(tmp_path):
    path = tmp_path / "search.jsonl"
    Scores(path, {"seed": 0}).add(Score((1,), 1.0, 2.0, "random"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"genes": [2], "fit')
    assert [one.genes for one in Scores(path, {"seed": 0}).entries] == [(1,)]
    assert path.read_bytes() == whole
    path.write_bytes(b'{"iden')  # killed in the first line
    assert len(Scores(path, {"seed": 0})) == 0
    assert json.loads(path.read_text()) == {"identity": {"seed": 0}}


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "search.jsonl"
    Scores(path, {"seed": 0})
    with pytest.raises(ReplivitError, match="holds a search with seed = 0, asked for is 1"):
        Scores(path, {"seed": 1})
    path.write_text("no scores\n")
    with pytest.raises(ReplivitError, match="no file of scores"):
        Scores(path)
    with pytest.raises(ReplivitError, match="cannot open"):
        Scores(path / "below" / "a_file.jsonl")


@pytest.mark.parametrize("count", [0, 1])
def test_workers_keep_the_order_and_remember(count):
    with Workers(math.sqrt, count) as root:
        assert list(root([9, 4, 9])) == [3, 2, 3]
        root.function = None
        assert list(root([4, 9])) == [2, 3]
