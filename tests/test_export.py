"""Variants as files for other runtimes."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from typer.testing import CliRunner

import harness
from harness.errors import ReplivitError
from harness.export import export
from replivit.cli.main import app


def tiny():
    torch.manual_seed(0)
    model = harness.build("vit_micro", depth=1).eval()
    torch.nn.init.normal_(model.head.weight)  # it starts at zero
    return model


@pytest.fixture
def without_onnx(monkeypatch):
    """An installation without the extra `export`."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if "onnx" in name else find(name, *rest),
    )


def test_program_computes_the_same_for_any_batch(tmp_path):
    model = tiny()
    done = export(model, tmp_path / "vit.pt2", 32)
    assert done.relative_error <= 1e-5 and done.size == (tmp_path / "vit.pt2").stat().st_size
    program = torch.export.load(tmp_path / "vit.pt2").module()
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(program(images), model(images))
    assert [one.name for one in tmp_path.glob("*.pt2")] == ["vit.pt2"]


def test_command_writes_the_deployed_form(tmp_path):
    target = tmp_path / "vit.pt2"
    result = CliRunner().invoke(app, ["export", "vit_micro", str(target), "--deploy"])
    assert result.exit_code == 0, result.output
    assert "equal to the model" in result.stdout
    logits = torch.export.load(target).module()(torch.randn(4, 3, 32, 32))
    assert logits.shape == (4, 10)


def test_command_takes_the_weights_it_is_given(tmp_path):
    from harness.checkpoints import save_weights

    model = tiny()
    save_weights(model, tmp_path / "w.safetensors", metadata={"variant": "vit_micro"})
    target = tmp_path / "vit.pt2"
    arguments = ["export", "vit_micro", str(target), "--set", "depth=1", "--weights"]
    result = CliRunner().invoke(app, [*arguments, str(tmp_path / "w.safetensors")])
    assert result.exit_code == 0, result.output
    assert "random" not in result.output
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.export.load(target).module()(images), model(images))


@pytest.mark.parametrize(
    ("name", "message"),
    [("vit.txt", r"must end in \.pt2"), ("no/vit.pt2", "no folder"), ("vit.onnx", "pip install")],
)
def test_what_cannot_be_written_is_one_sentence(tmp_path, without_onnx, name, message):
    with pytest.raises(ReplivitError, match=message):
        export(tiny(), tmp_path / name, 32)
    assert list(tmp_path.rglob("vit*")) == []


class Moody(torch.nn.Module):
    """Computes something else when it is traced than when it runs."""

    def forward(self, images):
        scale = 2.0 if torch.compiler.is_compiling() else 1.0
        return scale * images.mean((2, 3))


def test_a_file_that_computes_something_else_is_not_kept(tmp_path):
    with pytest.raises(ReplivitError, match=r"computes something else: relative error 1\.0e\+00"):
        export(Moody(), tmp_path / "moody.pt2", 8)
    assert list(tmp_path.glob("*.pt2")) == []


class Branching(torch.nn.Module):
    def forward(self, images):
        return images if images.sum() > 0 else -images


def test_a_model_that_cannot_be_traced_is_one_sentence(tmp_path):
    with pytest.raises(ReplivitError, match=r"torch\.export cannot trace the model") as caught:
        export(Branching(), tmp_path / "branch.pt2", 8)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("*.pt2")) == []


def test_onnx_runs_in_onnxruntime(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    done = export(tiny(), tmp_path / "vit.onnx", 32)
    assert done.relative_error is not None and done.relative_error <= 1e-5
