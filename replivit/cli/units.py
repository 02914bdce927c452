"""Values as people read them: milliseconds, mebibytes, millions."""

from __future__ import annotations

from harness.record import Record

#: unit of a record -> (divisor, shown unit) by metric or unit; the first that fits is used.
_SHOWN = {
    "s": (1e-3, "ms"),
    "bytes": (2**20, "MiB"),
    "%": (1.0, "%"),
    "x yardstick": (1.0, "x"),
}


def _scale(record: Record) -> tuple[float, str]:
    if record.unit == "count":
        name = record.metric.partition("_")[0]
        return (1e9, "GMACs") if name == "macs" and record.value >= 1e8 else _millions(name)
    return _SHOWN.get(record.unit, (1.0, record.unit))


def _millions(name: str) -> tuple[float, str]:
    return (1e6, "MMACs") if name == "macs" else (1e6, f"M {name}")


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
