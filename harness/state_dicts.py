"""Files of weights: reading without unpickling, writing whole or not at all, SHA-256."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.errors import ReplivitError, one_line

#: Where training scripts keep the weights in a checkpoint; the raw ones go before averaged ones.
WRAPPERS = (
    "state_dict", "model", "model_state_dict", "module", "net", "state_dict_ema", "model_ema",
)  # fmt: skip
#: Prefixes that DistributedDataParallel and torch.compile leave on every key.
PREFIXES = ("module.", "_orig_mod.")
State = dict[str, Tensor]


class CfgNode:
    """Settings that yacs left in a checkpoint, read as a plain dict; yacs need not be there."""

    __module__ = "yacs.config"  # the name by which the file asks for it

    def __new__(cls) -> OrderedDict:
        return OrderedDict()


def file_sha256(path: Path | str) -> str:
    """SHA-256 of a file.

    Raises:
        ReplivitError: the file cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise ReplivitError(f"cannot read {path}: {error.strerror}") from error


def read_state_dict(path: Path | str, prefer: str | None = None) -> State:
    """The weights in a safetensors file or a torch checkpoint, on the CPU, unwrapped.

    Args:
        prefer: as in `unwrap`.

    Raises:
        ReplivitError: missing, truncated, no checkpoint, or more than tensors inside.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ReplivitError(f"no weights file {path}")
    if not _is_safetensors(path):
        return unwrap(_read_torch(path), str(path), prefer)
    try:
        with safe_open(path, framework="pt") as stream:
            found = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ReplivitError(
            f"{path} is truncated or no safetensors file ({one_line(error)})"
        ) from error
    return unwrap(found, str(path))


def read_metadata(path: Path | str) -> dict[str, str]:
    """The notes in a safetensors file's header (see `save_weights`); empty for other files.

    Raises:
        ReplivitError: the file is damaged.
    """
    path = Path(path).expanduser()
    if not path.is_file() or not _is_safetensors(path):
        return {}
    try:
        with safe_open(path, framework="pt") as stream:
            return dict(stream.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ReplivitError(
            f"{path} is truncated or no safetensors file ({one_line(error)})"
        ) from error


def _is_safetensors(path: Path) -> bool:
    """By name, or by content: eight bytes of length, then a JSON header."""
    try:
        with open(path, "rb") as stream:
            return path.suffix == ".safetensors" or stream.read(9)[8:] == b"{"
    except OSError as error:
        raise ReplivitError(f"cannot read {path}: {error.strerror}") from error


def _read_torch(path: Path) -> Any:
    # training scripts keep their settings beside the weights; both kinds hold plain values
    with torch.serialization.safe_globals([argparse.Namespace, CfgNode]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # torch raises many types for what is no checkpoint
            if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
                raise ReplivitError(
                    f"{path} holds more than tensors and was not loaded, since unpickling it could "
                    "run any program; if you trust it, save its state dict as safetensors"
                ) from error
            raise ReplivitError(f"{path} is truncated or no torch checkpoint") from error


def unwrap(found: Any, origin: str, prefer: str | None = None) -> State:
    """The state dict inside a training checkpoint, without wrappers and their key prefixes.

    Args:
        prefer: the wrapper to look into first.

    Raises:
        ReplivitError: there are no tensors inside.
    """
    wrappers = WRAPPERS if prefer is None else (prefer, *WRAPPERS)
    seen: set[int] = set()  # a file may hold itself
    while isinstance(found, Mapping) and id(found) not in seen:
        seen.add(id(found))
        inner = next((found[key] for key in wrappers if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, Mapping):
        raise ReplivitError(f"{origin} holds a {type(found).__name__}, not a state dict")
    state = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    if not state:
        raise ReplivitError(f"{origin} holds no tensors")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def save_weights(
    model_or_state: nn.Module | Mapping[str, Tensor],
    path: Path | str,
    half: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Write a safetensors file, whole or not at all; returns its SHA-256.

    Args:
        half: store floating-point tensors as float16 (they are cast back on loading).
        metadata: notes for the header: variant, track, seed, recipe, commit, ... as text.

    Raises:
        ReplivitError: it cannot be written, or a value does not fit into float16.
    """
    state = model_or_state
    if isinstance(state, nn.Module):
        state = state.state_dict()
    # copies, since safetensors refuses tensors that share memory
    tensors = {key: one.detach().to("cpu", copy=True).contiguous() for key, one in state.items()}
    if half:
        tensors = {key: _halved(key, value) for key, value in tensors.items()}
    notes = {key: str(value) for key, value in (metadata or {}).items() if value is not None}
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        save_file(tensors, temporary, metadata={"format": "pt", **notes})
        Path(temporary).chmod(0o644)  # mkstemp's files are the user's alone
        Path(temporary).replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ReplivitError(f"cannot write {path}: {reason}") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
    return file_sha256(path)


def _halved(key: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    half = value.to(torch.float16)
    if not torch.isfinite(half).all() and torch.isfinite(value).all():
        raise ReplivitError(f"{key} has values that float16 cannot hold; save it in full precision")
    return half
