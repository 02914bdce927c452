"""Experiments: run by name, figures saved, table recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import harness
from harness import experiment as experiment_module
from harness.errors import ReplivitError
from harness.experiment import ExperimentResult, Finding
from harness.paper import ExperimentSpec
from harness.record import RecordStore
from harness.registry import Experiment


class ToyPaper:
    key = "toy"

    def resolve(self, reference):
        return toy_table


def toy_table(
    scale: str, width: int = 2, sizes: Sequence[int] | None = None, device: str = "cpu"
) -> ExperimentResult:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([0, width])
    return ExperimentResult(
        rows=[{"width": width, "scale": scale} | ({"sizes": sizes} if sizes else {})],
        findings=[Finding("wider is wider", "reproduced", f"width {width}")],
        figures={"line": figure},
    )


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    spec = ExperimentSpec(run="experiments:table", title="Table 1")
    found = Experiment("toy/table", ToyPaper(), spec)
    monkeypatch.setattr(experiment_module, "get_experiment", lambda name: found)


def test_run_records_rows_findings_and_figures(own_home):
    result = harness.run("toy/table", scale="small", width=5)
    assert result.title == "Table 1"
    (record,) = RecordStore().load()
    assert record.metric == "experiment"
    assert record.detail["rows"] == [{"width": 5, "scale": "small"}]
    assert record.detail["findings"][0]["outcome"] == "reproduced"
    assert record.detail["options"] == {"width": "5"}
    files = [own_home / path for path in record.detail["figures"]]
    assert [path.suffix for path in files] == [".svg", ".png"]
    assert files[0].read_text().startswith("<?xml")
    assert not any(Path(path).is_absolute() for path in record.detail["figures"])


def test_figures_are_byte_identical_when_drawn_again(own_home):
    first = harness.run("toy/table").figure_files[0].read_bytes()
    assert harness.run("toy/table").figure_files[0].read_bytes() == first


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ReplivitError, match="cannot write figures"):
        experiment_module.save_figures(toy_table("small").figures, blocked / "x")


def test_findings_cannot_be_edited_later():
    finding = toy_table("small").findings[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        finding.outcome = "deviates"


def test_what_was_measured_is_kept_though_its_figures_are_not(own_home):
    (own_home / "experiments").write_text("in the way")
    with pytest.raises(ReplivitError, match="cannot write figures"):
        harness.run("toy/table", width=5)
    (record,) = RecordStore().load()
    assert record.detail["rows"][0]["width"] == 5 and record.detail["figures"] == []


def test_an_unknown_option_is_one_sentence_before_anything_runs():
    with pytest.raises(ReplivitError, match="takes no option 'depth'; it takes: width, sizes"):
        harness.run("toy/table", depth=3)


def test_options_are_brought_into_the_form_of_their_annotations():
    result = harness.run("toy/table", width="3", sizes="4,5")
    assert result.rows == [{"width": 3, "scale": "small", "sizes": (4, 5)}]
    assert "sizes" not in harness.run("toy/table", sizes=None).rows[0]
    with pytest.raises(ReplivitError, match="option width must be a whole number, not 'wide'"):
        harness.run("toy/table", width="wide")


def test_numbers_of_open_ended_experiments_too_and_names_stay_as_they_are(monkeypatch):
    def table(scale, share: float = 0.5, arms: Sequence[str] | None = None, **changes):
        return ExperimentResult(rows=[{"share": share, "arms": arms, **changes}])

    monkeypatch.setattr(ToyPaper, "resolve", lambda self, reference: table)
    result = harness.run("toy/table", share="5e-1", arms="inserted, untrained", epochs="3")
    assert result.rows == [{"share": 0.5, "arms": "inserted, untrained", "epochs": "3"}]
    with pytest.raises(ReplivitError, match="option share must be a number, not 'half'"):
        harness.run("toy/table", share="half")


def test_a_missing_device_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ReplivitError, match="no CUDA device is available"):
        harness.run("toy/table", device="cuda")
