"""`replivit measure`, `compare` and `sweep` as their users meet them."""

from __future__ import annotations

import subprocess
import sys

import bench_paper
import pytest
from rich.console import Console
from typer.testing import CliRunner

import harness
from harness import sweep
from harness.errors import ReplivitError
from harness.measurement.cell import Cell
from harness.measurement.comparison import Comparison
from harness.record import Conditions, make_record
from harness.statistics import mcnemar
from harness.sweep import Step, Summary
from replivit.cli.commands.measure import parse_options
from replivit.cli.main import app
from replivit.cli.sweep_progress import SweepProgress, headline, minutes, print_summary
from replivit.cli.units import interval_text, value_text

SMALL = "benchpaper_small"
runner = CliRunner()


@pytest.fixture(autouse=True, scope="module")
def bench(tmp_path_factory):
    with bench_paper.installed(tmp_path_factory.mktemp("bench")):
        yield


def record(metric: str, value, variant: str = SMALL, **fields):
    return make_record(variant, metric, value, Conditions(), run_id="x", **fields)


def test_measure_prints_a_table_and_hands_options_on(monkeypatch):
    asked = {}

    def measure(name, metrics, **options):
        asked.update(options, name=name, metrics=metrics)
        return [
            record("latency", 0.0334, interval=(0.0329, 0.034)),
            record("latency_ratio", 1.02, interval=(1.0, 1.05), status="noisy", reason="[wide]"),
        ]

    monkeypatch.setattr(harness, "measure", measure)
    arguments = ["--metrics", "latency", "--batch-size", "8", "--backend", "deploy"]
    options = ["--set", "width=4", "--set", "a=x"]
    result = runner.invoke(app, ["measure", SMALL, *arguments, *options])
    assert result.exit_code == 0, result.output
    assert "33.4 ms" in result.stdout and "32.9 to 34" in result.stdout
    assert "noisy: [wide]" in result.stdout
    assert asked["metrics"] == ("latency",) and asked["batch_size"] == 8
    assert asked["options"] == {"width": 4, "a": "x"}
    assert f"records: {asked['store'].file}\n" in result.stderr


def test_measure_ends_with_1_when_a_model_failed(monkeypatch):
    failed = record("latency", None, status="timeout", reason="not done after 9 s")
    monkeypatch.setattr(harness, "measure", lambda *a, **k: [failed])
    result = runner.invoke(app, ["measure", SMALL])
    assert result.exit_code == 1
    assert "timeout: not done after 9 s" in " ".join(result.stdout.split())


def test_a_typo_in_the_last_name_stops_before_measuring(monkeypatch):
    monkeypatch.setattr(harness, "measure", lambda *a, **k: pytest.fail("measured"))
    result = runner.invoke(app, ["measure", SMALL, "benchpaper_smal"])
    assert isinstance(result.exception, ReplivitError)
    assert "did you mean benchpaper_small" in str(result.exception)


def test_set_needs_key_and_value():
    assert parse_options(["a=1.5", "b=[1, 2]", "c="]) == {"a": 1.5, "b": [1, 2], "c": None}
    kept = {"a": None, "b": True, "c": [1, 2], "d": "x"}  # an experiment's options as recorded
    assert parse_options([f"{key}={value}" for key, value in kept.items()]) == kept
    for wrong in ("a", "=1"):
        with pytest.raises(ReplivitError, match="key=value"):
            parse_options([wrong])


def comparison(**changes) -> Comparison:
    fields = {
        "a": SMALL, "b": "benchpaper_wide", "ratio": 1.5, "interval": (1.4, 1.6),
        "verdict": "a is faster", "status": "ok", "reason": None,
        "records": (record("latency", 0.001, interval=(0.001, 0.002)),),
    }  # fmt: skip
    return Comparison(**{**fields, **changes})


def test_compare_prints_the_verdict(monkeypatch):
    test = mcnemar([1] * 90 + [0] * 10, [1] * 60 + [0] * 40)
    found = comparison(accuracy=test, track="fashion_mini", status="contended", reason="busy")
    monkeypatch.setattr(harness, "compare", lambda *a, **k: found)
    result = runner.invoke(app, ["compare", SMALL, "benchpaper_wide"])
    assert result.exit_code == 0, result.output
    assert "latency: a is faster" in result.stdout
    assert "1 ms" in result.stdout
    assert "top-1 on fashion_mini: +30.00 points" in result.stdout
    assert "they differ" in result.stdout
    assert "contended: busy" in result.stderr


def test_compare_without_a_ratio_ends_with_1(monkeypatch):
    found = comparison(ratio=None, interval=None, verdict="could not be compared: x", records=())
    monkeypatch.setattr(harness, "compare", lambda *a, **k: found)
    result = runner.invoke(app, ["compare", SMALL, SMALL])
    assert result.exit_code == 1
    assert "could not be compared: x" in result.stderr


def test_sweep_of_a_paper_dry_and_for_real(monkeypatch):
    result = runner.invoke(app, ["sweep", "benchpaper", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "benchpaper_wide latency deploy" in result.stderr
    assert f"{5 * len(bench_paper.NAMES)} of" in result.stderr

    def run_sweep(cells, store, progress, **options):
        failed = record("latency", None, status="failed", reason="unwell")
        progress(Step(cells[0], 0, 1, 90.0))
        progress(Step(cells[0], 1, 1, 0.0, (failed,)))
        return Summary(measured=1, skipped=4, seconds=61, records=[failed])

    monkeypatch.setattr(sweep, "run_sweep", run_sweep)
    result = runner.invoke(app, ["sweep", SMALL])
    assert result.exit_code == 1
    assert "1 cells measured in 1 min 01 s, 4 were already there" in result.stderr
    assert "benchpaper_small, latency: unwell" in result.stderr


def test_sweep_names_what_it_does_not_know():
    result = runner.invoke(app, ["sweep", "benchpapr"])
    assert isinstance(result.exception, ReplivitError)


def test_the_program_ends_in_one_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "replivit", "measure", "no_such_variant"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: no variant 'no_such_variant'")
    assert "Traceback" not in done.stderr


def console() -> Console:
    return Console(record=True, width=100, force_terminal=False)


def test_progress_away_from_a_terminal_is_a_line_per_cell():
    screen = console()
    cell = Cell(SMALL, "latency")
    done = (record("latency", 0.0334, status="noisy", reason="r"), record("latency_ratio", 0.5))
    with SweepProgress(screen) as progress:
        progress(Step(cell, 0, 2, 100.0))
        progress(Step(cell, 1, 2, 50.0, done))
        progress(Step(cell, 2, 2, 0.0, (record("latency", None, status="failed", reason="[x]"),)))
    text = screen.export_text()
    assert "[1/2] benchpaper_small latency eager: 33.4 ms, 0.5 x (noisy)" in text
    assert "benchpaper_small latency eager: [x]" in text


def test_progress_on_a_terminal_shows_bar_cell_and_time_left():
    screen = Console(record=True, width=120, force_terminal=True)
    with SweepProgress(screen) as progress:
        progress(Step(Cell(SMALL, "latency"), 3, 9, 100.0))
    text = screen.export_text()
    assert "3/9" in text and "benchpaper_small latency eager" in text
    assert "about 1 min 40 s left" in text


def test_summary_counts_what_is_doubtful():
    screen = console()
    print_summary(Summary(measured=3, statuses={"ok": 1, "noisy": 2}, seconds=59.6), screen)
    assert screen.export_text().strip() == "3 cells measured in 1 min 00 s, 2 noisy"


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("params", 5_717_416, "5.717 M params"),
        ("params_trainable", 5_717_416, "5.717 M params"),
        ("macs", 1_253_683_200, "1.254 GMACs"),
        ("macs_paper", 12_000_000, "12 MMACs"),
        ("latency", 0.03342, "33.42 ms"),
        ("first_call", 89.8, "89.8 s"),
        ("latency", 2e-5, "0.02 ms"),
        ("latency_ratio", 0.98765, "0.9877 x"),
        ("memory_training", 3 * 2**20, "3 MiB"),
        ("memory_training", 3 * 2**29, "1.5 GiB"),
        ("top1", 91.26, "91.26 %"),
        ("images_seen", 3_000_000, "3 M images"),
        ("experiment", 4, "4 table"),
    ],
)
def test_values_are_shown_in_peoples_units(metric, value, text):
    assert value_text(record(metric, value)) == text


def test_intervals_share_the_values_unit():
    assert interval_text(record("latency", 0.033, interval=(0.03, 0.04))) == "30 to 40"
    assert interval_text(record("params", 5)) == ""
    failed = record("latency", None, status="failed", reason="r")
    assert (value_text(failed), interval_text(failed)) == ("failed", "")
    assert headline((failed,)) == "failed (failed)"
    assert minutes(200) == "3 min 20 s" and minutes(9.6) == "10 s"
