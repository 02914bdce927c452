"""`replivit list` and `replivit info`: what is in the case."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from harness import registry
from replivit.cli.console import err, out


def register(app: typer.Typer) -> None:
    app.command("list")(list_all)
    app.command("info")(info)


def list_all(
    paper: Annotated[str | None, typer.Argument(help="Only this paper.")] = None,
) -> None:
    """List papers with their variants and experiments."""
    chosen = [registry.get_paper(paper)] if paper else registry.papers()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("paper", "year", "variants", "experiments"):
        table.add_column(column, overflow="fold")
    for one in chosen:
        if one.broken:
            table.add_row(one.key, "", f"[red]broken: {escape(one.broken)}", "")
            continue
        table.add_row(
            one.key,
            str(one.facts.year),
            ", ".join(one.facts.variants),
            ", ".join(one.facts.experiments),
        )
    out.print(table)
    if any(one.broken for one in chosen):
        err.print("some papers are broken and were left out of all commands", style="yellow")
        raise typer.Exit(1)


def info(
    name: Annotated[str, typer.Argument(help="A paper or a variant.")],
) -> None:
    """Say what a paper or a variant is, and where its facts come from."""
    if any(name == paper.key for paper in registry.papers()):
        facts = registry.get_paper(name).facts
        out.print(f"[bold]{escape(facts.title)}[/bold]")
        out.print(escape(f"{', '.join(facts.authors)}. {facts.venue}, {facts.year}."))
        if facts.arxiv:
            out.print(f"arXiv {facts.arxiv}")
        if facts.code:
            out.print(escape(f"code: {facts.code.url} ({facts.code.license or 'no licence'})"))
        out.print(escape(f"\n{facts.summary}\n"))
        for label, lines in (("claims", facts.claims), ("notes", facts.notes)):
            for line in lines:
                out.print(escape(f"{label}: {line}"))
        out.print(escape(f"variants: {', '.join(facts.variants)}"))
        out.print(escape(f"experiments: {', '.join(facts.experiments) or 'none'}"))
        out.print(f"published numbers: {len(facts.published)}")
        return
    variant = registry.get_variant(name)
    out.print(f"[bold]{variant.name}[/bold] of {variant.paper.key}: {escape(variant.spec.summary)}")
    out.print(
        f"track {variant.track}, {variant.spec.image_size} px, "
        f"{variant.spec.num_classes} classes, {variant.spec.family}"
    )
    for row in variant.paper.facts.published:
        if row.of == variant.name:
            line = f"{row.metric} {row.value} {row.unit} ({row.conditions}; {row.source})"
            out.print(escape(line))
