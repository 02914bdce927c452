"""Whole models against each other on the same images: one call for experiments and lessons."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from math import inf

import numpy as np
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
    """Time models in alternation, in this process, as `time_calls` does.

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
    return time_calls(calls, device=device, threads=threads, effort=effort, **changes)


def time_calls(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: str = "cpu",
    threads: int = 1,
    effort: Effort | None = None,
    **changes: float,
) -> dict[str, Timing]:
    """Time functions without arguments in alternation; ratios are to the first one.

    One thread on a CPU is timed by its CPU time: the same as latency where nothing else runs, and
    hardly disturbed where something does. All else is timed by the clock.

    Args:
        changes: single fields of the effort, as in `time_callables`.

    Raises:
        ReplivitError: nothing to time.
    """
    options = {"effort": effort, "device": device, **changes}
    if device == "cpu" and threads == 1:
        options |= {"clock": time.process_time, "limits": _WAITING}
    with _threads(threads):
        return time_callables(calls, **options)


def time_images(
    model: nn.Module, images: Tensor, repeats: int = 5, *, threads: int = 1
) -> np.ndarray:
    """Seconds of single images on a CPU: `(repeats, N)` for images `(N, 3, H, W)`.

    Each repeat goes through all images in an order of its own, so that drift is no property of an
    image. The spread down a column is noise; only what columns differ by beyond it is the image's.
    CPU time on one thread, else the clock's.

    Raises:
        ValueError: nothing to time.
    """
    if len(images) == 0 or repeats < 1:
        raise ValueError("timing needs at least one image and one repeat")
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds, random = np.empty((repeats, len(images))), np.random.default_rng(0)
    with _threads(threads), torch.inference_mode():
        for _ in range(3):
            model(images[:1])
        for row in seconds:
            for index in random.permutation(len(images)):
                start = clock()
                model(images[index : index + 1])
                row[index] = clock() - start
    return seconds


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
