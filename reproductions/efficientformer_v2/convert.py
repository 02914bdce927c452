"""Checkpoints of the authors, and of timm, in our names.

Our names are timm's; only layer scales have another shape. The authors' names number the layers
of `nn.Sequential`s: `network.0, 2, 4, 6` are the stages, `network.1, 3, 5` what lies between.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from harness.errors import ReplivitError

#: (pattern, replacement) from the authors' names to ours; every rule is applied, in this order.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^patch_embed\.0\.", "stem.conv1.conv."),
        (r"^patch_embed\.1\.", "stem.conv1.bn."),
        (r"^patch_embed\.3\.", "stem.conv2.conv."),
        (r"^patch_embed\.4\.", "stem.conv2.bn."),
        (r"^network\.1\.", "stages.1.downsample."),
        (r"^network\.3\.", "stages.2.downsample."),
        (r"^network\.5\.", "stages.3.downsample."),
        (r"^network\.0\.", "stages.0.blocks."),
        (r"^network\.2\.", "stages.1.blocks."),
        (r"^network\.4\.", "stages.2.blocks."),
        (r"^network\.6\.", "stages.3.blocks."),
        (r"\bdownsample\.(proj|conv)\.", "downsample.conv.conv."),
        (r"\bdownsample\.(norm|bn)\.", "downsample.conv.bn."),
        (r"\b(fc1|fc2|mid)\.(weight|bias)$", r"\1.conv.\2"),
        (r"\bnorm1\.", "fc1.bn."),
        (r"\bmid_norm\.", "mid.bn."),
        (r"\bnorm2\.", "fc2.bn."),
        (r"\bq\.local\.0\.", "q.local."),
        (r"\bq\.proj\.0\.", "q.proj.conv."),
        (r"\bq\.proj\.1\.", "q.proj.bn."),
        (r"\b(q|k|v|v_local|stride_conv)\.0\.", r"\1.conv."),
        (r"\b(q|k|v|v_local|stride_conv)\.1\.", r"\1.bn."),
        (r"\bproj\.1\.", "proj.conv."),
        (r"\bproj\.2\.", "proj.bn."),
        (r"\blayer_scale_([12])$", r"ls\1.gamma"),
        (r"^dist_head\.", "head_dist."),
    )
]


def our_name(key: str) -> str:
    """The name here of an entry that the authors call `key`."""
    for pattern, replacement in _RULES:
        key = pattern.sub(replacement, key)
    return key


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' or timm's entries under our names; the authors' index tables are left out.

    Raises:
        ReplivitError: the entries are of another kind of model.
    """
    entries = {key.removeprefix("module."): value for key, value in state_dict.items()}
    if "stem.conv1.conv.weight" in entries:  # timm's names, or our own
        converted = entries
    elif "patch_embed.0.weight" in entries:
        if not any(key.endswith("mlp.mid.weight") for key in entries):
            raise ReplivitError(
                "this checkpoint is no EfficientFormerV2: its feed-forward networks have no "
                "depthwise convolution ('mlp.mid.weight'); is it the first EfficientFormer?"
            )
        converted = {
            our_name(key): value
            for key, value in entries.items()
            if not key.endswith("attention_bias_idxs")
        }
    else:
        first = next(iter(entries), "nothing at all")
        raise ReplivitError(
            "this checkpoint is no EfficientFormerV2: it has neither 'patch_embed.0.weight' (the "
            f"authors' names) nor 'stem.conv1.conv.weight' (timm's); it starts with {first!r}"
        )
    return {
        key: value.reshape(-1, 1, 1) if key.endswith(".gamma") else value
        for key, value in converted.items()
    }
