"""Mergers inside a timm vision transformer: put in, found again, watched at work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from reproductions.patchmerger.merger import PatchMerger


def insert_merger(
    model: VisionTransformer,
    layer: int | Sequence[int],
    num_outputs: int | Sequence[int] = 8,
    **options: Any,
) -> VisionTransformer:
    """Put a `PatchMerger` before block `layer` (from 0) of a timm ViT, in place.

    The paper's "after block L/2" is `layer = L // 2`. Prefix tokens (class token, distillation
    token, registers) bypass the merger. Blocks keep their names, so that a dense checkpoint still
    fits; the merger's weights are called `blocks.merger<layer>.*`.

    Args:
        model: timm's `VisionTransformer`, or a model derived from it (DeiT, DeiT-III, AugReg ...).
        layer: one block or several.
        num_outputs: tokens that leave, prefix tokens not counted; one number for all layers, or
            one for each.
        options: of `PatchMerger`: norm, scale, init_std.

    Returns:
        The same model.

    Raises:
        ValueError: another kind of model, a block that does not exist or has a merger already,
            fewer than one output, or not one number per layer.
    """
    check_model(model)
    layers = list(layer) if isinstance(layer, Sequence) else [layer]
    each = isinstance(num_outputs, Sequence)
    counts = list(num_outputs) if each else [num_outputs] * len(layers)
    if len(counts) != len(layers):
        raise ValueError(f"{len(layers)} layers need {len(layers)} num_outputs, not {len(counts)}")
    depth = sum(not isinstance(block, PatchMerger) for block in model.blocks)
    taken = set(mergers(model))
    made = {}
    for where, count in zip(layers, counts, strict=True):
        if where not in range(depth):
            raise ValueError(
                f"no block {where} to put a merger before: layers are 0 to {depth - 1}"
            )
        if where in taken:
            raise ValueError(f"there is a merger before block {where} already")
        taken.add(where)
        made[where] = PatchMerger(model.embed_dim, count, model.num_prefix_tokens, **options)
    like = next(model.blocks.parameters())
    named, passed = {}, 0
    for name, block in model.blocks.named_children():
        if not isinstance(block, PatchMerger):
            if passed in made:
                named[f"merger{passed}"] = made[passed].to(like)
            passed += 1
        named[name] = block
    training = model.blocks.training
    model.blocks = nn.Sequential()
    for name, block in named.items():
        model.blocks.add_module(name, block)
    model.blocks.train(training)
    return model


def check_model(model: nn.Module) -> None:
    """Raise `ValueError` for a model that cannot take mergers."""
    if not isinstance(model, VisionTransformer) or not isinstance(model.blocks, nn.Sequential):
        raise ValueError(
            f"mergers go into timm's VisionTransformer, not into a {type(model).__name__}"
        )


def mergers(model: VisionTransformer) -> dict[int, PatchMerger]:
    """The mergers of a model by the block (from 0) that they stand before."""
    found, passed = {}, 0
    for block in model.blocks:
        if isinstance(block, PatchMerger):
            found[passed] = block
        else:
            passed += 1
    return found


@torch.no_grad()
def assignments(model: VisionTransformer, images: Tensor) -> dict[int, Tensor]:
    """What each merger mixes: by layer, the weights `(B, M, N)` for `images` `(B, 3, H, W)`.

    The N columns of a later merger are the outputs of the one before; `over_patches` goes back to
    the image.
    """
    found: dict[int, Tensor] = {}
    hooks = [
        merger.register_forward_pre_hook(
            lambda merger, inputs, layer=layer: found.update({layer: merger.assignment(inputs[0])})
        )
        for layer, merger in mergers(model).items()
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def over_patches(maps: dict[int, Tensor]) -> dict[int, Tensor]:
    """The weights of `assignments` over the patches of the image: `(B, M, N)` with N patches.

    A later merger's weights are multiplied with those before it; what the blocks in between
    exchange is not followed.
    """
    composed: dict[int, Tensor] = {}
    before: Tensor | None = None
    for layer, weights in maps.items():
        before = weights if before is None else weights @ before
        composed[layer] = before
    return composed
