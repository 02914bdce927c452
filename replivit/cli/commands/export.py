"""`replivit export`: a variant as one file for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from replivit.cli.commands.measure import parse_options
from replivit.cli.console import err, out


def register(app: typer.Typer) -> None:
    app.command("export")(export)


def export(
    variant: Annotated[str, typer.Argument(help="The variant, as `replivit list` names it.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="OUT.pt2 or OUT.onnx.")],
    weights: Annotated[
        Path | None,
        typer.Option(help="File of weights, ours or the authors'; default: the shipped ones."),
    ] = None,
    deploy: Annotated[
        bool, typer.Option(help="Fold the model into its deployment form first.")
    ] = False,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of a side; default the variant's own.", min=1)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value for the variant's builder; may be repeated."),
    ] = None,
) -> None:
    """Write a variant as a torch.export program (.pt2) or as ONNX (.onnx).

    Example: replivit export efficientformer_l1 l1.onnx --weights l1.safetensors --deploy

    The file takes float32 images (B, 3, H, W), normalised as `replivit info` says, with any batch
    size. It is read back and compared with the model before it gets its name; ONNX is
    compared where onnxruntime is installed. ONNX needs the extra `export`.
    """
    from harness import checkpoints, registry
    from harness.deployment import deploy as fold
    from harness.export import check_target
    from harness.export import export as write

    check_target(target)
    chosen = registry.get_variant(variant)
    options = {"image_size": image_size, **parse_options(set_)}
    source = weights or chosen.weights_file()
    if source is None:
        err.print(f"{chosen.name} ships no weights: the file gets random ones", style="yellow")
        model = registry.build(chosen.name, **options)
    else:
        model = checkpoints.load_model(chosen.name, source, **options)
    if deploy:
        model = fold(model)
        err.print(str(model.deploy_report), markup=False)
    done = write(model, target, model.pretrained_cfg["input_size"][1:])
    checked = (
        "not compared (onnxruntime is not installed)"
        if done.relative_error is None
        else f"equal to the model (relative error {done.relative_error:.1e})"
    )
    out.print(f"{done.path}: {done.size / 2**20:.1f} MiB, {checked}", markup=False)
