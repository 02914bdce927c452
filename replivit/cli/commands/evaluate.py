"""`replivit evaluate`: top-1 and top-5 on a track's test split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from replivit.cli.commands.measure import parse_options, records_table
from replivit.cli.console import err, out


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    variant: Annotated[str, typer.Argument(help="A variant, as `replivit list` names it.")],
    track: Annotated[
        str | None,
        typer.Option(
            help="imagenet, cifar10, fashion_mini, a folder, a parquet file or a hub name "
            "(owner/name); default the variant's own track."
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Our weights or the authors' checkpoint; default the shipped file."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder that holds the track, or hub:<name>; default REPLIVIT_DATA."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate.")] = "test",
    limit: Annotated[
        int | None, typer.Option(help="Only so many images, spread over the split.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32, or bfloat16 / float16 for mixed precision.")
    ] = "float32",
    backend: Annotated[
        str,
        typer.Option(
            help="eager; deploy for the deployment form, equal to 1e-5 and up to twice as fast; "
            "compile; deploy+compile."
        ),
    ] = "eager",
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of a side; default the variant's own.", min=1)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Loader processes; default by the data: none for small images, else up to 4.",
            min=0,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value for the variant's builder; may be repeated."),
    ] = None,
    save: Annotated[bool, typer.Option(help="Append the records to the store.")] = True,
) -> None:
    """Measure top-1 and top-5 with their 95 % intervals, and keep the records.

    Examples:

      replivit evaluate vit_micro --track fashion_mini

      replivit evaluate efficientformer_l1 --weights efficientformer_l1.pth --data /data

      replivit evaluate dynamicvit_deit_s_k07 --weights k07.pth --data /data --backend deploy

    One bit per image is kept, so that two models can be compared image by image later. With
    --limit the records say so and count as a slice, not as the track's accuracy.
    """
    import harness
    from harness.record import RecordStore
    from harness.registry import get_variant

    chosen = get_variant(variant)
    with _bar() as bar:
        task = bar.add_task(chosen.name, total=None)
        records = harness.evaluate(
            chosen.name, track or chosen.track, split=split, root=data, batch_size=batch_size,
            device=device, limit=limit, weights=weights, dtype=dtype, backend=backend,
            image_size=image_size, workers=workers, options=parse_options(set_),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    out.print(records_table(chosen.name, records))
    if save:
        store = RecordStore()
        store.append(records)
        err.print(f"records: {store.file}", markup=False, soft_wrap=True)


def _bar():
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
        progress.MofNCompleteColumn(), progress.TextColumn("images"),
        progress.TimeRemainingColumn(), console=err, transient=True,
    )  # fmt: skip
