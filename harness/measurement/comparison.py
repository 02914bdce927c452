"""Two models against each other: latency in pairs, accuracy on the same images."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.errors import ReplivitError
from harness.measurement.cell import Cell, get_profile
from harness.measurement.isolation import run_isolated
from harness.record import Record, new_run_id
from harness.registry import get_variant

if TYPE_CHECKING:
    from torch import nn

    from harness.statistics import PairedTest

#: On a disturbed machine neighbours evict caches of one model more than of the other: a bias
#: that pairing does not remove. Smaller differences are not called there.
CONTENDED_MARGIN = 0.10


@dataclass(frozen=True)
class Comparison:
    """Latency of b relative to a, timed in alternation.

    Attributes:
        ratio, interval: seconds of b over seconds of a; above 1, a is the faster.
        verdict: one sentence.
        status: ok, noisy, contended; or how the measurement ended (then ratio is None).
        records: latency of a and of b, with their raw samples.
        accuracy: McNemar's test where both have bits on the same images, a minus b.
    """

    a: str
    b: str
    ratio: float | None
    interval: tuple[float, float] | None
    verdict: str
    status: str
    reason: str | None
    records: tuple[Record, ...]
    accuracy: PairedTest | None = None
    track: str | None = None


def verdict_on(a: str, b: str, ratio: float, interval: tuple[float, float], status: str) -> str:
    """Which is faster, in one sentence; "no difference detected" where that cannot be said."""
    low, high = interval
    numbers = f"ratio {ratio:.3f}, 95 % interval {low:.3f} to {high:.3f}"
    if low <= 1 <= high:
        return f"no difference detected ({numbers})"
    nearest = min(abs(low - 1), abs(high - 1))
    if status == "contended" and nearest < CONTENDED_MARGIN:
        return (
            f"no difference detected: the machine was busy, and differences below "
            f"{CONTENDED_MARGIN:.0%} are not called then ({numbers})"
        )
    if ratio > 1:
        return f"{a} is {ratio:.2f}x faster than {b} (95 % interval {low:.2f} to {high:.2f})"
    low, high = 1 / high, 1 / low
    return f"{b} is {1 / ratio:.2f}x faster than {a} (95 % interval {low:.2f} to {high:.2f})"


def compare(
    a: str | nn.Module,
    b: str | nn.Module,
    *,
    batch_size: int = 1,
    device: str = "cpu",
    threads: int = 1,
    backend: str = "eager",
    dtype: str = "float32",
    image_size: int | None = None,
    num_classes: int | None = None,
    profile: str = "quick",
    known: Iterable[Record] = (),
    **effort: Any,
) -> Comparison:
    """Time two models in alternation, in one process of their own, and say which is faster.

    Two variants' names, or two modules (timed in this process; they need `image_size`).

    Args:
        known: records among which top-1 bits of both are looked for.
        effort: changes of the profile, as in `measure`.

    Raises:
        ReplivitError: an unknown name or impossible conditions.
    """
    get_profile(profile)
    names = [one if isinstance(one, str) else type(one).__name__ for one in (a, b)]
    named = [isinstance(one, str) for one in (a, b)]
    if any(named) and not all(named):
        raise ReplivitError("compare two variants or two modules, not one of each")
    cell = Cell(
        names[0], "compare", rival=names[1], device=device, backend=backend, threads=threads,
        batch_size=batch_size, dtype=dtype, image_size=image_size, num_classes=num_classes,
        profile=profile, effort=effort,
    )  # fmt: skip
    cell.check()
    if all(named):
        names = [get_variant(name).name for name in names]
        records = run_isolated(cell, new_run_id())
    else:
        from harness.measurement.tasks import measure_cell

        if image_size is None:
            raise ReplivitError("comparing modules needs image_size")
        records = measure_cell(cell, new_run_id(), module=copy.deepcopy(a), rival=copy.deepcopy(b))
    return _comparison(names[0], names[1], records, list(known))


def _comparison(a: str, b: str, records: list[Record], known: list[Record]) -> Comparison:
    accuracy, track = paired_accuracy(a, b, known)
    if not all(record.measured for record in records):
        failed = records[0]
        return Comparison(
            a, b, None, None, f"could not be compared: {failed.reason}", failed.status,
            failed.reason, tuple(records), accuracy, track,
        )  # fmt: skip
    detail = records[1].detail
    ratio, interval, status = (
        detail["ratio"],
        tuple(detail["ratio_interval"]),
        detail["ratio_status"],
    )
    return Comparison(
        a, b, ratio, interval, verdict_on(a, b, ratio, interval, status), status,
        detail["ratio_reason"], tuple(records), accuracy, track,
    )  # fmt: skip


def paired_accuracy(a: str, b: str, known: list[Record]) -> tuple[PairedTest | None, str | None]:
    """McNemar's test on the newest top-1 records of both that saw the same images."""
    newest: dict[tuple, Record] = {}
    for record in sorted(known, key=lambda one: one.started):
        if record.metric == "top1" and record.measured and record.detail.get("bits"):
            data = (record.conditions.track, record.conditions.data_fingerprint, record.n)
            newest.pop((record.variant, *data), None)  # so that the newest stands last
            newest[(record.variant, *data)] = record
    for (name, *data), own in reversed(newest.items()):
        other = newest.get((b, *data))
        if name == a and other is not None:
            from harness.record import bits_of
            from harness.statistics import mcnemar

            return mcnemar(bits_of(own), bits_of(other)), own.conditions.track
    return None, None
