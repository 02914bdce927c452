"""`replivit rerun`: one paper's numbers beside what is measured here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from harness.errors import one_line
from replivit.cli.commands.leaderboard import sweep_missing
from replivit.cli.commands.runs import OUTCOME_COLOURS, print_experiment
from replivit.cli.console import err, out

if TYPE_CHECKING:
    from leaderboard.verdicts import Verdict


def register(app: typer.Typer) -> None:
    app.command("rerun")(rerun)


def rerun(
    paper: Annotated[str, typer.Argument(help="A paper, as `replivit list` names it.")],
    experiments: Annotated[
        bool, typer.Option(help="Rerun the paper's experiments too, at small scale.")
    ] = True,
    measure: Annotated[
        bool, typer.Option(help="Measure what this machine has no record of yet.")
    ] = True,
    profile: Annotated[
        str, typer.Option(help="quick: batch 1. full: batch 1, 8 and 32, deployed and compiled.")
    ] = "quick",
) -> None:
    """Measure a paper's models, rerun its experiments, and give a verdict per published number.

    Example: replivit rerun efficientformer --no-experiments

    Verdicts: reproduced, deviates (with the reason), not measured (with the reason). The exit
    code is 1 where an experiment could not be run.
    """
    from harness import experiment, registry
    from harness.record import RecordStore
    from leaderboard.tables import collect
    from leaderboard.verdicts import ledger

    found = registry.get_paper(paper)
    store = RecordStore()
    if measure:
        sweep_missing(store, paper, profile, None)
    broken = []
    for one in registry.experiments(paper) if experiments else []:
        err.print(f"running {one.name} ...", markup=False)
        try:
            print_experiment(experiment.run(one.name, store=store))
        except Exception as error:  # one broken experiment must not hide the others
            broken.append(one.name)
            err.print(f"{one.name} failed: {one_line(error)}", style="red", markup=False)
    verdicts = ledger(found, collect(store, registry.papers()))
    out.print(f"[bold]{escape(found.facts.title)}[/bold]")
    out.print(ledger_table(verdicts))
    counts = {name: sum(one.outcome == name for one in verdicts) for name in OUTCOME_COLOURS}
    out.print(", ".join(f"{count} {name}" for name, count in counts.items()))
    if broken:
        raise typer.Exit(1)


def ledger_table(verdicts: list[Verdict]) -> Table:
    """Published beside measured, one verdict per row."""
    from leaderboard.paper_pages import ledger_rows

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, justify in (
        ("model", "left"), ("metric", "left"), ("published", "right"), ("measured", "right"),
        ("verdict", "left"), ("reason", "left"), ("source", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")
    for row in ledger_rows(verdicts):
        colour = OUTCOME_COLOURS[row["outcome"]]
        measured = " ".join(filter(None, (row["measured"], row["interval"], row["mark"])))
        table.add_row(
            escape(row["of"] or row["variant"]), escape(row["metric"]),
            escape(f"{row['value']} {row['unit']}"), escape(measured or "–"),
            f"[{colour}]{row['outcome']}[/{colour}]", escape(row["reason"]),
            escape(row["source"]),
        )  # fmt: skip
    return table
