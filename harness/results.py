"""Results that travel with a paper: an experiment's record and its figures, beside the lesson.

`replivit run PAPER/EXPERIMENT --ship` writes `results/<experiment>.records.jsonl` and its figures
into the paper's directory, so that the paper's page shows them on a machine that never ran it. A
newer run on that machine takes their place there.
"""

from __future__ import annotations

import re
from pathlib import Path

from harness.environment import home
from harness.errors import ReplivitError
from harness.record import Record, read_records
from harness.registry import get_experiment
from harness.training.state import write_whole

FOLDER = "results"
LIMIT = 1_500_000  # bytes of record and figures together: a checkout must stay small


def ship_result(record: Record) -> list[Path]:
    """Copy an experiment's record and its SVG figures into the paper's directory.

    Args:
        record: of an experiment that ran on this machine, its figures still below `home()`.

    Returns:
        The files: `results/<experiment>.records.jsonl`, then one per figure. Where that is of
        another track, theirs are named `<experiment>_<track>`.

    Raises:
        ReplivitError: not an experiment's record, one whose code was not committed, a figure that
            is gone, or more than 1.5 MB. Nothing is replaced then.
    """
    if record.metric != "experiment":
        raise ReplivitError(f"{record.variant} is no experiment: only those ship as results")
    if record.environment.dirty or record.environment.commit is None:
        raise ReplivitError(
            f"{record.variant} ran from a working tree with changes: commit, then run it again"
        )
    paper = get_experiment(record.variant).paper
    name = record.variant.partition("/")[2]
    own, track = paper.directory / FOLDER / f"{name}.records.jsonl", record.conditions.track
    if own.is_file() and any(one.conditions.track != track for one in read_records(own)):
        name += "_" + re.sub(r"\W+", "_", str(track))  # beside the one of another track
    pictures = [home() / path for path in record.detail["figures"] if path.endswith(".svg")]
    contents = {f"{FOLDER}/{name}-{path.name}": _read(path) for path in pictures}
    detail = {**record.detail, "figures": list(contents), "shipped": True}
    line = record.model_copy(update={"detail": detail}).model_dump_json() + "\n"
    contents = {f"{FOLDER}/{name}.records.jsonl": line.encode(), **contents}
    size = sum(map(len, contents.values()))
    if size > LIMIT:
        raise ReplivitError(
            f"{record.variant}: record and figures take {size / 1e6:.1f} MB; at most "
            f"{LIMIT / 1e6:g} MB ship"
        )
    for path, content in contents.items():
        write_whole(paper.directory / path, content)
    return [paper.directory / path for path in contents]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReplivitError(f"cannot read the figure {path}: {error.strerror}") from error
