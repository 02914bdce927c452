"""Checkpoints of the two public implementations -> ours.

The authors released neither code nor weights. A dense DeiT's names are timm's, and ours: such a
file is a starting point (`replivit train --init`), in which only the mergers are missing.
"""

from __future__ import annotations

import re

from torch import Tensor

from harness.errors import ReplivitError
from reproductions.patchmerger.model import spread_layers

#: vit-pytorch's names inside a layer.
LAYER = {
    "0.norm": "norm1",
    "0.to_qkv": "attn.qkv",
    "0.to_out.0": "attn.proj",
    "1.net.0": "norm2",
    "1.net.1": "mlp.fc1",
    "1.net.4": "mlp.fc2",
}
#: And outside of them.
OUTSIDE = {
    "pos_embedding": "pos_embed",
    "to_patch_embedding.1": "patch_embed.norm_pixels",
    "to_patch_embedding.2": "patch_embed.proj",
    "to_patch_embedding.3": "patch_embed.norm",
    "transformer.norm": "norm",
    "mlp_head.1": "head",
}


def _depth(state: dict[str, Tensor], pattern: str) -> int:
    """How many layers a checkpoint has."""
    return len({found[1] for key in state if (found := re.match(pattern, key))})


def from_token_reduction(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """TokenReduction's names: mergers stand in a list of their own, whose places the file does not
    say; they are taken to be spread evenly, as in all its published runs."""
    mergers = _depth(state, r"cluster_layers\.(\d+)\.")
    layers = spread_layers(_depth(state, r"blocks\.(\d+)\."), mergers)
    return {
        re.sub(
            r"^cluster_layers\.(\d+)\.", lambda found: f"blocks.merger{layers[int(found[1])]}.", key
        ): value
        for key, value in state.items()
    }


def from_vit_pytorch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """vit-pytorch's names (`vit_with_patch_merger`); its merger is taken to stand in the middle.

    Raises:
        ReplivitError: a name that such a model does not have.
    """
    middle = _depth(state, r"transformer\.layers\.(\d+)\.") // 2
    converted = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        found = re.match(r"transformer\.layers\.(\d+)\.(.+)", module)
        if key in OUTSIDE:
            name = OUTSIDE[key]
        elif found and found[2] in LAYER:
            name = f"blocks.{found[1]}.{LAYER[found[2]]}.{kind}"
        elif key.startswith("transformer.patch_merger."):
            name = f"blocks.merger{middle}.{key.removeprefix('transformer.patch_merger.')}"
        elif module in OUTSIDE:
            name = f"{OUTSIDE[module]}.{kind}"
        else:
            raise ReplivitError(
                f"this checkpoint is not vit-pytorch's ViT with a merger, which has no {key!r}"
            )
        converted[name] = value
    return converted
