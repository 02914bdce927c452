"""Peak memory of pieces of work, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

from harness.errors import ReplivitError


def peak_bytes(
    prepare: Callable[..., Callable[[], object]], jobs: Sequence[dict[str, Any]]
) -> list[int]:
    """Bytes that each `prepare(**job)()` needs at its peak, above what `prepare` left behind.

    Processes are forked from one that has imported the module of `prepare` and done nothing else.

    Args:
        prepare: a function of a module (it is found by name there); gives the work.

    Raises:
        ReplivitError: a process failed, for example for lack of memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([prepare.__module__])
    return [_in_process(context, prepare, job) for job in jobs]


def _in_process(context: Any, prepare: Callable, job: dict[str, Any]) -> int:
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(sender, prepare, job))
    child.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = "the process ended without an answer (out of memory?)"
    finally:
        child.join()
    if isinstance(answer, str):
        raise ReplivitError(f"measuring memory failed: {answer}")
    return answer


def _measure(sender: Any, prepare: Callable, job: dict[str, Any]) -> None:
    import torch
    from torch import nn

    from harness.measurement.allocator import map_every_block
    from harness.measurement.memory import measure_peak

    try:
        torch.set_num_threads(1)
        map_every_block()
        work = prepare(**job)
        work()  # once, for tables and pools that stay
        sender.send(measure_peak(work, nn.Identity(), "cpu").work)
    except Exception as error:  # whatever it is, the parent says it
        sender.send(f"{type(error).__name__}: {error}")
    finally:
        sender.close()
