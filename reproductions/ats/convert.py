"""Checkpoints: the released ones, and DeiT's own.

ATS has no weights, so every DeiT checkpoint is one of ATS. The released code keeps a vector of
zeros, `out_zero_mask`, as a parameter of each sampling block; it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from harness.errors import ReplivitError


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries under timm's names, which the authors and DeiT use too.

    Raises:
        ReplivitError: no vision transformer with a class token, or a zero mask that was trained.
    """
    entries = {key.removeprefix("module."): value for key, value in state_dict.items()}
    for key in ("cls_token", "patch_embed.proj.weight"):
        if key not in entries:
            first = next(iter(entries), "nothing at all")
            raise ReplivitError(
                "this checkpoint is no vision transformer with a class token: it lacks "
                f"{key!r} and starts with {first!r}"
            )
    for key, value in entries.items():
        if key.endswith("out_zero_mask") and value.any():
            raise ReplivitError(f"{key} is not zero: this checkpoint is damaged")
    return {key: value for key, value in entries.items() if not key.endswith("out_zero_mask")}
