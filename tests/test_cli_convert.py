"""`replivit convert`."""

from __future__ import annotations

import pytest
import torch
from data_tools import install_toy_paper
from typer.testing import CliRunner

import harness
from harness import registry
from harness.checkpoints import file_sha256, load_model, read_metadata
from harness.errors import ReplivitError
from replivit.cli.main import app

runner = CliRunner()


@pytest.fixture
def official(tmp_path, monkeypatch):
    """An official checkpoint of `toy_small`, and the model it stands for."""
    install_toy_paper(tmp_path / "papers", monkeypatch)
    torch.manual_seed(0)
    model = harness.build("toy_small").eval()
    names = {"body": "stem", "head": "fc"}
    state = {
        key.replace(part, names[part]): value
        for key, value in model.state_dict().items()
        for part in names
        if key.startswith(part)
    }
    torch.save({"model": state}, tmp_path / "official.pth")
    yield tmp_path / "official.pth", model
    registry.refresh()


@pytest.mark.parametrize("half", [False, True])
def test_convert(official, tmp_path, half):
    path, model = official
    target = tmp_path / "out" / "ours.safetensors"
    arguments = ["convert", "toy_small", str(path), str(target), *(["--half"] if half else [])]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "toy_small: 4 official keys; 4 keys matched, 100.0 % of the weights" in text
    assert file_sha256(target) in result.stdout.replace("\n", "")
    notes = read_metadata(target)
    assert (notes["variant"], notes["num_classes"]) == ("toy_small", "10")
    assert notes["official_sha256"] == file_sha256(path)
    loaded = load_model("toy_small", target)
    for key, value in loaded.state_dict().items():
        expected = model.state_dict()[key]
        expected = expected.half().to(value.dtype) if half else expected
        assert torch.equal(value, expected), key


def test_what_does_not_fit_is_not_written(official, tmp_path):
    path, _ = official
    target = tmp_path / "ours.safetensors"
    for arguments, words in (
        (["toy_big", str(path), str(target)], "does not fit toy_big.*it fits toy_small"),
        (["toy_small", str(path), str(tmp_path / "ours.pth")], "must end in .safetensors"),
        (["toy_small", str(tmp_path / "no.pth"), str(target)], "no weights file"),
    ):
        result = runner.invoke(app, ["convert", *arguments])
        assert result.exit_code != 0
        with pytest.raises(ReplivitError, match=words):
            raise result.exception
    assert not target.exists()
    assert not (tmp_path / "ours.pth").exists()
