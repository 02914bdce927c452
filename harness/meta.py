"""Models on the device "meta": shapes, names and counts are real there, and cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import timm.layers
import torch
from torch.overrides import TorchFunctionMode


class _NumbersStayNumbers(TorchFunctionMode):
    """`torch.linspace` on the CPU whatever the device: what it gives is read back."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules that are made inside have no memory, as in `with torch.device("meta")`.

    timm's transformers once drew their rates of stochastic depth as a tensor and read them back,
    which such a tensor does not allow; since `calculate_drop_path_rates` they do not.
    """
    mended = hasattr(timm.layers, "calculate_drop_path_rates")
    with torch.device("meta"), nullcontext() if mended else _NumbersStayNumbers():
        yield
