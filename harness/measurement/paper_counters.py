"""Counting rules of papers that several reproductions share, replayed on our modules.

A rule lives here when more than one paper counts by it; a rule of a single paper lives in that
paper's `conventions.py`.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn


def snap_profile(module: nn.Module, image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Parameters and MACs as the EfficientFormer repository counts them.

    Replays `ProfileConv` (official code: toolbox.py) with forward hooks on one image, its quirks
    included, since the published columns are what this rule gives:

    - convolution: `C_out * H * W * k * k * C_in / groups` MACs without the bias; parameters are
      the weight plus `C_in / groups`, which stands where the bias's `C_out` belongs;
    - linear: weight elements times tokens; parameters are weight plus bias;
    - GELU: one per token and channel of `(B, N, C)`, but only `C * H` of a `(B, C, H, W)` map;
    - LayerNorm: `2 * N * C` MACs and its parameters; average pooling: `k * k` per output;
    - BatchNorm, layer scales, position-bias tables, softmax, additions, up-sampling: nothing.

    Work outside these layers (attention products, a pooling written as a slice) is what a
    module's method `paper_macs()`, if it has one, returns after the forward pass.

    Args:
        module: a model in its original, unfolded form; mode and state are left as they were.
        image_size: pixels, one number or (height, width).

    Returns:
        (parameters, MACs per image).
    """
    macs: list[int] = []
    params: list[int] = []

    def conv(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        channels = inputs[0].shape[1] // layer.groups
        macs.append(output[0].numel() * layer.weight.shape[-1] ** 2 * channels)
        params.append(layer.weight.numel() + layer.weight.shape[1])

    def linear(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        tokens = inputs[0].shape[-2] if inputs[0].ndim > 2 else 1
        macs.append(layer.weight.numel() * tokens)
        params.append(layer.weight.numel() + layer.out_features)

    def gelu(layer: nn.GELU, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        macs.append(output.shape[1] * output.shape[2])

    def layer_norm(layer: nn.LayerNorm, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        macs.append(2 * output[0].numel())
        params.append(layer.weight.numel() + layer.bias.numel())

    def pool(layer: nn.AvgPool2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        macs.append(output[0].numel() * layer.kernel_size**2)

    def beyond_layers(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        macs.append(layer.paper_macs())

    rules = {
        nn.Conv2d: conv,
        nn.Linear: linear,
        nn.GELU: gelu,
        nn.LayerNorm: layer_norm,
        nn.AvgPool2d: pool,
    }
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    weight = next(module.parameters())
    image = torch.zeros(1, 3, height, width, dtype=weight.dtype, device=weight.device)
    modes = {layer: layer.training for layer in module.modules()}
    with ExitStack() as stack, torch.no_grad():
        for layer in modes:
            for kind, rule in rules.items():
                if isinstance(layer, kind):
                    stack.callback(layer.register_forward_hook(rule).remove)
            if hasattr(layer, "paper_macs"):
                stack.callback(layer.register_forward_hook(beyond_layers).remove)
        try:
            module.eval()(image)
        finally:
            for layer, training in modes.items():
                layer.training = training
    return sum(params), sum(macs)
