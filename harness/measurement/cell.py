"""A cell: one group of quantities of one variant under stated conditions; the unit of a sweep."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from harness.errors import ReplivitError
from harness.measurement.backends import DTYPES, parse_backend
from harness.measurement.sentinels import available_cpus
from harness.record import Conditions, Record
from harness.registry import Variant, get_variant

#: Group -> the metrics without which its cell is not complete. One process measures one group.
GROUPS: dict[str, tuple[str, ...]] = {
    "counts": ("params", "macs"),
    "accuracy": ("top1",),
    "memory_inference": ("memory_inference",),
    "memory_training": ("memory_training",),
    "latency": ("latency", "latency_ratio"),
    "compare": ("latency",),
}

#: What `measure(metrics=...)` and the command accept -> groups.
METRIC_GROUPS: dict[str, tuple[str, ...]] = {
    "params": ("counts",),
    "macs": ("counts",),
    "latency": ("latency",),
    "memory": ("memory_inference", "memory_training"),
    "memory_inference": ("memory_inference",),
    "memory_training": ("memory_training",),
    "accuracy": ("accuracy",),
}


@dataclass(frozen=True)
class Cell:
    """What to measure. `None` sizes are the variant's own; `effort` changes latency's defaults.

    Attributes:
        rival: the second variant of a `compare` cell.
        track: of an `accuracy` cell.
        limit_s: the process that measures the cell is ended after so many seconds.
    """

    variant: str
    group: str
    device: str = "cpu"
    backend: str = "eager"
    threads: int = 1
    batch_size: int = 1
    dtype: str = "float32"
    image_size: int | None = None
    num_classes: int | None = None
    track: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    rival: str | None = None
    profile: str = "quick"
    effort: dict[str, float] = field(default_factory=dict)
    limit_s: float = 900.0

    @property
    def label(self) -> str:
        """A few words for progress lines."""
        words = [self.variant if not self.rival else f"{self.variant} and {self.rival}"]
        words.append(self.group.replace("_", " "))
        if self.group == "latency" or self.backend != "eager":
            words.append(self.backend)
        if self.batch_size > 1 and self.group != "accuracy":
            words.append(f"batch {self.batch_size}")
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for another process."""
        return asdict(self)

    def variant_conditions(self, variant: Variant | None) -> Conditions:
        """The conditions that this cell's records carry, known before anything is built.

        Evaluation knows more about an accuracy record (data, weights) and writes its own.
        """
        sizes = {
            "image_size": self.image_size or (variant.spec.image_size if variant else None),
            "num_classes": self.num_classes or (variant.spec.num_classes if variant else None),
        }
        if self.group == "counts":  # a count does not know device, threads or backend
            return Conditions(batch_size=1, options=self.options, **sizes)
        return Conditions(
            device=self.device.partition(":")[0],
            backend=self.backend,
            threads=self.threads,
            batch_size=self.batch_size,
            dtype=self.dtype,
            options=self.options,
            **sizes,
        )

    def check(self) -> None:
        """Refuse what no machine, or not this one, can measure.

        Raises:
            ReplivitError: one sentence that names the wrong value.
        """
        if self.group not in GROUPS:
            raise ReplivitError(f"no group {self.group!r}; known: {', '.join(GROUPS)}")
        parse_backend(self.backend, self.device)
        if self.dtype not in DTYPES:
            raise ReplivitError(f"no dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.batch_size < 1:
            raise ReplivitError(f"batch size {self.batch_size} is not positive")
        cores = len(available_cpus())
        if not 1 <= self.threads <= cores:
            raise ReplivitError(f"{self.threads} threads do not fit this machine's {cores} cores")
        if self.device != "cpu":
            _check_cuda(self.device)


def _check_cuda(device: str) -> None:
    name, _, index = device.partition(":")
    if name != "cuda" or (index and not index.isdigit()):
        raise ReplivitError(f"no device {device!r}; known: cpu, cuda, cuda:<number>")
    import torch

    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise ReplivitError(f"device {device!r} asked for, but torch sees {count} CUDA devices")


def get_profile(name: str):
    """The latency effort behind a profile's name.

    Raises:
        ReplivitError: unknown name.
    """
    from harness.measurement.latency import PROFILES

    if name not in PROFILES:
        raise ReplivitError(f"no profile {name!r}; known: {', '.join(PROFILES)}")
    return PROFILES[name]


def groups_of(metrics: tuple[str, ...]) -> list[str]:
    """The groups that measure `metrics`, cheap ones first.

    Raises:
        ReplivitError: an unknown metric, or none.
    """
    for metric in metrics:
        if metric not in METRIC_GROUPS:
            raise ReplivitError(f"no metric {metric!r}; known: {', '.join(METRIC_GROUPS)}")
    if not metrics:
        raise ReplivitError(f"no metric asked for; known: {', '.join(METRIC_GROUPS)}")
    wanted = {group for metric in metrics for group in METRIC_GROUPS[metric]}
    return [group for group in GROUPS if group in wanted]


@cache
def shipped_sha256(variant: str, track: str) -> str | None:
    """SHA-256 of the weights that a variant ships for a track; None where there are none."""
    from harness.checkpoints import file_sha256

    path = get_variant(variant).weights_file(track)
    return file_sha256(path) if path is not None and path.is_file() else None


def is_measured(cell: Cell, record: Record, machine: str, weights_sha256: str | None) -> bool:
    """Whether `record` is one that `cell` would make on this machine.

    Args:
        weights_sha256: of the variant's shipped file, for accuracy cells.
    """
    if record.variant != cell.variant or record.environment.machine != machine:
        return False
    if record.metric not in GROUPS[cell.group]:
        return False
    if cell.group == "accuracy":
        found = record.conditions
        return (found.weights_sha256, found.track, found.device, found.dtype, found.options) == (
            weights_sha256, cell.track, cell.device.partition(":")[0], cell.dtype, cell.options,
        )  # fmt: skip
    return record.conditions == cell.variant_conditions(get_variant(cell.variant))
