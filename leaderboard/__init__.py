"""Records + papers -> tables, Pareto fronts, verdicts, figures and pages.

`build_site` writes everything; the modules below it are pure functions of records and papers.
"""

from __future__ import annotations

from typing import Any

__all__ = ["SitePaths", "build_site"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from leaderboard import site

        return getattr(site, name)
    raise AttributeError(f"module 'leaderboard' has no attribute {name!r}")
