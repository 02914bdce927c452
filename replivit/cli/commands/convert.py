"""`replivit convert`: the authors' checkpoint under our key names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from replivit.cli.commands.measure import parse_options
from replivit.cli.console import err, out


def register(app: typer.Typer) -> None:
    app.command("convert")(convert)


def convert(
    variant: Annotated[str, typer.Argument(help="The variant the checkpoint is of.")],
    official: Annotated[Path, typer.Argument(help="The authors' file: .pth, .pt, .safetensors.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The safetensors file to write.")],
    half: Annotated[bool, typer.Option(help="Store as float16, half the size.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value for the variant's builder; may be repeated."),
    ] = None,
) -> None:
    """Write the authors' weights as safetensors with our key names.

    Example: replivit convert efficientformer_l1 efficientformer_l1_1000d.pth l1.safetensors

    Every weight must find its place: anything missing, unexpected or of another shape is an
    error that names the first keys, and nothing is written. The result loads with
    `replivit evaluate --weights` and `harness.load_weights`.
    """
    from harness import checkpoints
    from harness.environment import capture
    from harness.errors import ReplivitError
    from harness.registry import get_variant

    if target.suffix != ".safetensors":
        raise ReplivitError(f"{target} must end in .safetensors")
    chosen = get_variant(variant)
    state = checkpoints.read_state_dict(official)
    model = checkpoints.load_official(chosen.name, official, **parse_options(set_))
    found = checkpoints.coverage(model, checkpoints.convert_official(chosen.name, state))
    sha256 = checkpoints.save_weights(
        model,
        target,
        half=half,
        metadata={
            "variant": chosen.name,
            "track": chosen.track,
            "num_classes": model.num_classes,
            "official_sha256": checkpoints.file_sha256(official),
            "commit": capture().commit,
        },
    )
    out.print(f"{chosen.name}: {len(state)} official keys; {found}", markup=False, soft_wrap=True)
    out.print(f"sha256 {sha256}", markup=False)
    err.print(f"written: {target}", markup=False, soft_wrap=True)
