"""What the experiments share: settings by scale, and the paper's rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from harness import ReplivitError, get_paper

S = TypeVar("S")


def choose(scales: dict[str, S], scale: str, options: dict[str, Any]) -> S:
    """The settings of a scale with some fields changed.

    Raises:
        ReplivitError: there is no such scale or field.
    """
    if scale not in scales:
        raise ReplivitError(f"no scale {scale!r}; there are {', '.join(scales)}")
    known = scales[scale].__dataclass_fields__
    for name in options:
        if name not in known:
            raise ReplivitError(f"no option {name!r}; there are {', '.join(known)}")
    return replace(scales[scale], **options)


def published(metric: str) -> list[dict[str, Any]]:
    """The paper's printed numbers of one metric."""
    keep = ("variant", "metric", "value", "unit", "source")
    rows = get_paper("tf_tas").facts.published
    return [{key: getattr(row, key) for key in keep} for row in rows if row.metric == metric]
