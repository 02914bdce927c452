"""Results that ship with a paper: the record and its figures, or nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from harness import results
from harness.environment import home
from harness.errors import ReplivitError
from harness.record import Conditions, make_record, new_run_id, read_records
from harness.results import ship_result


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """A paper's directory, and an experiment `toy/table` that belongs to it."""
    found = SimpleNamespace(directory=tmp_path / "toy")
    monkeypatch.setattr(results, "get_experiment", lambda name: SimpleNamespace(paper=found))
    return found


def ran(variant="toy/table", metric="experiment", commit="abc", dirty=False, picture="<svg/>"):
    """The record of a run whose figure lies below home()."""
    folder = home() / "experiments" / "toy" / "table"
    folder.mkdir(parents=True, exist_ok=True)
    if picture is not None:
        (folder / "line.svg").write_text(picture)
    detail = {"rows": [{"a": 1}], "figures": [
        f"experiments/toy/table/line.{suffix}" for suffix in ("svg", "png")
    ]}  # fmt: skip
    record = make_record(variant, metric, 1, Conditions(), run_id=new_run_id(), detail=detail)
    environment = record.environment.model_copy(update={"commit": commit, "dirty": dirty})
    return record.model_copy(update={"environment": environment})


def test_record_and_figures_come_to_lie_beside_the_lesson(paper, own_home):
    files = ship_result(ran())
    names = ["results/table.records.jsonl", "results/table-line.svg"]
    assert files == [paper.directory / name for name in names]
    (record,) = read_records(files[0])
    assert record.detail == {"rows": [{"a": 1}], "figures": names[1:], "shipped": True}
    assert files[1].read_text() == "<svg/>"
    assert str(own_home) not in json.dumps(record.detail)


def test_a_run_on_another_track_lies_beside_it(paper, own_home):
    """Also where the track's name is no name for a file; the same track is replaced."""

    def shipped(track):
        conditions = Conditions(track=track)
        return [
            one.name for one in ship_result(ran().model_copy(update={"conditions": conditions}))
        ]

    expected = {"fashion_mini": "table", "cifar10": "table_cifar10", "../a b": "table__a_b"}
    for track, name in expected.items():
        assert shipped(track) == [f"{name}.records.jsonl", f"{name}-line.svg"]
    assert shipped("fashion_mini")[0] == "table.records.jsonl"
    assert len(list((paper.directory / "results").iterdir())) == 2 * len(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metric": "top1"}, "no experiment"),
        ({"dirty": True}, "commit, then run it again"),
        ({"commit": None}, "commit, then run it again"),
        ({"picture": None}, r"cannot read the figure .*line\.svg"),
        ({"picture": "x" * results.LIMIT}, r"take 1\.5 MB; at most 1\.5 MB"),
    ],
)
def test_what_cannot_be_vouched_for_does_not_ship(paper, own_home, options, words):
    with pytest.raises(ReplivitError, match=words):
        ship_result(ran(**options))
    assert not paper.directory.exists()
