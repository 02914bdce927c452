"""How the authors count: fvcore's total, as their `get_flops.py` prints it."""

from __future__ import annotations

from torch import Tensor, nn

from harness.measurement.macs import count_macs


def macs(module: nn.Module, image_size: int | tuple[int, int]) -> int:
    """Multiply-adds per image by fvcore's rule: convolutions, linear layers and matrix products,
    and 5 per element of a layer norm. Nothing is computed for a module on the device meta."""
    elements: list[int] = []

    def note(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        elements.append(output.numel())

    norms = [one for one in module.modules() if isinstance(one, nn.LayerNorm)]
    hooks = [norm.register_forward_hook(note) for norm in norms]
    try:
        return count_macs(module, image_size).total + 5 * sum(elements)
    finally:
        for hook in hooks:
            hook.remove()
