"""A run's files: written whole or not at all, so that `kill -9` never leaves half of one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import ReplivitError, one_line

CHECKPOINT = "checkpoint.pt"
IDENTITY = "run.json"


def write_whole(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: a temporary file beside it, flushed to disk, then renamed.

    Raises:
        ReplivitError: it cannot be written (full disk, ...); the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ReplivitError(f"cannot write {path}: {error.strerror or error}") from error


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Write the state (tensors, numbers, strings and containers of them) of a run."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(directory / CHECKPOINT, buffer.getvalue())


def load_checkpoint(directory: Path) -> dict[str, Any] | None:
    """The state of a run, or None if it has none yet. Never unpickles freely.

    Raises:
        ReplivitError: the file is damaged.
    """
    path = directory / CHECKPOINT
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise ReplivitError(
            f"cannot read {path} ({one_line(error)[:120]}); remove it to train from the start"
        ) from error


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items: dict[str, Any] = {}
        for key, inner in value.items():
            items.update(_flat(inner, f"{path}.{key}" if path else str(key)))
        return items
    return {path: value}


def claim(directory: Path, identity: dict[str, Any]) -> None:
    """Say in `run.json` which run this directory holds, or check that it is the same one.

    Raises:
        ReplivitError: the directory holds another run; the first difference is named.
    """
    path = directory / IDENTITY
    identity = json.loads(json.dumps(identity, default=str))
    if not path.exists():
        write_whole(path, json.dumps(identity, indent=2).encode())
        return
    try:
        before = _flat(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ReplivitError(f"cannot read {path} ({one_line(error)}); remove the folder") from error
    now = _flat(identity)
    for key in [*before, *now]:
        if before.get(key) != now.get(key):
            hint = " (seed torch before you build a module)" if key == "initial_weights" else ""
            raise ReplivitError(
                f"{directory} holds a run with {key} = {before.get(key)}, asked for is "
                f"{now.get(key)}{hint}; choose another directory or remove this one"
            )
