"""Data: tracks and their protocols, images from wherever they lie, transforms.

`load_split("fashion_mini", "test")` gives a map-style data set of `(PIL image, label)`;
`create_transform` what a model sees of it; `AugmentedDataset` what a training run sees, as a pure
function of (seed, epoch, index).
"""

from __future__ import annotations

import importlib
from typing import Any

from harness.data.tracks import TRACKS, Track, get_track, input_spec

# imported on first use: these bring torch and timm, which listing variants must not
_LAZY = {
    "AugmentedDataset": "augmentation",
    "Batches": "batches",
    "ImageDataset": "images",
    "PixelTransform": "augmentation",
    "SearchImages": "batches",
    "batches_of": "batches",
    "contact_sheet": "pictures",
    "create_transform": "transforms",
    "hold_out": "parts",
    "load_split": "sources",
    "locate": "sources",
    "places": "sources",
    "preprocessing_sha256": "transforms",
}
__all__ = ["TRACKS", "Track", "get_track", "input_spec", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"harness.data.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'harness.data' has no attribute {name!r}")
