"""The rows that the paper prints."""

from __future__ import annotations

from typing import Any

from harness import get_paper


def published(metric: str) -> list[dict[str, Any]]:
    """The paper's printed numbers of one metric."""
    keep = ("variant", "metric", "value", "unit", "source")
    rows = get_paper("tf_tas").facts.published
    return [{key: getattr(row, key) for key in keep} for row in rows if row.metric == metric]
