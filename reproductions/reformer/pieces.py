"""Work in pieces of a size that a cache holds, written once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: An accelerator wants larger pieces than a cache.
ACCELERATOR = 64


def pieces(
    first: int, last: int, each: int, elements: int, device: torch.device
) -> Iterator[slice]:
    """`range(first, last)` in slices of at most so many elements, but at least of one item.

    Args:
        each: elements that one item takes.
        elements: of a slice on a CPU; an accelerator gets more.
    """
    if torch.compiler.is_compiling():  # a program may be for any batch
        yield slice(first, last)
        return
    most = max(1, elements * (1 if device.type == "cpu" else ACCELERATOR) // each)
    for start in range(first, last, most):
        yield slice(start, min(start + most, last))
