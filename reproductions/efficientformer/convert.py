"""Checkpoints of others into this package's names.

Our parameter names are the authors', so theirs need next to nothing. timm renamed the modules and
gave the transition from maps to tokens no index; both are undone here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

#: timm's names, in the order in which they are replaced.
_FROM_TIMM = (
    (r"^stem\.conv1\.", "patch_embed.0."),
    (r"^stem\.norm1\.", "patch_embed.1."),
    (r"^stem\.conv2\.", "patch_embed.3."),
    (r"^stem\.norm2\.", "patch_embed.4."),
    (r"\.downsample\.conv\.", ".downsample.proj."),
    (r"\.ls([12])\.gamma$", r".layer_scale_\1"),
    (r"^head_dist\.", "dist_head."),
)


def _from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to the authors': stages and what comes before them share one list there."""

    def stage(match: re.Match) -> str:
        index, rest = int(match[1]), match[2]
        if rest.startswith("downsample."):
            return f"network.{2 * index - 1}.{rest.removeprefix('downsample.')}"
        return f"network.{2 * index}.{rest.removeprefix('blocks.')}"

    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _FROM_TIMM:
            name = re.sub(pattern, replacement, name)
        renamed[re.sub(r"^stages\.(\d+)\.(.*)$", stage, name)] = tensor
    return renamed


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' or timm's state dict with our names; unknown names stay as they are.

    The index tables are left out: they follow from the image size. What does not fit the model
    afterwards is reported by whoever loads the result.
    """
    if any(name.startswith("stem.") for name in state):
        state = _from_timm(state)
    return {
        name: tensor for name, tensor in state.items() if not name.endswith("attention_bias_idxs")
    }
