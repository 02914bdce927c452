"""How the benchmark's MACs of its Reformers were counted: fvcore, as it comes."""

from __future__ import annotations

import torch
from torch import nn

from harness.measurement.macs import count_macs
from harness.patches import ImageSize
from reproductions.reformer.attention import LSHAttention


def macs(module: nn.Module, image_size: ImageSize) -> int:
    """Multiply-adds of one image as fvcore counts the benchmark's code.

    Convolutions and linears; five per element of a layer norm; einsums (hashing, scores, values)
    from numpy's report, which prints FLOPs with four digits. On our own networks, which contain
    the same work, this replays the rule; the canonical count beside it is exact.
    """
    seen: list[int] = []

    def norm(layer: nn.LayerNorm, _: tuple, output: torch.Tensor) -> None:
        seen.append(5 * output[0].numel())

    def hashing(layer: LSHAttention, inputs: tuple, _: tuple) -> None:
        length = inputs[0].shape[1]
        length += -length % (2 * layer.chunk)
        tokens = layer.num_heads * length * layer.eval_rounds
        width = layer.chunk * (1 + layer.rules.before + layer.rules.after)
        window = tokens * width * layer.head_dim
        columns = layer.fixed_rotations(layer.buckets_for(length)).shape[-1]
        rotated = tokens * layer.head_dim * columns
        seen.extend((2 * (_printed(window) - window), _printed(rotated) - rotated))

    hooks = [
        one.register_forward_hook(hashing if isinstance(one, LSHAttention) else norm)
        for one in module.modules()
        if isinstance(one, LSHAttention | nn.LayerNorm)
    ]
    try:
        return count_macs(module, image_size).total + sum(seen)
    finally:
        for one in hooks:
            one.remove()


def _printed(macs: int) -> int:
    """Half of the FLOPs after they were printed with four digits."""
    return int(float(f"{2 * macs:.3e}")) // 2
