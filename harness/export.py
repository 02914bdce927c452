"""A variant as one file for other runtimes: a `torch.export` program or ONNX.

The batch stays free, the image size is fixed. What was written is read back and compared with the
model on images it was not traced with; a file that computes something else is not left behind.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.deployment import TOLERANCE, relative_error
from harness.errors import ReplivitError, one_line

SUFFIXES = (".pt2", ".onnx")
ONNX_PACKAGES = ("onnx", "onnxscript")


@dataclass(frozen=True)
class Exported:
    """The file, its size in bytes and its relative error (None: no runtime here to check with)."""

    path: Path
    size: int
    relative_error: float | None


def check_target(path: Path | str) -> Path:
    """The path, if it can be written as what its suffix says; checked before any work is done.

    Raises:
        ReplivitError: another suffix, no such folder, or packages for ONNX are missing.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ReplivitError(f"{path} must end in .pt2 (torch.export) or .onnx")
    if not path.parent.is_dir():
        raise ReplivitError(f"no folder {path.parent}")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise ReplivitError(
            f"ONNX needs {' and '.join(missing)}: pip install 'replivit[export]', or write a .pt2"
        )
    return path


def export(model: nn.Module, path: Path | str, image_size: int | tuple[int, int]) -> Exported:
    """Write `model` (in eval mode) to `path`, `.pt2` or `.onnx`, and check the file.

    Args:
        image_size: pixels; the file takes float32 images `(B, 3, H, W)` of that size, any `B`.

    Raises:
        ReplivitError: the model cannot be traced, the file cannot be written, or computes
            something else.
    """
    path = check_target(path)
    model = model.eval()
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    generator = torch.Generator().manual_seed(0)
    traced, others = (torch.randn(n, 3, height, width, generator=generator) for n in (2, 3))
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=".export-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        program = _trace(model, traced)
        (_write_onnx if path.suffix == ".onnx" else torch.export.save)(program, temporary)
        with torch.no_grad():
            expected = model(others)
        error = _error_of(temporary, others, expected)
        if error is not None and not error <= TOLERANCE:
            raise ReplivitError(
                f"the exported file computes something else: relative error {error:.1e}, "
                f"allowed {TOLERANCE:.0e}; nothing was written"
            )
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise ReplivitError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(path, path.stat().st_size, error)


def _trace(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    # without an upper end, torch 2.6 finds that the batch might be its own infinity, and gives up
    batch = torch.export.Dim("batch", min=1, max=2**31 - 1)
    try:
        with torch.no_grad():
            return torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch.export has no common error class
        raise ReplivitError(f"torch.export cannot trace the model: {one_line(error)}") from error


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own deprecated internals
        try:
            onnx = torch.onnx.export(
                program, input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
            )
        except Exception as error:  # nor has the ONNX exporter
            raise ReplivitError(f"the ONNX exporter failed: {one_line(error)}") from error
    onnx.save(path, external_data=False)


def _error_of(path: Path, images: Tensor, expected: Tensor) -> float | None:
    """Relative error of what the file computes; None where nothing here can run it."""
    if path.suffix == ".pt2":
        with torch.no_grad():
            return relative_error(torch.export.load(path).module()(images), expected)
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return relative_error(torch.from_numpy(logits), expected)
