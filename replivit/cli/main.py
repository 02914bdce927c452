"""The command `replivit`: commands are found by name, and errors end in one sentence."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from harness.errors import ReplivitError, one_line
from replivit.cli import commands
from replivit.cli.console import err


class _Stoppable(TyperGroup):
    """Says at Ctrl-C what is kept; typer alone would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("stopped; what was already measured is kept", style="yellow")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="replivit",
    cls=_Stoppable,
    help="Compact vision transformers, rebuilt, proven and measured on one bench.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        from importlib import metadata

        try:
            version = metadata.version("replivit")
        except metadata.PackageNotFoundError:
            version = "(not installed, run from its sources)"
        typer.echo(f"replivit {version}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command."""
    if debug:
        os.environ["REPLIVIT_DEBUG"] = "1"


def _add_commands() -> None:
    """Every module of `replivit.cli.commands` adds itself through `register(app)`."""
    for module in sorted(pkgutil.iter_modules(commands.__path__), key=lambda one: one.name):
        importlib.import_module(f"{commands.__name__}.{module.name}").register(app)


_add_commands()


def main() -> None:
    """Run the command; a user's error is one sentence and exit code 1."""
    try:
        app()
    except (ReplivitError, ValueError, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get("REPLIVIT_DEBUG"):
            raise
        name = "" if isinstance(error, ReplivitError) else f"{type(error).__name__}: "
        text = f"error: {name}{one_line(error)}"
        err.print(text, style="red", markup=False, soft_wrap=True)  # no path is cut in two
        sys.exit(1)
