"""What a run says: a progress line for people, CSV and JSON lines for programs."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from harness.training.state import write_whole


def write_history(directory: Path, history: list[dict[str, Any]]) -> None:
    """Write all epochs so far as `log.csv` and `log.jsonl` (a few hundred rows at most)."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(history)
    write_whole(directory / "log.csv", text.getvalue().encode())
    lines = "".join(json.dumps(row) + "\n" for row in history)
    write_whole(directory / "log.jsonl", lines.encode())


class Reporter:
    """Progress on standard error: a live bar on a terminal, a line per epoch elsewhere too."""

    def __init__(self, title: str, total: int, done: int, quiet: bool) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task(title, total=total, completed=done, state="")
        self._title = title

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def step(self, updates: int, images_per_second: float, loss: float | None) -> None:
        """Move the bar."""
        shown = "" if loss is None else f"loss {loss:.3f}, "
        state = f"{shown}{images_per_second:,.0f} images/s"
        self._progress.update(self._task, completed=updates, state=state)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Print the row of an epoch."""
        if self._quiet:
            return
        told = [f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}"]
        told += [f"{key} {row[key]:.2f} %" for key in ("top1", "top5") if key in row]
        told += [f"{row['images_per_second']:,.0f} images/s", f"{row['seconds']:.1f} s"]
        self.say(f"{self._title}: epoch {row['epoch'] + 1}/{epochs}, {', '.join(told)}")

    def say(self, text: str) -> None:
        """Print a line."""
        if not self._quiet:
            self._console.print(text, markup=False, soft_wrap=True)
