"""`replivit count`: one model's parameters and MACs by every counter, and where they go."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from replivit.cli.console import err, out
from replivit.cli.units import value_text

if TYPE_CHECKING:
    from harness.measurement.macs import ModuleCost
    from harness.record import Record

_LABELS = {
    "params": "params",
    "params_trainable": "params, trainable",
    "params_paper": "params, paper's rule",
    "macs": "MACs",
    "macs_fvcore": "MACs, fvcore",
    "macs_paper": "MACs, paper's rule",
}


def register(app: typer.Typer) -> None:
    app.command()(count)


def count(
    variant: Annotated[str, typer.Argument(help="A variant, see `replivit list`.")],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels; default the variant's own.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=0, help="Classes; default the variant's own.")
    ] = None,
    depth: Annotated[
        int, typer.Option(min=0, help="Levels of the per-module table; 0 leaves it out.")
    ] = 2,
    operators: Annotated[
        bool, typer.Option("--operators", help="List each uncounted operator, not only kinds.")
    ] = False,
) -> None:
    """Count parameters and MACs of a variant by every counter, and explain the differences.

    MACs are multiply-adds of convolutions, matrix products and attention per image. The second
    counter (fvcore) also counts norms and pooling; the third is the paper's own rule. Work that no
    counter sees is listed by kind. Nothing is recorded: `replivit measure` does that.

    Example: replivit count deit_ti --depth 3
    """
    from harness import registry

    chosen = registry.get_variant(variant)  # a typo is answered before torch is imported

    from harness.measurement.counting import count_records, image_pack
    from harness.measurement.macs import breakdown
    from harness.record import Conditions, new_run_id

    size = image_size or chosen.spec.image_size
    module = registry.build(chosen.name, num_classes=num_classes, image_size=size)
    conditions = Conditions(batch_size=1, image_size=size, num_classes=num_classes)
    images = image_pack(chosen, size) if chosen.spec.dynamic else None
    records = count_records(chosen.name, module, conditions, new_run_id(), chosen, images=images)
    by_metric = {record.metric: record for record in records}
    out.print(f"[bold]{chosen.name}[/bold], {size} px, one image\n")
    _print_totals(by_metric)
    macs = by_metric["macs"]
    if macs.measured:
        if depth:
            inputs = images.images[0][None] if images else None
            _print_modules(breakdown(module, size, inputs=inputs), depth)
        _print_uncounted(macs.detail["not_counted"], operators)
    failed = [record for record in records if not record.measured]
    for record in failed:
        reason = f"{_LABELS[record.metric]}: {record.reason}"
        err.print(reason, style="red", markup=False)
    if failed:
        raise typer.Exit(1)


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """A plain table; the first `left` columns hold words, the others numbers."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns[:left]:
        table.add_column(column, overflow="fold")
    for column in columns[left:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print_totals(by_metric: dict[str, Record]) -> None:
    table = _table("", "count", "value", "short", "to MACs")
    macs = by_metric["macs"]
    gap = by_metric["macs_fvcore"].detail.get("gap")
    for metric, record in by_metric.items():
        if not record.measured:
            table.add_row(_LABELS[metric], escape(record.status), "", "")
            continue
        relative = ""
        if metric == "macs_fvcore" and gap and gap["relative"] is not None:
            relative = f"{gap['relative']:+.2%}"
        elif metric == "macs_paper" and macs.value:
            relative = f"{record.value / macs.value - 1:+.2%}"
        table.add_row(_LABELS[metric], f"{record.value:,.0f}", value_text(record), relative)
    out.print(table)
    spread = macs.detail
    if "p5" in spread:
        out.print(
            f"\nMACs depend on the image: mean of {macs.n} images of {escape(spread['images'])}, "
            f"p5 {spread['p5']:,.0f}, p95 {spread['p95']:,.0f}; "
            "fvcore and the tables below speak of the first one"
        )
    if gap and gap["reasons"]:
        style = "yellow" if gap["notable"] else None
        out.print("\nWhy fvcore differs", style="bold")
        for reason in gap["reasons"]:
            line = f"  {reason['macs']:+,}  {reason['operator']} ({reason['why']})"
            out.print(line, style=style, markup=False)


def _print_modules(root: ModuleCost, depth: int) -> None:
    table = _table("\nWhere they go", "module", "type", "params", "MACs", "share", left=2)

    def add(node: ModuleCost, level: int) -> None:
        share = f"{node.macs / root.macs:.1%}" if root.macs else ""
        name = "  " * level + node.name + (f" (called {node.calls} times)" * (node.calls > 1))
        table.add_row(escape(name), node.type, f"{node.params:,}", f"{node.macs:,}", share)
        shown = [child for child in node.children if child.macs or child.params]
        if shown and level < depth:
            for child in shown:
                add(child, level + 1)
            macs = node.macs - sum(child.macs for child in node.children)
            params = node.params - sum(child.params for child in node.children)
            if macs > 0 or params > 0:
                share = f"{macs / root.macs:.1%}" if root.macs else ""
                table.add_row(
                    "  " * (level + 1) + "(its own)", "", f"{params:,}", f"{macs:,}", share
                )

    add(root, 0)
    out.print(table)


def _print_uncounted(uses: dict[str, dict[str, Any]], each: bool) -> None:
    """Operators without a formula; those that may hide multiply-adds are marked."""
    from harness.measurement.operators import SUSPICIOUS

    if not uses:
        return
    groups: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for name, use in uses.items():
        groups[use["kind"], name if each else ""].append((name.removeprefix("aten."), use))
    columns = ("kind", "operators", "calls", "MB moved", "MACs, estimated")
    table = _table("\nIn no count", *columns, left=2)
    for (kind, _), members in sorted(groups.items()):
        estimate = sum(use["estimated_macs"] for _, use in members)
        table.add_row(
            kind,
            escape(", ".join(name for name, _ in members)),
            str(sum(use["calls"] for _, use in members)),
            f"{sum(use['bytes_moved'] for _, use in members) / 1e6:.2f}",
            f"{estimate:,}" if estimate else "",
            style="yellow" if kind in SUSPICIOUS else None,
        )
    out.print(table)
    if any(use["kind"] in SUSPICIOUS for use in uses.values()):
        err.print("marked kinds may hide multiply-adds that no total contains", style="yellow")
