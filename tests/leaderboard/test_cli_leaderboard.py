"""The commands `leaderboard`, `rerun`, `run` and `schema`, as a user meets them."""

import json
from types import SimpleNamespace

import pytest
from display_case import make_case, make_paper, record
from typer.testing import CliRunner

from harness import registry
from harness.errors import ReplivitError
from harness.experiment import ExperimentResult, Finding
from harness.record import RecordStore
from replivit.cli import console
from replivit.cli.main import app


@pytest.fixture
def case(tmp_path, home, monkeypatch):
    """A registry with made-up papers, and their records in REPLIVIT_HOME."""
    papers, store = make_case(tmp_path, 5, machines=("AMD EPYC 9R14 x2",))
    table = {paper.key: paper for paper in papers}
    monkeypatch.setattr(registry, "_discover", lambda: table)
    registry._variant_table.cache_clear()
    RecordStore().append(store.load())
    monkeypatch.setattr("leaderboard.site.all_figures", lambda board: {})  # seconds a time
    monkeypatch.setattr(console.out, "_width", 200)
    yield home
    registry._variant_table.cache_clear()


def invoke(*words):
    return CliRunner().invoke(app, list(words))


def test_leaderboard_without_measuring_prints_the_table_and_the_path(case):
    found = invoke("leaderboard", "--no-measure")
    assert found.exit_code == 0, found.output
    assert "model_cnn_02" in found.stdout and "out of memory" in found.stdout
    assert str(case / "site" / "index.html") in found.stdout.replace("\n", "")
    assert (case / "site" / "papers" / "large.html").is_file()


def test_leaderboard_measures_what_is_missing_first(case, monkeypatch):
    asked = {}

    def run_sweep(cells, store, progress, **options):
        asked.update(cells=cells, options=options)
        store.append([record("model_cnn_02", "params", 123_000_000, day=99)])
        return SimpleNamespace(measured=1, skipped=0, statuses={}, seconds=1.0, failures=[])

    monkeypatch.setattr("harness.sweep.run_sweep", run_sweep)
    found = invoke("leaderboard", "--only", "large")
    assert found.exit_code == 0, found.output
    assert {cell.variant for cell in asked["cells"]} == {f"model_{x}" for x in
        ("trans_00", "hybri_01", "cnn_02", "trans_03", "hybri_04")}  # fmt: skip
    assert asked["options"] == {"budget_minutes": 10.0}
    assert "123" in found.stdout, "the page is built from what was just measured"


def test_stopping_the_measuring_still_builds_the_page(case, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.sweep.run_sweep", stop)
    found = invoke("leaderboard")
    assert found.exit_code != 0 and (case / "site" / "index.html").is_file()


def test_against_prints_what_changed(case):
    invoke("leaderboard", "--no-measure")
    RecordStore().append([record("model_cnn_02", "macs", 1, day=9)])
    old = str(case / "site" / "leaderboard.json")
    found = invoke("leaderboard", "--no-measure", "--against", old)
    assert "1 significant changes" in found.stdout and "counts are exact" in found.stdout


@pytest.mark.parametrize(
    "words, sentence",
    [(["leaderboard", "--against", "nowhere.json"], "cannot read"),
     (["leaderboard", "--no-measure", "--only", "lorge"], "did you mean large"),
     (["rerun", "lorge"], "did you mean large"),
     (["run", "large/swoop"], "did you mean large/sweep"),
     (["run", "large/sweep", "--set", "x"], "key=value")],
)  # fmt: skip
def test_wrong_words_are_one_sentence_and_nothing_is_measured(case, monkeypatch, words, sentence):
    monkeypatch.setattr("harness.sweep.run_sweep", lambda *_, **__: pytest.fail("measured"))
    found = invoke(*words)
    assert found.exit_code != 0
    assert isinstance(found.exception, ReplivitError) and sentence in str(found.exception)


def result(**changes):
    """What an experiment returns."""
    fields = {
        "rows": [{"size": 224, "ms": 1.23456, "[b]": None}],
        "findings": [Finding("It is [bold]faster", "reproduced", "2.0x")],
        "published": [{"size": 224, "ms": 1.5}], "notes": "A note.",
    }  # fmt: skip
    return ExperimentResult(**{**fields, **changes})


@pytest.fixture
def experiment(case, monkeypatch):
    """Make `large/sweep` run the given function."""
    return lambda function: monkeypatch.setattr(
        registry.Paper, "resolve", lambda self, reference: function
    )


def test_run_prints_rows_findings_and_records_them(case, experiment):
    given = {}
    experiment(lambda scale, **options: given.update(scale=scale, **options) or result())
    words = ("run", "large/sweep", "--scale", "paper", "--set", "rounds=3", "--set", "on=true")
    found = invoke(*words)
    assert found.exit_code == 0, found.output
    assert given == {"scale": "paper", "rounds": 3, "on": True}
    for words in ("1.235", "It is [bold]faster", "reproduced", "As the paper prints it", "A note."):
        assert words in found.stdout, words
    assert [one.metric for one in RecordStore() if one.variant == "large/sweep"] == ["experiment"]


def test_rerun_gives_a_verdict_per_published_number(case, experiment):
    experiment(lambda scale: result())
    found = invoke("rerun", "large", "--no-measure")
    assert found.exit_code == 0, found.output
    assert "It is [bold]faster" in found.stdout
    lines = [line for line in found.stdout.splitlines() if line.startswith("model_cnn_02")]
    assert len(lines) == 4 and sum("not measured" in line for line in lines) == 2
    assert "reproduced" in found.stdout and "belongs to a device" in found.stdout


def test_rerun_survives_a_broken_experiment_and_says_so(case, experiment):
    def broken(scale):
        raise RuntimeError("no such operator")

    experiment(broken)
    found = invoke("rerun", "large", "--no-measure")
    assert found.exit_code == 1 and "large/sweep failed: no such operator" in found.stderr
    assert "reproduced" in found.stdout, "the ledger is printed all the same"
    assert invoke("rerun", "large", "--no-measure", "--no-experiments").exit_code == 0


def test_schema_is_json_schema_of_a_record():
    found = json.loads(invoke("schema").stdout)
    assert found["title"] == "Record" and "run_id" in found["required"]


def test_make_paper_is_a_paper(tmp_path):
    assert make_paper(tmp_path, "p").facts.variants["p_a"].image_size == 224
