"""What the races share: their options, the check of equality, turns, and the table.

It lies beside the scripts and finds the harness for them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from harness.errors import ReplivitError
from harness.measurement.latency import Timing, time_callables

#: A speed counts only for the same function.
RELATIVE_ERROR = 1e-5


def race_parser(
    doc: str,
    *,
    budget_s: float,
    batch: Iterable[int] = (1, 8),
    authors: str = "checkout of their repository",
    cpu_time: bool = True,
) -> argparse.ArgumentParser:
    """A parser with the options of every race.

    Args:
        doc: the script's docstring.
        authors: help of the required option `--authors`; empty for a script with one of its own.
        cpu_time: whether there is `--cpu-time`; else one thread is always timed so.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if authors:
        parser.add_argument("--authors", type=Path, required=True, help=authors)
    parser.add_argument("--batch", type=int, nargs="+", default=list(batch))
    parser.add_argument(
        "--threads", type=int, default=1, help=None if cpu_time else "one is timed by its CPU time"
    )
    parser.add_argument("--budget-s", type=float, default=budget_s, help="seconds per race")
    if cpu_time:
        parser.add_argument(
            "--cpu-time", action="store_true", help="for a machine that is not quiet"
        )
    return parser


def check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse names before a race begins.

    Raises:
        ReplivitError: one of them is not known.
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise ReplivitError(f"no {what} {name!r}; known: {', '.join(known)}")


@torch.inference_mode()
def infer(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def relative_error(model: nn.Module, reference: nn.Module, images: Tensor) -> float:
    """||model - reference|| / ||reference|| of the outputs."""
    wanted = infer(reference, images)
    return float((infer(model, images).view_as(wanted) - wanted).norm() / wanted.norm())


def passes(models: Mapping[str, nn.Module], images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """A forward pass of each model, as something to call."""
    return {name: (lambda model=model: infer(model, images)) for name, model in models.items()}


def take_turns(
    calls: Mapping[str, Callable[[], object]], arguments: argparse.Namespace, **effort: float
) -> dict[str, Timing]:
    """Time calls in alternation, as the options say; ratios are to the first one."""
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(arguments.threads)
    return time_callables(calls, clock=clock, **{"budget_s": arguments.budget_s, **effort})


def one_turn(works: Sequence[Callable[[], Any]], number: int) -> tuple[list[float], list[Any]]:
    """CPU seconds and answers of works that are called once each; the order turns with `number`."""
    seconds, answers = [0.0] * len(works), [None] * len(works)
    for side in range(len(works))[:: 1 if number % 2 == 0 else -1]:
        start = time.process_time()
        answers[side] = works[side]()
        seconds[side] = time.process_time() - start
    return seconds, answers


class Speedup(NamedTuple):
    """How many times as fast as the first of the race, with its 95 % interval."""

    value: float
    low: float
    high: float


def speedup(timing: Timing) -> Speedup:
    low, high = timing.ratio_interval
    return Speedup(1 / timing.ratio, 1 / high, 1 / low)


class Table:
    """Prints a row for each competitor; `passed` tells whether all did what they should."""

    def __init__(self) -> None:
        self.passed = True
        heads = f"{'batch':>5} {'':13} {'ms':>9} {'faster':>8}  {'95 %':12}  {'error':5}  status"
        print(f"{'':28} {heads}")

    def row(
        self,
        what: str,
        batch: int,
        name: str,
        timing: Timing,
        *,
        error: float | None = None,
        good: bool = True,
        note: str = "",
    ) -> None:
        """One competitor: its time, its speed-up over the first, its error if it has one.

        Args:
            good: whether it meets its bar.
        """
        same = error is None or error <= RELATIVE_ERROR
        self.passed = self.passed and good and same
        faster = speedup(timing)
        said = "" if error is None else f"{error:.0e}"
        words = [note, "" if good else "BELOW THE BAR", "" if same else "NOT THE SAME FUNCTION"]
        print(
            f"{what:28} {batch:5} {name:13} {1e3 * timing.median:9.2f} {faster.value:7.2f}x  "
            f"{f'{faster.low:.2f} to {faster.high:.2f}':12}  {said:5}  {timing.ratio_status:9}"
            + "".join(f"  {one}" for one in words if one),
            flush=True,
        )


def run(main: Callable[[], bool]) -> None:
    """End the process with code 0 where `main` says so, else 1; a mistake is one sentence."""
    try:
        sys.exit(0 if main() else 1)
    except ValueError as error:  # a ReplivitError among them
        sys.exit(f"error: {error}")
