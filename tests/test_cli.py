"""The command: help that helps, errors in one sentence, exit codes."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from harness.errors import ReplivitError
from replivit.cli import main as cli
from replivit.cli.commands import runs

runner = CliRunner()


def test_every_command_has_a_help_text():
    group = typer.main.get_command(cli.app)
    assert {"list", "info", "measure", "compare", "train", "leaderboard"} <= set(group.commands)
    for name, command in group.commands.items():
        assert command.help, f"{name} has no help"
        result = runner.invoke(cli.app, [name, "--help"])
        assert result.exit_code == 0, name


def test_list_and_info():
    listing = runner.invoke(cli.app, ["list"])
    assert listing.exit_code == 0
    assert "efficientformer" in listing.output
    one = runner.invoke(cli.app, ["info", "efficientformer"])
    assert "arXiv 2206.01191" in one.output
    variant = runner.invoke(cli.app, ["info", "efficientformer_l1"])
    assert "top1 79.2 %" in variant.output


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ReplivitError("the\nthing is <missing>"), 1, "error: the thing is <missing>"),
        (OSError(28, "No space left on device"), 1, "No space left"),
        (RuntimeError("can't allocate memory"), 1, "RuntimeError: can't allocate memory"),
    ],
)
def test_errors_end_in_one_sentence(monkeypatch, capsys, error, code, words):
    def fail():
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_long_path_stays_whole(monkeypatch, capsys):
    path = "/a/rather/long/path" * 9

    def fail():
        raise ReplivitError(f"cannot read {path}")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert path in capsys.readouterr().err


def test_ctrl_c_says_what_is_kept(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.registry.papers", interrupted)
    result = runner.invoke(cli.app, ["list"])
    assert result.exit_code == 130
    assert "already measured is kept" in result.stderr


def test_typo_ends_with_a_suggestion_and_a_non_zero_exit():
    done = subprocess.run(
        [sys.executable, "-m", "replivit", "info", "efficientformer_l2"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "did you mean" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("width", "words"), [(30, "first\n  b: 2; c: long words; d: 4"), (200, "a       b  c  ")]
)
def test_tables_of_many_columns_are_paragraphs_on_a_narrow_terminal(monkeypatch, width, words):
    console = Console(width=width, record=True, file=io.StringIO())
    monkeypatch.setattr(runs, "out", console)
    row = {"a": "first", "b": 2, "c": "long words", "d": 4.0, "e": None, "f": "", "g": "g" * 20}
    runs.print_rows([row, {**row, "a": "second"}])
    assert words in console.export_text()
