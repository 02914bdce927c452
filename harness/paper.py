"""Papers as plain facts: what `paper.yaml` may say, and how a mistake in it is reported.

A paper's file holds its citation, its variants (as lazy `module:object` references), its
experiments and every published number with the source it was read in. Nothing here imports
torch, so listing papers is instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.errors import ReplivitError

#: Units a published metric may carry. A metric that is not listed may use any unit; one that is
#: listed and carries another unit is an error, so that percent and fractions never mix.
UNITS: dict[str, frozenset[str]] = {
    "top1": frozenset({"%"}),
    "top5": frozenset({"%"}),
    "accuracy": frozenset({"%"}),
    "params_m": frozenset({"M"}),
    "macs_g": frozenset({"G"}),
    "latency_ms": frozenset({"ms"}),
    "throughput": frozenset({"img/s"}),
    "gpu_days": frozenset({"days"}),
    "top1_gain": frozenset({"points"}),
}

#: No published number is larger; what is not finite is not smaller either.
LARGEST = 1e100

#: libyaml's parser where PyYAML was built with it: ten times as fast.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

#: A lazy reference inside a paper's package: "model:efficientformer_l1".
REFERENCE = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"


class Fact(BaseModel):
    """Base of everything read from a file: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Published(Fact):
    """One number as somebody printed it."""

    variant: str = Field(description="the model as the source names it")
    of: str | None = Field(None, description="the variant here that the number speaks of")
    metric: str
    value: float | int | str | list[float]
    unit: str
    conditions: str = ""
    source: str
    seen: bool = Field(description="whether the source was read while preparing the file")
    against: str | None = Field(
        None, description="record metric to compare with, if not the metric's usual one"
    )
    tolerance: float | None = Field(
        None, ge=0, le=LARGEST, description="absolute, in `unit`; default by metric"
    )
    reason: str | None = Field(None, description="why a deviation or a missing value is expected")

    @field_validator("value")
    @classmethod
    def _finite(cls, value: float | int | str | list[float]) -> float | int | str | list[float]:
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str) or abs(one) <= LARGEST for one in numbers):
            raise ValueError("a published number must be finite")
        return value

    @model_validator(mode="after")
    def _unit_fits(self) -> Published:
        allowed = UNITS.get(self.metric)
        if allowed and self.unit not in allowed:
            raise ValueError(
                f"unit {self.unit!r} does not fit metric {self.metric!r}; "
                f"write {' or '.join(sorted(allowed))!r}"
            )
        return self


class InputSpec(Fact):
    """What a variant expects of an image; unset fields come from its track."""

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Literal["bicubic", "bilinear", "nearest"] | None = None
    crop_pct: float | None = Field(None, gt=0, le=1)


class VariantSpec(Fact):
    """One buildable model, as its paper's file declares it."""

    build: str = Field(
        pattern=REFERENCE, description="callable(num_classes, image_size, **args) -> nn.Module"
    )
    args: dict[str, Any] = Field(default_factory=dict, description="fixed keyword arguments")
    convert: str | None = Field(
        None, pattern=REFERENCE, description="callable(official state dict) -> our state dict"
    )
    checkpoint_key: str | None = Field(
        None, description="which weights of a checkpoint the authors load, if it holds several"
    )
    track: str = Field("imagenet", description="the protocol on which its top-1 counts")
    image_size: int = 224
    num_classes: int = 1000
    family: str = Field("transformer", description="cnn, transformer or hybrid; for filters")
    summary: str = ""
    input: InputSpec = InputSpec()
    paper_params: str | None = Field(
        None, pattern=REFERENCE, description="callable(module) -> int, the paper's convention"
    )
    paper_macs: str | None = Field(
        None, pattern=REFERENCE, description="callable(module, image_size) -> int, likewise"
    )
    dynamic: bool = Field(False, description="whether its cost depends on the image")
    weights: dict[str, str] = Field(
        default_factory=dict, description="track -> shipped safetensors file in the directory"
    )
    recipe: str | None = Field(None, description="name of the training recipe, if not the track's")
    objective: str | None = Field(
        None, pattern=REFERENCE, description="callable(teacher=None, weights=None) -> Objective: "
        "what the method optimises, if not the plain classification loss"
    )  # fmt: skip


class ExperimentSpec(Fact):
    """One table or figure that can be rerun."""

    run: str = Field(pattern=REFERENCE, description="callable(scale, **options)")
    title: str
    reproduces: str = Field("", description="table or figure of the paper")


class OfficialWeights(Fact):
    """Where the authors, or a mirror of theirs, keep a checkpoint."""

    variant: str
    url: str
    note: str = ""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")


class Code(Fact):
    """The authors' repository, as it was read."""

    url: str
    commit: str | None = None
    license: str | None = None


class PaperFile(Fact):
    """The whole of a `paper.yaml`."""

    key: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    title: str
    authors: list[str]
    venue: str
    year: int = Field(ge=2010, le=2100)
    arxiv: str | None = Field(None, pattern=r"^\d{4}\.\d{4,5}$")
    doi: str | None = None
    code: Code | None = None
    summary: str = Field(description="the idea in one or two sentences")
    claims: list[str] = Field(default_factory=list, description="what the paper says it achieves")
    conventions: dict[str, str] = Field(
        default_factory=dict, description="how the paper counts, in words, by column"
    )
    notes: list[str] = Field(default_factory=list, description="where paper and code differ")
    reference: bool = Field(False, description="rows for comparison, not a reproduction")
    variants: dict[str, VariantSpec]
    showcase: list[str] | None = Field(
        None, description="variants that the main job times, default all; it counts the others too"
    )
    experiments: dict[str, ExperimentSpec] = Field(default_factory=dict)
    official_weights: list[OfficialWeights] = Field(default_factory=list)
    published: list[Published] = Field(default_factory=list)

    @field_validator("published")
    @classmethod
    def _published_not_twice(cls, rows: list[Published]) -> list[Published]:
        seen = set()
        for row in rows:
            mark = (row.variant, row.metric, str(row.value), row.conditions, row.source)
            if mark in seen:
                raise ValueError(f"the published row {mark} stands twice")
            seen.add(mark)
        return rows

    @model_validator(mode="after")
    def _names_are_variants(self) -> PaperFile:
        for number, row in enumerate(self.published):
            if row.of is not None and row.of not in self.variants:
                raise ValueError(f"published.{number}.of: {row.of!r} is not a variant of this file")
        for name in self.showcase or ():
            if name not in self.variants:
                raise ValueError(f"showcase: {name!r} is not a variant of this file")
        return self


def _lines_by_path(text: str) -> dict[tuple, int]:
    """Map each key path of a YAML text to its line, so that an error can point there."""
    lines: dict[tuple, int] = {}

    def walk(node: yaml.Node, path: tuple) -> None:
        lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                walk(value, (*path, key.value))
                lines[(*path, key.value)] = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*path, index))

    root = yaml.compose(text, Loader=_Loader)
    if root is not None:
        walk(root, ())
    return lines


def _nearest_line(lines: dict[tuple, int], path: tuple) -> int:
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def load_yaml(path: Path, model: type[BaseModel]) -> Any:
    """Read `path` into `model`; every mistake is one sentence that names file, line and key.

    Raises:
        ReplivitError: the file is missing, is no YAML, or does not fit the model.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise ReplivitError(f"cannot read {path}: {reason}") from error
    except UnicodeDecodeError as error:
        raise ReplivitError(f"{path} is not UTF-8 text") from error
    try:
        data = yaml.load(text, Loader=_Loader)
        lines = _lines_by_path(text)
    except RecursionError as error:
        raise ReplivitError(f"{path}: not valid YAML (it refers to itself)") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise ReplivitError(f"{path}{where}: not valid YAML ({problem})") from error
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # an unknown key says more than the field that its misspelling left missing
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        key_path = tuple(first["loc"])
        key = ".".join(str(part) for part in key_path) or "the file"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "unknown key"
        line = _nearest_line(lines, key_path)
        raise ReplivitError(f"{path}, line {line}: {key}: {message}{more}") from error


def load_paper(path: Path) -> PaperFile:
    """Read one `paper.yaml` (errors as in `load_yaml`)."""
    return load_yaml(path, PaperFile)
