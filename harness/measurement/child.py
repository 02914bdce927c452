"""The worker process: `python -m harness.measurement.child`; its parent is `isolation.Worker`.

It imports the libraries once, runs nothing, and forks a fresh process for every request, one at a
time: starting an interpreter with torch and timm takes seconds, a fork milliseconds, and what one
model does to memory, global flags or the process itself ends with its own fork.

A request is a line `{"cell": {...}, "run_id": "...", "cpus": [...]}` on standard input. The answer
is a line on what was standard output at the start: `{"records": [...]}`; `{"status": ...,
"reason": ...}` for an error; `{"returncode": ...}` where the fork ended without a word. Whatever
a model prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from harness.errors import one_line

#: What every cell needs, or most. Papers are imported by the fork that builds their model.
PRELOADED = (
    "torch", "timm", "reproductions", "harness.statistics", "harness.evaluation",
    "harness.deployment", "harness.measurement.counting", "harness.measurement.tasks",
)  # fmt: skip
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the system end this process when its parent is gone, also after `kill -9` (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def preload() -> None:
    """Import the libraries; what cannot be imported is left to the fork that needs it."""
    for name in PRELOADED:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _is_out_of_memory(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(
        mark in text for mark in ("out of memory", "outofmemory", "can't allocate memory")
    )


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Measure the request's cell in this process; an error becomes status and reason."""
    from harness.measurement.allocator import map_every_block
    from harness.measurement.cell import Cell
    from harness.measurement.tasks import measure_cell

    cell = Cell(**request["cell"])
    try:
        if request["cpus"]:
            os.sched_setaffinity(0, request["cpus"])
        if cell.group.startswith("memory"):
            map_every_block()
        records = measure_cell(cell, request["run_id"])
    except Exception as error:  # a model may fail in any way: that is a row, not a crash
        traceback.print_exc()
        status = "out_of_memory" if _is_out_of_memory(error) else "failed"
        return {"status": status, "reason": one_line(error)[:500]}
    return {"records": [record.model_dump(mode="json") for record in records]}


def can_fork() -> bool:
    """Whether a fork is a whole process: on Linux, and while no library runs a thread here."""
    tasks = Path("/proc/self/task")
    return tasks.is_dir() and len(list(tasks.iterdir())) == 1


def answer_in_fork(request: dict[str, Any], inherited: tuple[int, ...] = ()) -> dict[str, Any]:
    """Fork, let the fork answer, and wait for its end.

    Args:
        inherited: files that belong to the worker alone; the fork closes them.
    """
    incoming, outgoing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for file in (incoming, *inherited):
                os.close(file)
            die_with_parent()
            reply = json.dumps(answer_to(request)).encode()
            with os.fdopen(outgoing, "wb") as stream:
                stream.write(reply)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)  # nothing of the worker's is to be cleaned up here
    os.close(outgoing)
    with os.fdopen(incoming, "rb") as stream:
        reply = stream.read()
    _, status = os.waitpid(pid, 0)
    try:
        return json.loads(reply)
    except ValueError:
        return {"returncode": os.waitstatus_to_exitcode(status)}


def main() -> None:
    """Answer requests until standard input ends; without forks, just the first."""
    die_with_parent()
    answers = os.dup(1)
    os.dup2(2, 1)  # prints must not reach the answers
    preload()
    with os.fdopen(answers, "w") as stream:
        for line in sys.stdin:
            request, forks = json.loads(line), can_fork()
            answer = (
                answer_in_fork(request, (0, answers))
                if forks
                else {**answer_to(request), "last": True}
            )
            stream.write(json.dumps(answer) + "\n")
            stream.flush()
            if not forks:
                return


if __name__ == "__main__":
    main()
