"""`replivit train`: a variant on a track, with one seed or several."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from harness.errors import ReplivitError
from harness.record import RecordStore
from replivit.cli.commands.measure import parse_options
from replivit.cli.console import err, out

if TYPE_CHECKING:
    from harness.training import TrainedModel


def register(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    variant: Annotated[str, typer.Argument(help="A variant, as `replivit list` names it.")],
    track: Annotated[
        str | None, typer.Option(help="Data and protocol; default: the variant's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    seeds: Annotated[
        str | None, typer.Option(help="Several seeds, one after the other: 0,1,2.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A recipe's name or YAML file; default: the paper's, or the track's."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per update, over all processes.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate, as the recipe's `lr` is meant.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field of the recipe: mixup=0.8, clip=agc. Repeatable."),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", help="An option of the variant's builder: key=value. Repeatable."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Input side in pixels; default: the variant's.")
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Weights to start from.")] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="Parameters kept as they are: 'blocks.0.*'. Repeatable."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Distil from this variant or timm model.")
    ] = None,
    teacher_weights: Annotated[
        Path | None, typer.Option(help="The teacher's weights; default: shipped, or timm's.")
    ] = None,
    distillation: Annotated[
        str | None, typer.Option(help="hard or soft; default: the recipe's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")
    ] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no, bf16 or fp16.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    workers: Annotated[int | None, typer.Option(help="Loader processes.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Where the data lie; default: REPLIVIT_DATA, the package.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The run's directory; default: training/... under REPLIVIT_HOME."
        ),
    ] = None,
    evaluate_every: Annotated[
        int, typer.Option(min=0, help="Log test top-1 every so many epochs; it chooses nothing.")
    ] = 0,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Longest time between checkpoints; one follows every epoch.")
    ] = 5.0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard too.")
    ] = False,
    ship: Annotated[
        bool,
        typer.Option(
            "--ship",
            help="Put the first seed's weights (float16) and all records into "
            "the paper's directory.",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Train a variant on a track, evaluate it on the test split and record the result.

    A run that was stopped, even by kill -9, goes on when the same command is given again; on a CPU
    it ends in the same bits. A finished run is only read back.

    \b
    Examples:
      replivit train vit_micro --track fashion_mini --seeds 0,1,2
      replivit train efficientformer_l1 --track imagenet --data /data/imagenet \\
          --teacher regnety_160 --mixed-precision bf16
      accelerate launch --num_processes 8 -m replivit train deit_ti --track imagenet
    """  # fmt: skip
    from harness.registry import get_variant
    from harness.training import Distillation, EvaluateEvery, TensorBoard
    from harness.training import train as run

    chosen = get_variant(variant)
    track = track or chosen.track
    named = {
        "extends": recipe, "epochs": epochs, "batch_size": batch_size, "lr": lr,
        "mixed_precision": mixed_precision, "workers": workers, "compile": compile or None,
        "distillation": distillation,
    }  # fmt: skip
    changes = {key: value for key, value in named.items() if value is not None}
    changes |= parse_options(settings)
    if teacher is None and teacher_weights is not None:
        raise ReplivitError("--teacher-weights needs --teacher, the name of its model")
    callbacks = [EvaluateEvery(evaluate_every)] if evaluate_every else []
    callbacks += [TensorBoard()] if tensorboard else []
    numbers = _seeds(seeds) if seeds is not None else [seed]
    runs = []
    for number in numbers:
        several = directory is not None and len(numbers) > 1
        method = chosen.hook("objective") or Distillation  # a method may distil in its own way
        distil = method(teacher, weights=teacher_weights) if teacher else None
        runs.append(
            run(
                chosen.name, track, changes, number,
                objective=distil, callbacks=callbacks,
                out=directory / f"seed{number}" if several else directory,
                init=init, freeze=freeze or (), device=device, root=data, image_size=image_size,
                options=parse_options(options, "--option"), checkpoint_minutes=checkpoint_minutes,
                quiet=quiet,
            )
        )  # fmt: skip
        _keep(runs[-1])
    if not runs[0].records:  # one of several processes, and not the main one
        return
    _show(chosen.name, track, numbers, runs)
    if ship:
        _ship(chosen.name, track, runs, data)


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ReplivitError(
            f"--seeds {text!r}: write whole numbers with commas, as 0,1,2"
        ) from None
    if len(set(numbers)) < len(numbers):
        raise ReplivitError(f"--seeds {text!r}: a seed stands twice")
    return numbers


def _keep(run: TrainedModel) -> None:
    """Append the run's records to the store, unless a run that was read back is there already."""
    store = RecordStore()
    known = {record.run_id for record in store}
    store.append(record for record in run.records if record.run_id not in known)


def _show(variant: str, track: str, numbers: list[int], runs: list[TrainedModel]) -> None:
    from harness.statistics import mean_std

    table = Table(box=None, header_style="bold", pad_edge=False, title=f"{variant} on {track}")
    for column in ("seed", "top-1 %", "95 %", "top-5 %", "images seen", "seconds", "run"):
        table.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    for number, run in zip(numbers, runs, strict=True):
        values = {record.metric: record for record in run.records}
        low, high = values["top1"].interval
        top5 = f"{values['top5'].value:.2f}" if "top5" in values else ""
        table.add_row(
            str(number), f"{values['top1'].value:.2f}", f"{low:.2f} to {high:.2f}", top5,
            f"{values['images_seen'].value:,}", f"{values['train_time'].value:.1f}",
            escape(str(run.directory)),
        )  # fmt: skip
    out.print(table)
    if len(runs) > 1:
        seeds = mean_std([run.value("top1") for run in runs])
        out.print(f"top-1 over {seeds.n} seeds: {seeds.mean:.2f} ± {seeds.std:.2f} %")


def _ship(variant: str, track: str, runs: list[TrainedModel], data: Path | None) -> None:
    from harness.registry import get_variant
    from harness.training.shipping import ship

    weights, records = ship(variant, track, runs, root=data)
    out.print(f"shipped {escape(str(weights))} ({weights.stat().st_size / 1e6:.2f} MB)")
    out.print(f"records {escape(str(records))}")
    chosen = get_variant(variant)
    if chosen.weights_file(track) != weights:
        where = f"{chosen.paper.directory / 'paper.yaml'}"
        err.print(
            f"to use them, add to {variant} in {where}: "
            f"weights: {{{track}: weights/{weights.name}}}",
            style="yellow", markup=False, soft_wrap=True,
        )  # fmt: skip
