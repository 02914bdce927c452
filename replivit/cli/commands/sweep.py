"""`replivit sweep`: everything that is still missing, measured."""

from __future__ import annotations

from typing import Annotated

import typer

from replivit.cli.console import err


def register(app: typer.Typer) -> None:
    app.command("sweep")(sweep)


def sweep(
    variants: Annotated[
        list[str] | None, typer.Argument(help="Only these variants or papers; default all.")
    ] = None,
    profile: Annotated[
        str,
        typer.Option(
            help="quick: batch 1, eager (and deploy for reproductions). "
            "full: batch 1, 8, 32, also compiled, with more precision."
        ),
    ] = "quick",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads of each model.", min=1)] = 1,
    budget_minutes: Annotated[
        float | None,
        typer.Option(
            min=0, help="Shorten the timing of each cell so that all ends in about so long."
        ),
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Measure noisy, contended and failed cells again.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what this machine has records of.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(help="Processes side by side for what is not timed.", min=1)
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Each cell a job of the cluster (extra `cluster`).")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be measured.")
    ] = False,
) -> None:
    """Measure variants: params, MACs, memory, top-1 of shipped weights, latency.

    Example: replivit sweep baselines efficientformer_l1 --budget-minutes 5

    Without names: all are counted and scored, those in their paper's showcase also timed. Papers
    and variants that are named are measured in full, as are all with --profile full.

    Each cell runs in a fresh process; its records are kept at once. Stopped at any moment, the
    same command goes on with what is missing. A model that fails is a row that says so.
    """
    from harness import sweep as sweeping
    from harness.record import RecordStore
    from replivit.cli.sweep_progress import SweepProgress, print_summary

    cells = sweeping.plan(
        chosen_variants(variants) if variants else None, profile, device=device, threads=threads
    )
    store = RecordStore()
    if dry_run:
        todo = cells if fresh else sweeping.missing(cells, store.load(), retry=retry)
        for cell in todo:
            err.print(cell.label, markup=False)
        err.print(f"{len(todo)} of {len(cells)} cells to measure")
        return
    with SweepProgress() as progress:
        if cluster:
            summary = sweeping.run_on_cluster(cells, store, progress, retry=retry, fresh=fresh)
        else:
            summary = sweeping.run_sweep(
                cells, store, progress, jobs=jobs, budget_minutes=budget_minutes,
                retry=retry, fresh=fresh,
            )  # fmt: skip
    print_summary(summary)
    err.print(f"records: {store.file}", markup=False, soft_wrap=True)
    if summary.failures:
        raise typer.Exit(1)


def chosen_variants(names: list[str]) -> list:
    """Variants by name; a paper's name stands for all of its variants.

    Raises:
        ReplivitError: a name that is neither (with suggestions).
    """
    from harness import registry

    keys = {paper.key for paper in registry.papers()}
    chosen = []
    for name in names:
        chosen += registry.variants(name) if name in keys else [registry.get_variant(name)]
    return list(dict.fromkeys(variant.name for variant in chosen))
