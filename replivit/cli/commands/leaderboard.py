"""`replivit leaderboard`: measure what is missing, then build the pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from replivit.cli.console import err, out

if TYPE_CHECKING:
    from harness.record import RecordStore
    from leaderboard.changes import Comparison
    from leaderboard.tables import Board

#: Minutes of measuring that the quick profile is held to unless told otherwise.
QUICK_MINUTES = 10.0
#: Columns of a terminal that has room for intervals.
WIDE = 150
KIND_COLOURS = {"better": "green", "works again": "green", "worse": "red", "failed": "red"}


def register(app: typer.Typer) -> None:
    app.command("leaderboard")(leaderboard)


def leaderboard(
    measure: Annotated[
        bool, typer.Option(help="Measure what this machine has no record of yet.")
    ] = True,
    site: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the pages; default `site` in REPLIVIT_HOME."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Old leaderboard.json, or a folder of records, to compare with."),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="quick: batch 1. full: batch 1, 8 and 32, deployed and compiled.")
    ] = "quick",
    only: Annotated[
        str | None, typer.Option(help="Measure the variants of this paper alone.")
    ] = None,
    budget_minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Shorten timings to end in about so long; default 10 for quick."),
    ] = None,
) -> None:
    """Measure all models and build the leaderboard: one page, and one per paper.

    Example: replivit leaderboard --against site/leaderboard.json

    What this machine has measured already is not measured again. Stopped at any moment, the same
    command goes on with what is missing. The page shows the records of every machine in
    `records/`, and those shipped with the papers.
    """
    from harness import registry
    from harness.environment import home
    from harness.record import RecordStore
    from leaderboard.changes import load_old

    store = RecordStore()
    site = site if site is not None else home() / "site"
    if against is not None:
        load_old(against, registry.papers())  # a wrong path must not wait for the measuring
    if measure:
        if budget_minutes is None and profile == "quick":
            budget_minutes = QUICK_MINUTES
        try:
            sweep_missing(store, only, profile, budget_minutes)
        except KeyboardInterrupt:
            _build(store, site, against)
            raise
    elif only is not None:
        registry.get_paper(only)
    _build(store, site, against)


def sweep_missing(
    store: RecordStore, paper: str | None, profile: str, budget_minutes: float | None
) -> None:
    """Measure what is missing (of one paper), with progress; failures are printed."""
    from harness import registry
    from harness.sweep import plan, run_sweep
    from replivit.cli.sweep_progress import SweepProgress, print_summary

    cells = plan(registry.variants(paper) if paper is not None else None, profile)
    with SweepProgress() as progress:
        summary = run_sweep(cells, store, progress, budget_minutes=budget_minutes)
    print_summary(summary)


def _build(store: RecordStore, folder: Path, against: Path | None) -> None:
    from leaderboard import build_site

    err.print("building the pages ...")
    site = build_site(store, folder, against=against)
    view = site.board.default_view
    title = f"{view.machine}; {view.setting}" if view else "no times yet"
    out.print(f"[bold]{escape(title)}[/bold]", soft_wrap=True)
    out.print(board_table(site.board))
    out.print("* as published, not measured here;  ~ noisy or contended", style="dim")
    for notice in site.board.notices:
        err.print(f"note: {notice}", style="yellow", markup=False)
    if site.comparison is not None:
        print_changes(site.comparison)
    out.print(f"[bold]{escape(str(site.index))}[/bold]", soft_wrap=True)


def board_table(board: Board) -> Table:
    """The board of the default view; with intervals where the terminal has room for them."""
    from leaderboard.columns import COLUMNS
    from leaderboard.export import cell_text

    view = board.default_view
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("variant", no_wrap=True)
    for column in COLUMNS.values():
        unit = column.unit.replace(" yardstick", "")
        table.add_column(f"{column.label}\n{unit}", justify="right")
    brief = out.width < WIDE
    for track in board.tracks:
        table.add_row(f"[dim]{escape(track)}[/dim]")
        for row in board.rows:
            if row.track == track:
                texts = [escape(cell_text(row, key, view, brief)) for key in COLUMNS]
                table.add_row(escape(row.name), *texts)
    return table


def print_changes(comparison: Comparison) -> None:
    """Every significant change, and how much stayed within noise."""
    from leaderboard.changes import describe

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("", "variant", "metric", "old", "new", "change", "because", "where"):
        table.add_column(name, overflow="fold")
    for change in comparison.changes:
        one = {key: escape(str(text)) for key, text in describe(change).items()}
        colour = KIND_COLOURS.get(change.kind, "yellow")
        table.add_row(
            f"[{colour}]{one['kind']}[/{colour}]", one["variant"], one["metric"], one["old"],
            one["new"], one["relative"], one["basis"], one["where"],
        )  # fmt: skip
    out.print(f"[bold]Against {escape(comparison.source)}[/bold]")
    if comparison.changes:
        out.print(table)
    out.print(f"{len(comparison.changes)} significant changes, {comparison.unchanged} within noise")
