"""`replivit measure`: one or more variants on the bench."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from replivit.cli.console import err, out

COLOURS = {"ok": "green", "noisy": "yellow", "contended": "yellow"}


def register(app: typer.Typer) -> None:
    app.command("measure")(measure)


def parse_options(pairs: list[str] | None, option: str = "--set") -> dict[str, Any]:
    """`["keep_ratio=0.7", "name=x"]` -> values read as YAML; Python's `None` is YAML's `null`.

    Raises:
        ReplivitError: a pair without `=`, or a value that is no YAML.
    """
    import yaml

    from harness.errors import ReplivitError

    options = {}
    for pair in pairs or ():
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise ReplivitError(f"{option} {pair!r}: write key=value")
        try:
            options[key] = None if value == "None" else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ReplivitError(f"{option} {pair!r}: {value!r} cannot be read") from error
    return options


def measure(
    variants: Annotated[list[str], typer.Argument(help="Variants, as `replivit list` names them.")],
    metrics: Annotated[
        str,
        typer.Option(
            help="Comma-separated: params, macs, latency, memory (or memory_inference, "
            "memory_training), accuracy."
        ),
    ] = "params,macs,latency,memory",
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 1,
    backend: Annotated[
        str,
        typer.Option(
            help="eager, deploy, compile, cuda_graph, channels_last, or several joined by '+'."
        ),
    ] = "eager",
    threads: Annotated[int, typer.Option(help="CPU threads of the model.", min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:<number>.")] = "cpu",
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of a side; default the variant's own.", min=1)
    ] = None,
    track: Annotated[
        str | None, typer.Option(help="Track of accuracy; default the variant's own.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value for the variant's builder; may be repeated."),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="How long latency is measured: quick (8 s) or full (60 s).")
    ] = "quick",
    save: Annotated[bool, typer.Option(help="Append the records to the store.")] = True,
) -> None:
    """Measure variants, each group of metrics in a fresh process, and keep the records.

    Example: replivit measure efficientformer_l1 deit_ti --metrics latency --backend deploy

    Latency is timed beside DeiT-Ti, the yardstick; the ratio to it is what travels between
    machines. A value marked noisy or contended is not yet to be trusted: measure again on a
    quieter machine, or with --profile full.
    """
    import harness
    from harness.record import RecordStore
    from harness.registry import get_variant

    names = [get_variant(name).name for name in variants]  # a typo in the last stops the first
    store = RecordStore() if save else None
    failed = False
    for name in names:
        err.print(f"measuring {name} ...", markup=False)
        records = harness.measure(
            name,
            tuple(metric.strip() for metric in metrics.split(",") if metric.strip()),
            batch_size=batch_size, device=device, threads=threads, backend=backend, dtype=dtype,
            image_size=image_size, track=track, options=parse_options(set_),
            profile=profile, store=store,
        )  # fmt: skip
        out.print(records_table(name, records))
        failed = failed or not all(record.measured for record in records)
    if store is not None:
        err.print(f"records: {store.file}", markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def records_table(name: str, records: list) -> Table:
    """One row per record: value, interval, status."""
    from replivit.cli.units import interval_text, value_text

    table = Table(title=escape(name), title_justify="left", box=None, header_style="bold")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("status", overflow="fold")
    said = None
    for record in records:
        colour = COLOURS.get(record.status, "red")
        reason = f": {escape(record.reason)}" if record.reason and record.reason != said else ""
        said = record.reason
        value = value_text(record) if record.measured else ""
        table.add_row(
            record.metric, value, interval_text(record),
            f"[{colour}]{record.status}[/{colour}]{reason}",
        )  # fmt: skip
    return table
