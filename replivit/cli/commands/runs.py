"""`replivit run` and `replivit schema`: one experiment, and the form of what is recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table

from replivit.cli.commands.measure import parse_options
from replivit.cli.console import err, out

if TYPE_CHECKING:
    from harness.experiment import ExperimentResult

#: A table up to so many times as wide as the terminal is folded, and still one.
FOLDED = 1.5
OUTCOME_COLOURS = {"reproduced": "green", "deviates": "yellow", "not measured": "dim"}


def register(app: typer.Typer) -> None:
    app.command("run")(run)
    app.command("schema")(schema)


def run(
    name: Annotated[str, typer.Argument(help="PAPER/EXPERIMENT, as `replivit list` names it.")],
    scale: Annotated[
        str, typer.Option(help="small: minutes on a laptop; other scales as the experiment says.")
    ] = "small",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value, an option of the experiment; may be repeated."),
    ] = None,
    ship: Annotated[
        bool,
        typer.Option("--ship", help="Put record and figures into the paper's results/ as well."),
    ] = False,
) -> None:
    """Rerun one table or figure of a paper: rows, findings, and the figures' files.

    Example: replivit run efficientformer_v2/stride_attention --scale small

    The result is recorded, and stands on the paper's page of the leaderboard.
    """
    from harness import experiment

    result = experiment.run(name, scale=scale, **parse_options(set_))
    print_experiment(result)
    if ship:
        from harness.results import ship_result

        for path in ship_result(result.record):
            err.print(f"shipped: {path}", markup=False, soft_wrap=True)


def print_experiment(result: ExperimentResult) -> None:
    """An experiment's result as tables."""
    out.print(f"[bold]{escape(result.title)}[/bold] ({escape(result.name)}, {result.scale})")
    if result.rows:
        print_rows(result.rows)
    if result.published:
        out.print("[bold]As the paper prints it[/bold]")
        print_rows(result.published)
    for finding in result.findings:
        colour = OUTCOME_COLOURS[finding.outcome]
        out.print(f"[{colour}]{finding.outcome}[/{colour}]: {escape(finding.claim)}")
        out.print(f"  {escape(finding.evidence)}")
    if result.notes:
        out.print(escape(result.notes))
    for path in result.figure_files:
        err.print(f"figure: {path}", markup=False, soft_wrap=True)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A table; where it is far too wide for the terminal, a paragraph for each row."""
    table = rows_table(rows)
    natural = Measurement.get(out, out.options.update(max_width=10_000), table).maximum
    if natural <= FOLDED * out.width or len(rows[0]) == 1:
        out.print(table)
        return
    for row in rows:
        (_, title), *rest = row.items()
        told = [f"{key}: {_text(value)}" for key, value in rest if value not in (None, "")]
        out.print(f"[bold]{escape(_text(title))}[/bold]")
        out.print(Padding(escape("; ".join(told)), (0, 0, 0, 2)))


def rows_table(rows: list[dict[str, Any]]) -> Table:
    """Plain dictionaries as a table; numbers to the right, with four significant digits."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for key in rows[0]:
        number = isinstance(rows[0][key], int | float)
        table.add_column(escape(str(key)), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(_text(row.get(key))) for key in rows[0]))
    return table


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def schema() -> None:
    """Print the JSON Schema of a record line, for programs in other languages.

    Example: replivit schema > record.schema.json
    """
    import json

    from harness.record import records_schema

    typer.echo(json.dumps(records_schema(), indent=2))
