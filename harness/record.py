"""Records: immutable facts with provenance, appended to JSON-lines files.

A line is written whole or not at all: one `write` of one line to a file opened for appending,
under a lock, with a newline first where a crash left a torn line. Reading reports such a line
and skips it. Two writers lose nothing.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import uuid
import warnings
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from harness.environment import Environment, capture, home
from harness.errors import ReplivitError

if TYPE_CHECKING:
    import numpy as np

SCHEMA_VERSION = 1
#: A number beyond it is nobody's measurement, and pages could not scale it.
LARGEST = 1e100

#: Every metric a record may carry, with its one unit.
METRICS: dict[str, str] = {
    "params": "count",
    "params_trainable": "count",
    "params_paper": "count",
    "macs": "count",  # torch's FlopCounterMode / 2: convolution + matrix products
    "macs_fvcore": "count",  # fvcore with our handlers
    "macs_paper": "count",  # the paper's own rule
    "latency": "s",  # seconds per batch
    "latency_ratio": "x yardstick",
    "first_call": "s",
    "memory_inference": "bytes",
    "memory_training": "bytes",
    "top1": "%",
    "top5": "%",
    "train_time": "s",
    "images_seen": "count",
    "experiment": "table",
}

Status = Literal["ok", "noisy", "contended", "failed", "timeout", "out_of_memory"]


class Conditions(BaseModel):
    """What must be equal for two records to speak of the same quantity."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = "cpu"
    backend: str = Field("eager", description="eager, compile, deploy, cuda_graph, ...")
    threads: int | None = None
    batch_size: int | None = None
    dtype: str = "float32"
    image_size: int | None = None
    num_classes: int | None = None
    track: str | None = None
    data_fingerprint: str | None = None
    weights_sha256: str | None = None
    preprocessing_sha256: str | None = None
    seed: int | None = None
    options: dict[str, Any] = Field(default_factory=dict, description="overrides of the builder")

    def key(self) -> str:
        """A stable text of all conditions, for comparing and grouping."""
        return json.dumps(self.model_dump(exclude_none=True), sort_keys=True)


class Record(BaseModel):
    """One measured quantity of one variant under stated conditions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    variant: str
    paper: str | None = None
    metric: str
    value: float | int | None = Field(description="None only where status says why")
    unit: str
    interval: tuple[float, float] | None = Field(None, description="95 %")
    n: int | None = Field(None, description="independent units behind the value")
    method: str = Field("", description="how value and interval were made, in a few words")
    status: Status = "ok"
    reason: str | None = None
    conditions: Conditions
    environment: Environment
    started: AwareDatetime
    duration_s: float = Field(ge=0, le=LARGEST)
    detail: dict[str, Any] = Field(default_factory=dict, description="raw samples, tables, ...")

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, metric: str) -> str:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}")
        return metric

    @field_validator("unit")
    @classmethod
    def _unit_of_metric(cls, unit: str, info: Any) -> str:
        wanted = METRICS.get(info.data.get("metric", ""), unit)
        if unit != wanted:
            raise ValueError(f"unit {unit!r} is wrong for this metric; it is {wanted!r}")
        return unit

    @field_validator("value")
    @classmethod
    def _finite(cls, value: float | int | None) -> float | int | None:
        if value is not None and not _is_finite(value):
            raise ValueError("a value must be finite; use status and reason instead")
        return value

    @field_validator("interval")
    @classmethod
    def _interval_in_order(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and not (all(map(_is_finite, ends)) and ends[0] <= ends[1]):
            raise ValueError("an interval must have two finite ends, the lower one first")
        return ends

    @property
    def measured(self) -> bool:
        """Whether there is a number to show (also when it is marked noisy or contended)."""
        return self.value is not None


def _is_finite(value: float | int) -> bool:
    return abs(value) <= LARGEST  # false for what is not a number, and of any size for whole ones


def new_run_id() -> str:
    """A short random name that groups the records of one command."""
    return uuid.uuid4().hex[:12]


def make_record(
    variant: str,
    metric: str,
    value: float | int | None,
    conditions: Conditions,
    *,
    run_id: str,
    started: datetime | None = None,
    duration_s: float = 0.0,
    **fields: Any,
) -> Record:
    """A `Record` with unit, environment and start filled in."""
    return Record(
        run_id=run_id,
        variant=variant,
        metric=metric,
        value=value,
        unit=METRICS.get(metric, ""),
        conditions=conditions,
        environment=capture(),
        started=started or datetime.now(timezone.utc),
        duration_s=duration_s,
        **fields,
    )


def bits_of(record: Record) -> np.ndarray:
    """The right/wrong bits `(N,)` bool of an accuracy record, in the order of its images.

    Raises:
        ReplivitError: the record keeps none, or others than it says.
    """
    import numpy as np

    text, count = record.detail.get("bits"), record.detail.get("n")
    about = f"the {record.metric} record of {record.variant}"
    if not isinstance(text, str) or type(count) is not int:
        raise ReplivitError(f"{about} keeps no bits")
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except ValueError as error:
        raise ReplivitError(f"{about} keeps no bits that can be read") from error
    if not 0 <= 8 * len(packed) - count < 8:
        raise ReplivitError(f"{about} keeps bits of another number of images than {count}")
    return np.unpackbits(packed, count=count).astype(bool)


def records_schema() -> dict[str, Any]:
    """JSON Schema of a record line, for programs in other languages."""
    return Record.model_json_schema()


class RecordStore:
    """The records of one folder: `<folder>/*.jsonl`, appended to `<folder>/records.jsonl`."""

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = Path(folder) if folder is not None else home() / "records"
        self.file = self.folder / "records.jsonl"

    def append(self, records: Iterable[Record]) -> None:
        """Write records, each line whole or not at all.

        Raises:
            ReplivitError: the folder cannot be written (full disk, no permission, ...).
        """
        lines = [record.model_dump_json(exclude_defaults=False) + "\n" for record in records]
        if not lines:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.file, "ab+", buffering=0) as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                for line in lines:
                    self._append_line(stream, line.encode())
                os.fsync(stream.fileno())
        except OSError as error:
            raise ReplivitError(f"cannot write {self.file}: {error.strerror}") from error

    @staticmethod
    def _append_line(stream: Any, line: bytes) -> None:
        """One line at the end of a locked file; on a short write the file is cut back."""
        end = stream.seek(0, os.SEEK_END)
        if end:
            stream.seek(end - 1)
            if stream.read(1) != b"\n":
                line = b"\n" + line
        try:
            written = stream.write(line)
            if written != len(line):
                raise OSError(28, "No space left on device")
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                stream.truncate(end)
            raise

    def __iter__(self) -> Iterator[Record]:
        for path in sorted(self.folder.glob("*.jsonl")):
            yield from read_records(path)

    def load(self) -> list[Record]:
        """All records of the folder, oldest file first; torn lines are reported and skipped."""
        return list(self)


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file. A line that cannot be read gives a warning and is skipped.

    Raises:
        ReplivitError: the file cannot be opened.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ReplivitError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield Record.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            kind = "is torn or no JSON" if first["type"] == "json_invalid" else first["msg"]
            where = ".".join(str(part) for part in first["loc"])
            detail = f"{where}: {kind}" if where else kind
            warnings.warn(f"{path}, line {number}: {detail}; skipped", stacklevel=2)
