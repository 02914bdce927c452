"""Sentinels: was the machine left alone while a round of timing ran?

A snapshot is taken before and after each round; the difference is a `Reading`. What exceeds its
limit is a disturbance, said in words, and voids the round. A source that a system does not offer
reads as None and never trips.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

PRESSURE = Path("/proc/pressure/cpu")
PROC_STAT = Path("/proc/stat")
#: Seconds in which one involuntary switch is ordinary housekeeping of the system.
SWITCH_S = 0.02


@dataclass(frozen=True)
class Limits:
    """What a round may show and still count. Shares are of the round's wall time."""

    pressure: float = 0.05  #: some task of the machine waited for a processor
    steal: float = 0.01  #: the hypervisor ran somebody else: in a short round, not one tick
    switches: float = 1.0  #: involuntary, per call; a long call may have one per `SWITCH_S`
    wall_over_cpu: float = 1.03  #: above it, this process stood still for a while
    drift: float = 0.03  #: of the yardstick against its earlier rounds, relative


@dataclass(frozen=True)
class Snapshot:
    """Counters at one moment; seconds and counts since some start."""

    wall: float
    cpu: float
    switches: int
    pressure: float | None
    steal: float | None


@dataclass(frozen=True)
class Reading:
    """What happened between two snapshots."""

    pressure: float | None
    steal: float | None
    switches: float
    wall_over_cpu: float


def available_cpus() -> list[int]:
    """The processors that this process may use, in order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _pressure_s() -> float | None:
    """Seconds in which some task waited for a processor (`some ... total=<microseconds>`)."""
    try:
        some = PRESSURE.read_text().splitlines()[0]
        return int(some.rsplit("total=", 1)[1]) / 1e6
    except (OSError, IndexError, ValueError):
        return None


def _steal_s(cpus: list[int]) -> float | None:
    """Seconds stolen by the hypervisor, the mean over `cpus` (eighth number of `/proc/stat`)."""
    wanted = {f"cpu{index}" for index in cpus}
    try:
        rows = [line.split() for line in PROC_STAT.read_text().splitlines()]
        ticks = [int(row[8]) for row in rows if row and row[0] in wanted]
        return sum(ticks) / len(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError, ZeroDivisionError):
        return None


def snapshot() -> Snapshot:
    """The counters now; steal is read for the processors this process may use."""
    import resource

    return Snapshot(
        wall=time.perf_counter(),
        cpu=time.process_time(),
        switches=resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
        pressure=_pressure_s(),
        steal=_steal_s(available_cpus()),
    )


def reading(before: Snapshot, after: Snapshot, calls: int) -> Reading:
    """The difference of two snapshots around `calls` calls."""
    wall = max(after.wall - before.wall, 1e-9)

    def share(name: str) -> float | None:
        start, end = getattr(before, name), getattr(after, name)
        return None if start is None or end is None else (end - start) / wall

    return Reading(
        pressure=share("pressure"),
        steal=share("steal"),
        switches=(after.switches - before.switches) / max(calls, wall / SWITCH_S),
        wall_over_cpu=wall / max(after.cpu - before.cpu, 1e-9),
    )


def disturbances(found: Reading, limits: Limits, drift: float | None = None) -> list[str]:
    """Each limit that was passed, in words; empty for a quiet round.

    Args:
        drift: the yardstick's relative change against its earlier rounds, if there were any.
    """
    checks = (
        ("CPU pressure", found.pressure, limits.pressure, "{:.0%}"),
        ("stolen time", found.steal, limits.steal, "{:.1%}"),
        ("involuntary context switches", found.switches, limits.switches, "{:.1f} per call"),
        ("wall time over CPU time", found.wall_over_cpu, limits.wall_over_cpu, "{:.2f}"),
        ("drift of the yardstick", None if drift is None else abs(drift), limits.drift, "{:.0%}"),
    )  # fmt: skip
    return [
        f"{name} {form.format(value)} (limit {form.format(limit)})"
        for name, value, limit, form in checks
        if value is not None and value > limit
    ]
