"""Weights of the public implementations under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

State = Mapping[str, Tensor]


def _renamed(state: State, rules: list[tuple[str, str]], skip: str = r"$^") -> dict[str, Tensor]:
    """Every key by the first pattern that matches all of it; unknown ones stay as they are."""
    renamed = {}
    for key, value in state.items():
        if re.fullmatch(skip, key):
            continue
        for pattern, ours in rules:
            new, found = re.subn(f"^{pattern}$", ours, key)
            if found:
                key = new
                break
        renamed[key] = value
    return renamed


_HF_LAYER = [
    (r"layers\.(\d+)\.attention\.layer_norm\.(.*)", r"blocks.\1.attention.norm.\2"),
    (r"layers\.(\d+)\.attention\.self_attention\.query_key\.(.*)",
     r"blocks.\1.attention.attention.to_qk.\2"),
    (r"layers\.(\d+)\.attention\.self_attention\.(q|k|v)(?:uery|ey|alue)\.(.*)",
     r"blocks.\1.attention.attention.to_\2.\3"),
    (r"layers\.(\d+)\.attention\.output\.dense\.(.*)", r"blocks.\1.attention.attention.to_out.\2"),
    (r"layers\.(\d+)\.feed_forward\.layer_norm\.(.*)", r"blocks.\1.feed_forward.norm.\2"),
    (r"layers\.(\d+)\.feed_forward\.dense\.dense\.(.*)", r"blocks.\1.feed_forward.fc1.\2"),
    (r"layers\.(\d+)\.feed_forward\.output\.dense\.(.*)", r"blocks.\1.feed_forward.fc2.\2"),
]  # fmt: skip


#: Constants that older versions saved with the weights.
_HF_CONSTANTS = (
    r"(?:encoder\.)?layers\.\d+\.attention\.self_attention\.(?:self_)?mask_value_float\d+"
)


def from_hugging_face(state: State) -> dict[str, Tensor]:
    """A `ReformerModelWithLMHead` (or its `reformer.` part) for `ReformerLM`.

    The decoder's bias stands in their file under two names; one is enough.
    """
    state = {key.removeprefix("reformer."): value for key, value in state.items()}
    rules = [
        (r"embeddings\.word_embeddings\.weight", "embedding.weight"),
        (r"embeddings\.position_embeddings\.weights\.(\d+)", r"positions.weights.\1"),
        (r"embeddings\.position_embeddings\.embedding\.weight", "positions.weight"),
        *((rf"encoder\.{theirs}", f"stack.{ours}") for theirs, ours in _HF_LAYER),
        (r"encoder\.layer_norm\.(.*)", r"norm.\1"),
        (r"lm_head\.decoder\.(.*)", r"decoder.\1"),
    ]
    skip = _HF_CONSTANTS
    if "lm_head.decoder.bias" in state:
        skip += r"|lm_head\.bias"
    return _renamed(state, [*rules, (r"lm_head\.bias", "decoder.bias")], skip)


def from_hugging_face_encoder(state: State) -> dict[str, Tensor]:
    """A `ReformerEncoder`'s layers for a `ReversibleStack`, and its last norm as `norm.*`."""
    return _renamed(state, [*_HF_LAYER, (r"layer_norm\.(.*)", r"norm.\1")], _HF_CONSTANTS)


def from_lucidrains(state: State) -> dict[str, Tensor]:
    """A `Reformer` of lucidrains/reformer-pytorch for a `ReversibleStack`.

    Their file has every weight twice, under `blocks` and `irrev_blocks`, which are one tensor.
    """
    part = r"(?:layers\.)?(?:irrev_blocks|blocks)\.(\d+)\."
    rules = [
        (part + r"(?:f\.net|f)\.norm\.(.*)", r"blocks.\1.attention.norm.\2"),
        (
            part + r"(?:f\.net|f)\.fn\.(toqk|tov|to_out)\.(.*)",
            r"blocks.\1.attention.attention.\2.\3",
        ),
        (part + r"(?:g\.net|g)\.norm\.(.*)", r"blocks.\1.feed_forward.norm.\2"),
        (part + r"(?:g\.net|g)\.fn\.fn\.w(\d)\.(.*)", r"blocks.\1.feed_forward.fc\2.\3"),
    ]
    names = {"toqk": "to_qk", "tov": "to_v"}
    return {
        re.sub(r"attention\.(toqk|tov)\.", lambda m: f"attention.{names[m[1]]}.", key): value
        for key, value in _renamed(state, rules).items()
    }


def from_benchmark(state: State) -> dict[str, Tensor]:
    """A `reformer_vit_*_patch16` of tobna/WhatTransformerToFavor for `benchmark_vit`."""
    rules = [
        (r"blocks\.(\d+)\.attn\.toqk\.(.*)", r"blocks.\1.attn.to_qk.\2"),
        (r"blocks\.(\d+)\.attn\.tov\.(.*)", r"blocks.\1.attn.to_v.\2"),
    ]
    return _renamed(state, rules)
