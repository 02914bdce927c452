"""Whole models against each other on the same images: one call for experiments and lessons."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from math import inf

import torch
from torch import Tensor, nn

from harness.errors import ReplivitError
from harness.measurement.latency import Effort, Timing, time_callables
from harness.measurement.sentinels import Limits

#: Waiting for a processor costs no CPU time, so where CPU time is read it disturbs nothing.
_WAITING = Limits(pressure=inf, steal=inf, switches=inf, wall_over_cpu=inf)


def time_models(
    models: Mapping[str, nn.Module],
    batches: Sequence[Tensor],
    *,
    device: str = "cpu",
    threads: int = 1,
    effort: Effort | None = None,
    **changes: float,
) -> dict[str, Timing]:
    """Time models in alternation, in this process; ratios are to the first one.

    One thread on a CPU is timed by its CPU time: the same as latency where nothing else runs, and
    hardly disturbed where something does. All else is timed by the clock.

    Args:
        models: name -> module in evaluation mode; moved to `device`.
        batches: images `(B, 3, H, W)` that take turns, the same for all models.
        changes: single fields of the effort, as in `time_callables`.

    Raises:
        ReplivitError: nothing to time.
    """
    if not batches:
        raise ReplivitError("timing needs at least one batch of images")
    placed = [batch.to(device) for batch in batches]
    calls = {name: _cycled(model.to(device), placed) for name, model in models.items()}
    options = {"effort": effort, "device": device, **changes}
    if device == "cpu" and threads == 1:
        options |= {"clock": time.process_time, "limits": _WAITING}
    with _threads(threads):
        return time_callables(calls, **options)


def _cycled(model: nn.Module, batches: Sequence[Tensor]) -> Callable[[], object]:
    ring = itertools.cycle(batches)
    return lambda: model(next(ring))


@contextmanager
def _threads(count: int):
    """So many threads for torch; the caller's number comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
