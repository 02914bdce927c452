"""Values as people read them: milliseconds, mebibytes, millions."""

from __future__ import annotations

from harness.record import Record

#: unit of a record -> shown units with their size, the largest that fits is taken.
_SHOWN = {
    "s": ((1.0, "s"), (1e-3, "ms")),
    "bytes": ((2**30, "GiB"), (2**20, "MiB")),
    "x yardstick": ((1.0, "x"),),
}
_COUNTED = {"macs": ((1e9, "GMACs"), (1e6, "MMACs"))}


def _scale(record: Record) -> tuple[float, str]:
    """Divisor and name of the unit that a record's value is shown in."""
    if record.unit == "count":
        name = record.metric.partition("_")[0]
        units = _COUNTED.get(name, ((1e6, f"M {name}"),))
    else:
        units = _SHOWN.get(record.unit, ((1.0, record.unit),))
    return next((unit for unit in units if record.value >= unit[0]), units[-1])


def value_text(record: Record) -> str:
    """`5.72 M params`, `1.25 GMACs`, `33.4 ms`, `0.98 x`; the status where there is no value."""
    if record.value is None:
        return record.status
    divisor, unit = _scale(record)
    return f"{record.value / divisor:.4g} {unit}"


def interval_text(record: Record) -> str:
    """`32.9 to 34.0`, in the unit of `value_text`; empty where there is none."""
    if record.value is None or record.interval is None:
        return ""
    divisor, _ = _scale(record)
    low, high = (f"{bound / divisor:.4g}" for bound in record.interval)
    return f"{low} to {high}"
