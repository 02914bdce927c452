"""Progress of a sweep in the terminal, without taking processor time from what is measured.

Nothing is redrawn by a timer: the line changes when a cell starts or ends.
"""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from harness.record import Record
from harness.sweep import Step, Summary
from replivit.cli.console import err
from replivit.cli.units import value_text


def minutes(seconds: float) -> str:
    """Seconds in words: `40 s`, `3 min 20 s`."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest:02d} s" if whole else f"{rest} s"


class SweepProgress:
    """Give it to `harness.sweep.run_sweep` as `progress`, inside a `with`.

    On a terminal it is a bar with the cell under way and the time left; elsewhere one line per
    finished cell.
    """

    def __init__(self, console: Console = err) -> None:
        self.console = console
        self.bar = Progress(
            BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"),
            console=console, auto_refresh=False, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("starting", total=None)

    def __enter__(self) -> SweepProgress:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def __call__(self, step: Step) -> None:
        left = f"about {minutes(step.seconds_left)} left" if step.seconds_left >= 1 else ""
        text = escape(step.cell.label)
        self.bar.update(self.task, total=step.total, completed=step.done)
        if step.records is None:
            self.bar.update(self.task, description=f"{text}  [dim]{left}")
        else:
            self.bar.update(self.task, description=f"[dim]{text} done  {left}")
            self._say(step)
        self.bar.refresh()

    def _say(self, step: Step) -> None:
        bad = [record for record in step.records if not record.measured]
        if bad:
            self.console.print(f"[red]{escape(step.cell.label)}: {escape(bad[0].reason or '')}")
        elif not self.console.is_terminal:
            line = f"[{step.done}/{step.total}] {step.cell.label}: {headline(step.records)}"
            self.console.print(line, markup=False)


def headline(records: tuple[Record, ...]) -> str:
    """The values of a finished cell in a few words."""
    shown = ("params", "macs", "top1", "memory_inference", "memory_training", "latency",
             "latency_ratio")  # fmt: skip
    words = [value_text(record) for record in records if record.metric in shown]
    marks = {record.status for record in records} - {"ok"}
    return ", ".join(words) + "".join(f" ({mark})" for mark in sorted(marks))


def print_summary(summary: Summary, console: Console = err) -> None:
    """What a sweep did, and every failure in a sentence."""
    parts = [f"{summary.measured} cells measured in {minutes(summary.seconds)}"]
    if summary.skipped:
        parts.append(f"{summary.skipped} were already there")
    for status, count in sorted(summary.statuses.items()):
        if status != "ok":
            parts.append(f"{count} {status}")
    console.print(", ".join(parts))
    for sentence in summary.failures:
        console.print(f"[red]{escape(sentence)}")
