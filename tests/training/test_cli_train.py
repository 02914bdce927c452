"""`replivit train`: flags, several seeds, records, shipping, and errors in one sentence."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from harness.errors import ReplivitError
from harness.record import RecordStore
from replivit.cli.main import app

runner = CliRunner()


def command(*arguments: str):
    return runner.invoke(app, ["train", *arguments])


def toy(data: str, *arguments: str):
    return command("toy_net", "--track", data, "--batch-size", "24", "--epochs", "2", "--quiet",
                   *arguments)  # fmt: skip


def test_seeds_are_trained_and_recorded_once(toy_paper, toy_data, tmp_path):
    flags = ("--seeds", "0,1", "--out", str(tmp_path / "runs"), "--lr", "0.01",
             "--set", "label_smoothing=0.2", "--evaluate-every", "1")  # fmt: skip
    done = toy(toy_data, *flags)
    assert done.exit_code == 0, done.output
    assert "top-1 over 2 seeds" in done.output
    stored = RecordStore().load()
    assert {record.conditions.seed for record in stored} == {0, 1}
    recipe = stored[0].detail["recipe"]
    assert (recipe["lr"], recipe["label_smoothing"], recipe["epochs"]) == (0.01, 0.2, 2)
    assert "top1" in (tmp_path / "runs" / "seed1" / "log.csv").read_text()
    # the same command reads the finished runs back and records nothing twice
    assert toy(toy_data, *flags).exit_code == 0
    assert len(RecordStore().load()) == len(stored)


def test_ship(toy_paper):
    done = command("toy_ship", "--batch-size", "1000", "--epochs", "1", "--quiet", "--ship")
    assert done.exit_code == 0, done.output
    (weights,) = (toy_paper / "weights").glob("*.safetensors")
    assert weights.name in done.output.replace("\n", "")
    # paper.yaml is the author's: the line to add is said
    assert "weights: {fashion_mini: weights/toy_ship_fashion_mini.safetensors}" in done.output


def test_a_teacher_by_name(toy_paper, toy_data, tmp_path):
    assert toy(toy_data, "--out", str(tmp_path / "teacher")).exit_code == 0
    done = toy(
        toy_data, "--teacher", "toy_net", "--distillation", "soft", "--out", str(tmp_path / "s"),
        "--teacher-weights", str(tmp_path / "teacher" / "weights.safetensors"),
        "--option", "drop_path_rate=0.1",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    record = RecordStore().load()[-1]
    assert record.conditions.options == {"drop_path_rate": 0.1}
    told = record.detail["training"]
    assert told["objective"]["teacher"] == "toy_net" and len(told["objective"]["weights"]) == 64
    assert told["recipe"]["distillation"] == "soft"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--set", "lr"], "write key=value"),
        (["--set", "speed=3"], "speed: no such key"),
        (["--set", "lr=["], "cannot be read"),
        (["--seeds", "0,x"], "whole numbers with commas"),
        (["--seeds", "1,1"], "stands twice"),
        (["--teacher-weights", "file"], "needs --teacher"),
        (["--teacher", "toy_nut", "--distillation", "hard"], "no variant and no timm model"),
        (["--teacher", "toy_net"], "does not say how to distil"),
        (["--recipe", "nothing"], "no recipe 'nothing'"),
        (["--option", "depth=2"], "takes no option 'depth'"),
        (["--init", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--mixed-precision", "fp8"], "mixed_precision"),
    ],
)
def test_mistakes(toy_paper, toy_data, flags, words):
    done = toy(toy_data, *flags)
    assert done.exit_code != 0
    assert isinstance(done.exception, ReplivitError)
    assert words in str(done.exception)


def test_unknown_variant():
    done = command("vit_mikro")
    assert done.exit_code != 0 and "did you mean" in str(done.exception)
