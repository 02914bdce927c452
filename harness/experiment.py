"""Experiments: one table or figure of a paper, rerun here, with its findings in words."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.environment import home
from harness.errors import ReplivitError
from harness.record import Conditions, Record, RecordStore, make_record, new_run_id
from harness.registry import get_experiment
from harness.settings import ONE, as_annotated, check_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Outcome = Literal["reproduced", "deviates", "not measured"]


@dataclass(frozen=True)
class Finding:
    """One claim of the paper, and what was seen here."""

    claim: str
    outcome: Outcome
    evidence: str


@dataclass
class ExperimentResult:
    """What an experiment returns.

    Attributes:
        rows: the measured table; every row has the same keys, in column order.
        findings: claims with outcome and evidence.
        published: the paper's rows of the same table (plain dicts; empty if it has none).
        figures: name -> matplotlib figure; `harness.run` saves them as SVG and PNG.
        notes: what a reader must know (sizes, what differs from the paper).
        conditions: device, threads, track, seeds ... of the whole table.
        detail: plain values that are recorded but not shown (a search's trace).
    """

    rows: list[dict[str, Any]]
    findings: list[Finding] = field(default_factory=list)
    published: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)
    notes: str = ""
    conditions: Conditions = field(default_factory=Conditions)
    detail: dict[str, Any] = field(default_factory=dict)
    # filled in by `harness.run`
    name: str = ""
    title: str = ""
    scale: str = ""
    record: Record | None = None
    figure_files: list[Path] = field(default_factory=list)


def save_figures(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as SVG (text kept as text) and PNG; returns the files' paths."""
    import matplotlib

    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            for suffix in ("svg", "png"):
                path = folder / f"{name}.{suffix}"
                with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "replivit"}):
                    metadata = {"Date": None} if suffix == "svg" else None
                    figure.savefig(path, dpi=160, bbox_inches="tight", metadata=metadata)
                files.append(path)
    except OSError as error:
        raise ReplivitError(f"cannot write figures to {folder}: {error.strerror}") from error
    return files


def run(
    name: str, scale: str = "small", store: RecordStore | None = None, **options: Any
) -> ExperimentResult:
    """Rerun the experiment `<paper>/<name>` and record its table.

    The experiment's function is called as `function(scale=scale, **options)`.

    Raises:
        ReplivitError: unknown experiment, scale or option, or a value that cannot be; figures or
            record cannot be written (a record without its figures is kept).
    """
    experiment = get_experiment(name)
    function: Callable[..., ExperimentResult] = experiment.paper.resolve(experiment.spec.run)
    arguments = _arguments(name, function, options)
    started, tick = datetime.now(timezone.utc), time.perf_counter()
    result = function(scale=scale, **arguments)
    result.name, result.title, result.scale = name, experiment.spec.title, scale
    undrawn: Exception | None = None
    try:
        result.figure_files = save_figures(result.figures, home() / "experiments" / name)
    except Exception as error:  # what was measured is kept first
        undrawn = error
    result.record = make_record(
        name,
        "experiment",
        len(result.rows),
        result.conditions,
        run_id=new_run_id(),
        paper=experiment.paper.key,
        started=started,
        duration_s=time.perf_counter() - tick,
        detail={
            **result.detail,
            "scale": scale,
            "options": {key: str(value) for key, value in options.items()},
            "rows": result.rows,
            "published": result.published,
            "findings": [vars(finding) for finding in result.findings],
            "notes": result.notes,
            "figures": [path.relative_to(home()).as_posix() for path in result.figure_files],
        },
    )
    (store or RecordStore()).append([result.record])
    if undrawn is not None:
        raise undrawn
    return result


def _arguments(name: str, function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the form in which the experiment takes them, checked before it runs.

    Raises:
        ReplivitError: one that it does not have, a value that cannot be, or no CUDA device.
    """
    known = inspect.signature(function).parameters
    open_ended = any(one.kind is one.VAR_KEYWORD for one in known.values())
    found = dict(options)
    for option, value in options.items():
        if option not in known and open_ended:
            continue  # it checks those itself
        if option not in known:
            takes = ", ".join(one for one in known if one != "scale") or "none"
            raise ReplivitError(f"{name} takes no option {option!r}; it takes: {takes}")
        annotation = str(known[option].annotation)
        if value is not None:
            annotation = annotation.removesuffix(" | None")
        if not open_ended or ONE.fullmatch(annotation):  # names it takes may hold commas
            found[option] = as_annotated(option, value, annotation)
    check_device(found.get("device"))
    return found
