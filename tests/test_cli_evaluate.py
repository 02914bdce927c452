"""`replivit evaluate`."""

from __future__ import annotations

import pytest
import torch
from data_tools import install_toy_paper, small_cifar
from typer.testing import CliRunner

import harness
from harness import registry
from harness.checkpoints import save_weights
from harness.data import sources
from harness.errors import ReplivitError
from harness.record import RecordStore
from replivit.cli.main import app
from replivit.cli.units import value_text

runner = CliRunner()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The paper `toy` with shipped weights, and forty images as its track."""
    directory = install_toy_paper(tmp_path / "papers", monkeypatch)
    torch.manual_seed(0)
    save_weights(harness.build("toy_small"), directory / "weights" / "toy_small.safetensors")
    track = small_cifar(tmp_path)
    monkeypatch.setattr(sources, "get_track", lambda name: track)
    yield tmp_path
    registry.refresh()


def test_evaluate_prints_and_keeps_the_records(place):
    result = runner.invoke(app, ["evaluate", "toy_small", "--data", str(place)])
    assert result.exit_code == 0, result.output
    records = RecordStore().load()
    assert [record.metric for record in records] == ["top1", "top5"]
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    for record in records:
        assert value_text(record) in rows[record.metric]
    assert "records.jsonl" in result.stderr


def test_options_reach_the_evaluation(place):
    arguments = ["evaluate", "toy_small", "--data", str(place), "--limit", "10", "--split", "train"]
    result = runner.invoke(app, [*arguments, "--dtype", "bfloat16", "--no-save"])
    assert result.exit_code == 0, result.output
    assert RecordStore().load() == []
    result = runner.invoke(app, [*arguments, "--set", "width=4"])
    record = RecordStore().load()[0]
    assert record.conditions.options == {"width": 4, "limit": 10, "split": "train"}
    assert record.n == 10
    runner.invoke(app, [*arguments, "--backend", "deploy"])
    assert RecordStore().load()[-1].conditions.backend == "deploy"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["toy_smal"], "did you mean toy_small"),
        (["toy_big"], "ships no weights"),
        (["toy_small", "--weights", "nowhere.pth"], "no weights file nowhere.pth"),
        (["toy_small", "--track", "cifar11"], "no folder or parquet file|no track"),
    ],
)
def test_mistakes(place, arguments, words):
    result = runner.invoke(app, ["evaluate", *arguments, "--data", str(place)])
    assert result.exit_code != 0
    with pytest.raises(ReplivitError, match=words):
        raise result.exception
    assert RecordStore().load() == []
