"""Slimmed networks on disk: their weights, and in the header what is left of which variant."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from torch import nn

import harness
from harness import ReplivitError
from harness.checkpoints import load_weights, read_metadata, save_weights
from harness.evaluation import variant_of
from reproductions.vit_slim.selection import Kept
from reproductions.vit_slim.slimming import slim_to


def save_slim(model: nn.Module, path: str | Path, half: bool = False) -> str:
    """Write a slimmed network as safetensors; returns the file's SHA-256.

    Raises:
        ValueError: it is not slimmed, or no variant (which `load_slim` must build again).
        ReplivitError: the file cannot be written.
    """
    variant = variant_of(model)
    if variant is None or not hasattr(model, "kept"):
        raise ValueError("save_slim writes what slim made of a variant of this project")
    about = {
        "variant": variant.name, "num_classes": model.num_classes,
        "image_size": json.dumps(model.pretrained_cfg["input_size"][1:]),
        "token_mode": model.token_mode, "kept": json.dumps(model.kept.as_dict()),
    }  # fmt: skip
    return save_weights(model, path, half, metadata=about)


def load_slim(path: str | Path) -> nn.Module:
    """A network that `save_slim` wrote, in evaluation mode.

    Raises:
        ReplivitError: another kind of file, or one that does not fit.
    """
    about = read_metadata(path)
    try:
        name, mode = about["variant"], about["token_mode"]
        classes, size = int(about["num_classes"]), tuple(json.loads(about["image_size"]))
        kept = Kept.from_dict(json.loads(about["kept"]), str(path))
    except (KeyError, TypeError, ValueError) as error:
        raise ReplivitError(f"{path} was not written by save_slim") from error
    try:
        model = harness.build(name, classes, size)
        if hasattr(model, "kept"):  # the variant has a shape of its own, perhaps another
            model = harness.build(name, classes, size, kept=kept, mode=mode)
        else:
            model = slim_to(model, kept, mode)
    except ValueError as error:
        raise ReplivitError(f"{path}: {error}") from error
    load_weights(model, path)
    return model.eval()


def read_kept(path: str | Path) -> Kept:
    """The kept sets in a YAML file.

    Raises:
        ReplivitError: no such file, or something else in it.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ReplivitError(f"{path} cannot be read as kept sets") from error
    return Kept.from_dict(found, str(path))


def write_kept(kept: Kept, path: str | Path, about: str) -> None:
    """Write kept sets as YAML, with a comment that says where they come from.

    Raises:
        ReplivitError: the file cannot be written.
    """
    lines = [f"# {line}" for line in about.splitlines()]
    text = yaml.safe_dump(kept.as_dict(), sort_keys=False, default_flow_style=None, width=100)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("\n".join([*lines, text]), encoding="utf-8")
    except OSError as error:
        raise ReplivitError(f"cannot write {path}: {error.strerror}") from error
