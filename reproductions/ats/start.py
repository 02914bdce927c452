"""Trained weights to look at: a variant with its parent's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
from harness import ReplivitError
from harness.checkpoints import load_model
from reproductions.ats.model import AtsVisionTransformer


def with_trained_weights(
    variant: str, track: str, weights: str | Path | None = None, **options: Any
) -> tuple[AtsVisionTransformer, str]:
    """A variant in evaluation mode, and in words where its weights are from.

    ATS has no weights of its own: the parent's are whole.

    Args:
        weights: a file, of the variant or of its parent; default those shipped with the variant
            for `track`, else with its parent.
        options: of the variant's builder.

    Raises:
        ReplivitError: no weights are shipped for that track and none are given.
    """
    if weights is not None:
        return load_model(variant, weights, **options), f"Weights: {Path(weights).name}."
    chosen = harness.get_variant(variant)
    if chosen.weights_file(track):
        return harness.load_pretrained(variant, track, **options), f"Weights: {variant}, shipped."
    parent = chosen.spec.args["base"]
    file = harness.get_variant(parent).weights_file(track)
    if file is None:
        raise ReplivitError(
            f"neither {variant} nor {parent} ships weights for {track}; give a file (weights=...)"
        )
    return load_model(variant, file, **options), f"Weights: {parent}, shipped, without training."
