"""`replivit data`: what data are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from replivit.cli.console import err, out


def register(app: typer.Typer) -> None:
    app.command("data")(data)


def data(
    track: Annotated[
        str | None,
        typer.Argument(help="A track, a folder, a parquet file or a hub name; default all tracks."),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option("--data", help="Folder that holds the track; default REPLIVIT_DATA."),
    ] = None,
    fingerprint: Annotated[
        bool,
        typer.Option(help="Fingerprint photographs too, which reads every image (minutes)."),
    ] = False,
    sheet: Annotated[
        Path | None,
        typer.Option("--contact-sheet", help="Draw test images of each class into this PNG."),
    ] = None,
) -> None:
    """Say which tracks are here, where they were looked for, and what is in one of them.

    Examples:

      replivit data

      replivit data fashion_mini --contact-sheet sheet.png

    Only naming a track that is nowhere on this machine downloads it, if it has a hub name. The
    fingerprint is a SHA-256 over class names, labels and every image; it stands in each accuracy
    record.
    """
    from harness.data import TRACKS
    from harness.errors import ReplivitError

    if track is None:
        if sheet:
            raise ReplivitError("name the track whose contact sheet is wanted")
        out.print(_overview(root))
        return
    if track in TRACKS:
        _about_track(track, root)
    _about_splits(track, root, fingerprint, sheet)


def _overview(root: str | None) -> Table:
    from harness.data import TRACKS, get_track, locate, places

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("track", "images", "classes", "where"):
        table.add_column(column, overflow="fold")
    for name in TRACKS:
        one = get_track(name)
        images = " + ".join(f"{count:,} {split}" for split, count in one.images.items())
        place = locate(name, root)
        if place:
            where = f"[green]here[/green]: {escape(str(place.folder))} ({place.origin})"
        else:
            looked = ", ".join(str(one.folder) for one in places(name, root))
            where = "[yellow]not here[/yellow]"
            where += f"; looked in {escape(looked)}" if looked else "; REPLIVIT_DATA is not set"
            where += f"; would be fetched from hub:{one.hub}" if one.hub else ""
        table.add_row(name, images, str(one.num_classes), where)
    return table


def _about_track(track: str, root: str | None) -> None:
    from harness.data import get_track, places

    one = get_track(track)
    out.print(f"[bold]{escape(one.title)}[/bold]: {one.num_classes} classes, {one.image_size} px")
    for place in places(track, root):
        state = "exists" if place.folder.is_dir() else "not there"
        out.print(
            f"looked in {place.folder} ({place.origin}): {state}", markup=False, soft_wrap=True
        )
    settings = ", ".join(f"{key} {value}" for key, value in one.protocol.items())
    out.print(f"protocol: {settings}", markup=False, soft_wrap=True)


def _about_splits(track: str, root: str | None, fingerprint: bool, sheet: Path | None) -> None:
    """What each split holds; one that cannot be used says why, and it is an error if none can."""
    import numpy as np

    from harness.data import TRACKS, contact_sheet, get_track, load_split
    from harness.errors import ReplivitError, one_line

    splits = get_track(track).images if track in TRACKS else ("train", "test")
    found, missing = {}, {}
    for split in splits:
        try:
            found[split] = load_split(track, split, root)
        except ReplivitError as error:
            missing[split] = one_line(error)
            continue
        counts = np.bincount(found[split].labels, minlength=len(found[split].classes))
        spread = f"{counts.min():,}" + (f" to {counts.max():,}" if np.ptp(counts) else "")
        out.print(f"{found[split]!r}, {spread} per class", markup=False, soft_wrap=True)
        out.print(f"  from {found[split].place}", markup=False, soft_wrap=True)
        if fingerprint or (found[split].track and found[split].track.canvas):
            out.print(f"  fingerprint {found[split].fingerprint}", markup=False, soft_wrap=True)
    if not found:
        raise ReplivitError(next(iter(missing.values())))
    for split, problem in missing.items():
        err.print(f"{split}: {problem}", style="yellow", markup=False, soft_wrap=True)
    last = list(found.values())[-1]
    out.print(f"classes: {', '.join(last.classes[:20])}"
              f"{', ...' if len(last.classes) > 20 else ''}", markup=False)  # fmt: skip
    if sheet:
        try:
            contact_sheet(last).savefig(sheet, dpi=120, format="png", bbox_inches="tight")
        except OSError as error:
            raise ReplivitError(f"cannot write {sheet}: {error.strerror}") from error
        err.print(f"written: {sheet}", markup=False, soft_wrap=True)
