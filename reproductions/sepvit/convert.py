"""Checkpoints of the authors in our names, which are theirs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from harness.errors import ReplivitError


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a released classifier or dense backbone.

    Of a whole detector or segmenter, as the authors' dense code saves it, only the backbone counts.

    Raises:
        ReplivitError: the entries are of another network.
    """
    entries = {key.removeprefix("module."): value for key, value in state_dict.items()}
    inner = "backbone."
    if any(key.startswith(inner) for key in entries):
        entries = {
            key.removeprefix(inner): value
            for key, value in entries.items()
            if key.startswith(inner)
        }
    missing = [
        key for key in ("patch_embeds.0.proj.weight", "blocks.0.0.attn.DSA_qkv.weight")
        if key not in entries
    ]  # fmt: skip
    if missing:
        first = next(iter(entries), "nothing at all")
        raise ReplivitError(
            f"this checkpoint is no SepViT of the authors: it has no {missing[0]!r}; it starts "
            f"with {first!r}"
        )
    return entries
