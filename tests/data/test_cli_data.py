"""`replivit data`."""

from __future__ import annotations

import pytest
from data_tools import encoded, image_of, write_parquet
from PIL import Image
from typer.testing import CliRunner

from harness.data import load_split
from harness.data.pictures import contact_sheet
from harness.errors import ReplivitError
from replivit.cli.console import out
from replivit.cli.main import app

runner = CliRunner()


def words(text):
    return " ".join(text.split())


def test_overview(tmp_path, monkeypatch):
    monkeypatch.setattr(out, "_width", 400)
    monkeypatch.setenv("REPLIVIT_DATA", str(tmp_path))
    result = runner.invoke(app, ["data"])
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: words(line) for line in result.stdout.splitlines()}
    assert "10,000 train + 5,000 test 10 here:" in lines["fashion_mini"]
    assert lines["fashion_mini"].endswith("(package)")
    assert f"not here; looked in {tmp_path}/cifar10" in lines["cifar10"]
    assert "hub:uoft-cs/cifar10" in lines["cifar10"]
    assert "1,281,167 train + 50,000 test 1000 not here" in lines["imagenet"]


def test_one_track(tmp_path):
    sheet = tmp_path / "sheet.png"
    result = runner.invoke(app, ["data", "fashion_mini", "--contact-sheet", str(sheet)])
    assert result.exit_code == 0, result.output
    assert "train: 10,000 images, 10 classes>, 1,000 per class" in result.stdout
    assert load_split("fashion_mini", "test").fingerprint in result.stdout
    assert "epochs 12" in words(result.stdout)
    with Image.open(sheet) as picture:
        assert min(picture.size) > 300


def test_a_file_of_ones_own(tmp_path):
    images = [encoded(image_of(label)) for label in (0, 1, 1)]
    path = write_parquet(tmp_path / "x.parquet", images, [0, 1, 1], ["a", "b"])
    result = runner.invoke(app, ["data", str(path), "--fingerprint"])
    assert result.exit_code == 0, result.output
    assert "3 images, 2 classes>, 1 to 2 per class" in words(result.stdout)
    assert load_split(path).fingerprint in result.stdout
    assert "classes: a, b" in result.stdout


def test_a_folder_with_one_split_says_what_is_missing(tmp_path):
    write_parquet(tmp_path / "set" / "test.parquet", [encoded(image_of(0))], [0], ["a"])
    result = runner.invoke(app, ["data", str(tmp_path / "set")])
    assert result.exit_code == 0, result.output
    assert "train:" in result.stderr
    assert "has no split 'train'" in words(result.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imagenett"], "did you mean imagenet"),
        (["imagenet"], "is not on this machine"),
        (["--contact-sheet", "x.png"], "name the track"),
        (["fashion_mini", "--contact-sheet", "/nowhere/x.png"], "cannot write /nowhere/x.png"),
    ],
)
def test_mistakes(arguments, message):
    result = runner.invoke(app, ["data", *arguments])
    assert result.exit_code != 0
    with pytest.raises(ReplivitError, match=message):
        raise result.exception


def test_contact_sheet_puts_each_class_into_its_row(tmp_path):
    images = [encoded(image_of(label, size=(8, 8))) for label in (0, 5, 0, 10)]
    path = write_parquet(tmp_path / "x.parquet", images, [0, 1, 0, 2], ["a", "b", "c"])
    axes = contact_sheet(load_split(path), columns=2, rows=2).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]
    sheet = axes.images[0].get_array()
    cells = [int(sheet[row * 98 + 49, column * 98 + 49, 0]) for row in (0, 1) for column in (0, 1)]
    assert cells == [0, 0, 100, 255]
