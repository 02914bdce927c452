"""Checkpoints of the authors, and of the networks they started from, in our names.

Blocks carry timm's names. Of the authors' own, only the prediction modules number the layers of
`nn.Sequential`s, and Swin and ConvNeXt name their stages as their original code does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from harness.errors import ReplivitError

_PREDICTOR = [
    (r"\bin_conv\.0\.", "norm."),
    (r"\bin_conv\.1\.", "embed."),
    (r"\bout_conv\.0\.", "mix."),
    (r"\bout_conv\.2\.", "hidden."),
    (r"\bout_conv\.4\.", "out."),
]
#: Original Swin: a stage ends with its down-sampling; timm's begins with it.
_SWIN = [
    (r"^layers\.2\.score_predictor\.", "score_predictor."),
    (r"\bfastmlp\.fc1\.", "fast_path."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
_CONVNEXT = [
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\bdwconv\.", "conv_dw."),
    (r"\bpwconv(\d)\.", r"mlp.fc\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
_LATER_STAGE = re.compile(r"^layers\.(\d)\.downsample\.")


def _renamed(state: Mapping[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in compiled:
            key = pattern.sub(replacement, key)
        renamed[key] = value
    return renamed


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' entries for transformers with class token (DeiT, LV-ViT) under our names.

    A plain DeiT or LV-ViT comes out as it is, without prediction modules: something to start from.

    Raises:
        ReplivitError: the entries are of another kind of model.
    """
    _require(state_dict, "cls_token", "a transformer with class token (DeiT, LV-ViT)")
    return _renamed(state_dict, _PREDICTOR)


def from_official_swin(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' AdaSwin, or a plain Swin of Microsoft or timm; masks and index tables are left
    out, since the module makes them itself.

    Raises:
        ReplivitError: the entries are of another kind of model.
    """
    _require(state_dict, "layers.0.blocks.0.attn.qkv.weight", "a Swin")
    entries = {
        key: value
        for key, value in state_dict.items()
        if not key.endswith(("attn_mask", "relative_position_index"))
    }
    if "layers.0.downsample.reduction.weight" in entries:
        entries = {
            _LATER_STAGE.sub(lambda found: f"layers.{int(found[1]) + 1}.downsample.", key): value
            for key, value in entries.items()
        }
    return _renamed(entries, _PREDICTOR + _SWIN)


def from_official_convnext(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' AdaConvNeXt, or a plain ConvNeXt of Facebook or timm. Pointwise convolutions of
    the prediction modules become linear layers.

    Raises:
        ReplivitError: the entries are of another kind of model.
    """
    if "stem.0.weight" not in state_dict:
        _require(state_dict, "downsample_layers.0.0.weight", "a ConvNeXt")
    return {
        key: value.flatten(1) if key.startswith("score_predictor") and value.ndim == 4 else value
        for key, value in _renamed(state_dict, _PREDICTOR + _CONVNEXT).items()
    }


def _require(state: Mapping[str, Tensor], key: str, kind: str) -> None:
    if key not in state:
        first = next(iter(state), "nothing at all")
        raise ReplivitError(f"this checkpoint is not {kind}: no {key!r}; it starts with {first!r}")
