"""`replivit compare`: two variants timed in alternation."""

from __future__ import annotations

from typing import Annotated

import typer

from replivit.cli.console import err, out


def register(app: typer.Typer) -> None:
    app.command("compare")(compare)


def compare(
    a: Annotated[str, typer.Argument(help="A variant.")],
    b: Annotated[str, typer.Argument(help="The variant to compare it with.")],
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 1,
    backend: Annotated[
        str, typer.Option(help="As in `replivit measure`; both models run with it.")
    ] = "eager",
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")] = "cpu",
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of a side; default each variant's own.", min=1)
    ] = None,
    profile: Annotated[
        str, typer.Option(help="How long it is measured: quick (8 s) or full (60 s).")
    ] = "quick",
) -> None:
    """Say which of two variants is faster, and whether the difference is real.

    Example: replivit compare efficientformer_l1 deit_ti --batch-size 8

    Both run in one process and take turns (a b b a), so a disturbance hits both; the interval is
    that of the paired ratio. Where top-1 of both is on record for the same images, McNemar's
    test says whether that differs too.
    """
    import harness
    from harness.record import RecordStore

    err.print(f"timing {a} and {b} ...", markup=False)
    found = harness.compare(
        a, b, batch_size=batch_size, backend=backend, threads=threads, dtype=dtype, device=device,
        image_size=image_size, profile=profile, known=RecordStore().load(),
    )  # fmt: skip
    if found.ratio is None:
        err.print(found.verdict, style="red", markup=False)
        raise typer.Exit(1)
    for record in found.records:
        low, high = (1e3 * bound for bound in record.interval)
        out.print(
            f"{record.variant}: {1e3 * record.value:.4g} ms "
            f"(95 % interval {low:.4g} to {high:.4g}, {record.status})",
            markup=False,
        )
    out.print(f"latency: {found.verdict}", markup=False)
    if found.reason:
        err.print(f"{found.status}: {found.reason}", style="yellow", markup=False)
    if found.accuracy is None:
        err.print("top-1: no records of both on the same images", style="dim")
        return
    test = found.accuracy
    low, high = (100 * bound for bound in test.interval)
    said = "no difference detected" if test.p_value >= 0.05 else "they differ"
    out.print(
        f"top-1 on {found.track}: {100 * test.difference:+.2f} points, 95 % interval {low:+.2f} to "
        f"{high:+.2f}, McNemar p = {test.p_value:.2g}, {test.n} images: {said}",
        markup=False,
    )
