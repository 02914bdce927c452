"""RepliViT's harness: papers, variants, measurements and training on one bench.

The names below are its public face; everything is imported on first use, so `import harness`
costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Conditions": "record",
    "ExperimentResult": "experiment",
    "Finding": "experiment",
    "Record": "record",
    "RecordStore": "record",
    "ReplivitError": "errors",
    "build": "registry",
    "compare": "measurement",
    "deploy": "deployment",
    "evaluate": "evaluation",
    "experiments": "registry",
    "get_paper": "registry",
    "get_variant": "registry",
    "load_official": "checkpoints",
    "load_pretrained": "checkpoints",
    "load_weights": "checkpoints",
    "make_record": "record",
    "measure": "measurement",
    "papers": "registry",
    "run": "experiment",
    "train": "training",
    "variants": "registry",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"harness.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
