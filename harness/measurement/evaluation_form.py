"""Run a module as it is evaluated, and leave no trace of having done so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

Inputs = torch.Tensor | tuple
ImageSize = int | tuple[int, int]


def floating_like(module: nn.Module) -> torch.Tensor:
    """A tensor whose device and dtype are those of the module's floating-point weights."""
    tensors = [*module.parameters(), *module.buffers()]
    return next((one for one in tensors if one.is_floating_point()), torch.empty(0))


def example_inputs(module: nn.Module, image_size: ImageSize, batch_size: int = 1) -> tuple:
    """One seeded random batch `(B, 3, H, W)` on the module's device, in its floating dtype."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    like = floating_like(module)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, height, width, generator=generator)
    return (images.to(like.device, like.dtype),)


def resolve_inputs(
    module: nn.Module, image_size: ImageSize | None, batch_size: int, inputs: Inputs | None
) -> tuple[tuple, int]:
    """The arguments of the forward pass to count, and how many images they hold.

    Raises:
        ValueError: neither image size nor inputs.
    """
    if inputs is None:
        if image_size is None:
            raise ValueError("to count a module give an image size or example inputs")
        return example_inputs(module, image_size, batch_size), batch_size
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    batches = (len(one) for one in inputs if isinstance(one, torch.Tensor) and one.ndim)
    return inputs, next(batches, 1)


@contextmanager
def evaluation_form(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards flags and random state are as before.

    Attention's inference fast path is off inside: it is one opaque kernel that no counter sees.
    `no_grad` and not `inference_mode`, since a table that the module caches meanwhile must stay
    usable in training. No parameter asks for a gradient: torch's counter stumbles over a view of
    one that does.
    """
    flags = {part: part.training for part in module.modules()}
    trained = [one for one in module.parameters() if one.requires_grad]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = sorted({one.device.index for one in module.parameters() if one.is_cuda})
    try:
        module.eval()
        for one in trained:
            one.requires_grad_(False)
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for one in trained:
            one.requires_grad_(True)
        for part, training in flags.items():  # parents first, so that children have the last word
            if part.training != training:
                part.train(training)
