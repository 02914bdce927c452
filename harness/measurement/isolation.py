"""The parent's side of a cell: ask a fresh process, block, turn every end into records."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from typing import Any

from harness.environment import ROOT
from harness.errors import one_line
from harness.measurement.cell import GROUPS, Cell, shipped_sha256
from harness.measurement.sentinels import available_cpus
from harness.record import Record, make_record
from harness.registry import Variant, get_variant

COMMAND = (sys.executable, "-m", "harness.measurement.child")
#: Groups that want the machine for themselves.
TIMED = ("latency", "compare")

_running: set[subprocess.Popen] = set()


def _environment(threads: int) -> dict[str, str]:
    """A worker's environment: threads before torch is imported, and the parent's import path."""
    path = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, sys.path)]))
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's; it would start its threads at import
        "PYTHONPATH": path,
    }


def _cpus(cell: Cell) -> list[int]:
    """Fixed processors for what is timed: the last ones, for systems tend to use the first."""
    if cell.group not in TIMED or not hasattr(os, "sched_setaffinity"):
        return []
    return available_cpus()[-cell.threads :]


def _kill(process: subprocess.Popen) -> None:
    """End a worker and whatever it started (forks, compilers)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def end_workers() -> None:
    """End every worker of this process: for Ctrl-C while several run side by side."""
    for process in list(_running):
        _kill(process)


class Worker:
    """A process that forks a fresh one for each request; started again when it died.

    Use it in a `with`: at its end the process is ended.
    """

    def __init__(self, threads: int = 1, command: tuple[str, ...] = COMMAND) -> None:
        self.threads = threads
        self.command = command
        self._process: subprocess.Popen | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()
        self._stderr.close()

    def end(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            process.stdin.close()
            process.stdout.close()
            _running.discard(process)

    def _start(self) -> subprocess.Popen:
        self._process = subprocess.Popen(
            self.command, env=_environment(self.threads), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._stderr, start_new_session=True, bufsize=0,
        )  # fmt: skip
        _running.add(self._process)
        return self._process

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The answer to one request, or `status` and `reason` of the process that should have.

        Blocks without polling, so the parent takes no processor time from what is measured.
        On Ctrl-C the process is ended and the interrupt goes on.
        """
        self._stderr.seek(0)
        self._stderr.truncate()
        try:
            process = self._process
            if process is None or process.poll() is not None:
                self.end()
                process = self._start()
            process.stdin.write(json.dumps(request).encode() + b"\n")
            ready, _, _ = select.select([process.stdout], [], [], limit_s)
            if not ready:
                self.end()
                return {"status": "timeout", "reason": f"not done after {limit_s:g} s"}
            line = _read_line(process)
        except OSError as error:  # no memory or no process slot for a worker, or it died idle
            self.end()
            return {"status": "failed", "reason": f"no worker process: {one_line(error)}"}
        except BaseException:
            self.end()
            raise
        if os.environ.get("REPLIVIT_DEBUG"):
            sys.stderr.write(self._printed())
        if not line.endswith(b"\n"):
            answer = {"returncode": process.wait()}
            self.end()
        else:
            answer = json.loads(line)
            if answer.pop("last", False):
                self.end()
        return self._why_it_ended(answer["returncode"]) if "returncode" in answer else answer

    def _printed(self, last: int = 1_000_000) -> str:
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - last))
        return self._stderr.read().decode(errors="replace")

    def _why_it_ended(self, returncode: int) -> dict[str, str]:
        """Status and reason for a process that ended without an answer."""
        if returncode == -signal.SIGKILL:
            return {
                "status": "out_of_memory",
                "reason": "the system killed the process, most likely for lack of memory",
            }
        if returncode < 0:
            name = signal.Signals(-returncode).name
            return {"status": "failed", "reason": f"the process crashed with {name}"}
        lines = self._printed(4000).strip().splitlines()
        words = f"; its last words: {lines[-1].strip()[:300]}" if lines else ""
        return {"status": "failed", "reason": f"the process ended with code {returncode}{words}"}


def _read_line(process: subprocess.Popen) -> bytes:
    """One line of an unbuffered pipe, or what came before it closed."""
    chunks = []
    while chunk := process.stdout.read(1 << 20):
        chunks.append(chunk)
        if chunk.endswith(b"\n"):
            break
    return b"".join(chunks)


def failed_records(
    cell: Cell, run_id: str, status: str, reason: str, variant: Variant | None = None, **when: Any
) -> list[Record]:
    """The rows of a cell that could not be measured: its variant, metrics and conditions.

    Args:
        variant: the registry's entry; None for a module of the caller's.
        when: `started` and `duration_s`, as in `make_record`.
    """
    conditions = cell.variant_conditions(variant)
    if cell.group == "accuracy":
        sha256 = shipped_sha256(cell.variant, cell.track) if variant else None
        update = {"track": cell.track, "weights_sha256": sha256}
        conditions = conditions.model_copy(update=update)
    return [
        make_record(
            cell.variant, metric, None, conditions, run_id=run_id, status=status, reason=reason,
            paper=variant.paper.key if variant else None, **when,
        )
        for metric in GROUPS[cell.group]
    ]  # fmt: skip


def run_isolated(cell: Cell, run_id: str, worker: Worker | None = None) -> list[Record]:
    """Measure a cell in a fresh process; a failure of any kind comes back as failed records.

    Args:
        worker: asked for the process; one of its own by default.

    Raises:
        ReplivitError: the cell names what does not exist (variant, backend, device, ...).
    """
    cell.check()
    variant = get_variant(cell.variant)
    if worker is None:
        with Worker(cell.threads) as worker:
            return run_isolated(cell, run_id, worker)
    request = {"cell": cell.to_dict(), "run_id": run_id, "cpus": _cpus(cell)}
    started, tick = datetime.now(timezone.utc), time.perf_counter()
    answer = worker.ask(request, cell.limit_s)
    if "records" in answer:
        return [Record.model_validate(one) for one in answer["records"]]
    duration_s = time.perf_counter() - tick
    return failed_records(
        cell, run_id, **answer, variant=variant, started=started, duration_s=duration_s
    )
