"""Papers, variants and experiments: discovered lazily, listed, built.

A directory with a `paper.yaml` is a paper. Directories below the package `reproductions` and
below every package that the entry-point group `replivit.papers` names are searched. Listing reads
only YAML; a paper's Python is imported when one of its models or experiments is asked for. A
broken paper is listed with its error and hides nobody else.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import ReplivitError, one_line
from harness.paper import ExperimentSpec, PaperFile, VariantSpec, load_paper

if TYPE_CHECKING:
    from torch import nn

ENTRY_POINTS = "replivit.papers"
BUILT_IN = "reproductions"
#: A sentence about a wrong name lists the known ones up to this number.
MOST_LISTED = 40


@dataclass(frozen=True)
class Paper:
    """A discovered paper; `facts` is None and `broken` a sentence where its file is wrong."""

    key: str
    directory: Path
    package: str
    facts: PaperFile | None
    broken: str | None = None

    def resolve(self, reference: str) -> Any:
        """The object behind "module:name" in this paper's package.

        Raises:
            ReplivitError: the module cannot be imported or has no such name.
        """
        module_name, _, name = reference.partition(":")
        try:
            module = importlib.import_module(f"{self.package}.{module_name}")
        except Exception as error:  # a broken paper must never take the others down
            raise ReplivitError(
                f"paper {self.key}: cannot import {module_name}.py ({one_line(error)})"
            ) from error
        if not hasattr(module, name):
            raise ReplivitError(f"paper {self.key}: {module_name}.py has no {name!r}")
        return getattr(module, name)


@dataclass(frozen=True)
class Variant:
    """One buildable model."""

    name: str
    paper: Paper
    spec: VariantSpec

    @property
    def track(self) -> str:
        return self.spec.track

    @property
    def in_showcase(self) -> bool:
        """Whether the main job times it; a sweep that names it always does."""
        chosen = self.paper.facts.showcase
        return chosen is None or self.name in chosen

    def weights_file(self, track: str | None = None) -> Path | None:
        """The shipped weights for `track` (default: the variant's own), or None."""
        name = self.spec.weights.get(track or self.spec.track)
        return self.paper.directory / name if name else None

    def hook(self, name: str) -> Callable | None:
        """The callable behind one of the spec's optional references, or None."""
        reference = getattr(self.spec, name)
        return self.paper.resolve(reference) if reference else None


@dataclass(frozen=True)
class Experiment:
    """One table or figure that can be rerun, named `<paper>/<experiment>`."""

    name: str
    paper: Paper
    spec: ExperimentSpec


def _load(directory: Path, package: str) -> Paper:
    key = directory.name
    try:
        facts = load_paper(directory / "paper.yaml")
        if facts.key != key:
            raise ReplivitError(
                f"{directory / 'paper.yaml'}: key {facts.key!r} is not the directory's name"
            )
    except ReplivitError as error:
        return Paper(key, directory, package, None, one_line(error))
    return Paper(key, directory, package, facts)


def _papers_below(package: str) -> Iterable[Paper]:
    """Papers of a package: itself, or its sub-directories that hold a `paper.yaml`."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ReplivitError(f"{package!r} is not an importable package")
    for location in found.submodule_search_locations:
        root = Path(location)
        if (root / "paper.yaml").is_file():
            yield _load(root, package)
        for path in sorted(root.glob("*/paper.yaml")):
            yield _load(path.parent, f"{package}.{path.parent.name}")


@functools.cache
def _discover() -> dict[str, Paper]:
    sources = [(BUILT_IN, BUILT_IN)]
    sources += [(point.name, point.value) for point in metadata.entry_points(group=ENTRY_POINTS)]
    papers: dict[str, Paper] = {}
    for label, package in sources:
        try:
            found = list(_papers_below(package))
        except Exception as error:  # a foreign package may fail in any way
            if package == BUILT_IN:
                raise
            found = [Paper(label, Path(), package, None, f"entry point: {one_line(error)}")]
        for paper in found:
            paper = _without_clash(paper, papers)
            papers[paper.key] = paper
    return papers


def _without_clash(paper: Paper, papers: dict[str, Paper]) -> Paper:
    """The paper itself, or broken where an earlier one has its key or one of its variants."""
    if paper.key in papers:
        taken = papers[paper.key].package
        return Paper(
            f"{paper.key}@{paper.package}", paper.directory, paper.package, None,
            f"the key {paper.key!r} is already used by {taken}",
        )  # fmt: skip
    for name in paper.facts.variants if paper.facts else ():
        for other in papers.values():
            if other.facts and name in other.facts.variants:
                reason = f"its variant {name!r} is already declared by {other.key}"
                return Paper(paper.key, paper.directory, paper.package, None, reason)
    return paper


@functools.cache
def _variant_table() -> dict[str, Variant]:
    return {
        name: Variant(name, paper, spec)
        for paper in _discover().values()
        for name, spec in (paper.facts.variants if paper.facts else {}).items()
    }


def refresh() -> None:
    """Forget what was discovered: the next question reads the files again."""
    _discover.cache_clear()
    _variant_table.cache_clear()


def papers() -> list[Paper]:
    """All papers, broken ones included (see `Paper.broken`), by key."""
    return [paper for _, paper in sorted(_discover().items())]


def _missing(kind: str, name: str, known: Iterable[str]) -> ReplivitError:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        hint = f"did you mean {', '.join(close)}?"
    elif len(known) > MOST_LISTED:
        hint = f"`replivit list` names all {len(known)}"
    else:
        hint = f"known: {', '.join(known)}"
    return ReplivitError(f"no {kind} {name!r}; {hint}")


def get_paper(key: str) -> Paper:
    """The paper `key`.

    Raises:
        ReplivitError: unknown (with suggestions), or its file is broken.
    """
    found = _discover().get(key)
    if found is None:
        raise _missing("paper", key, _discover())
    if found.broken:
        raise ReplivitError(f"paper {key} is broken: {found.broken}")
    return found


def variants(paper: str | None = None, track: str | None = None) -> list[Variant]:
    """All variants, or those of one paper and/or one track, in the files' order."""
    if paper is not None:
        get_paper(paper)
    return [
        variant
        for variant in _variant_table().values()
        if (paper is None or variant.paper.key == paper)
        and (track is None or variant.track == track)
    ]


def get_variant(name: str) -> Variant:
    """The variant `name`; a typo raises `ReplivitError` with suggestions."""
    found = _variant_table().get(name.removeprefix("replivit_"))
    if found is None:
        broken = [paper.key for paper in papers() if paper.broken and name.startswith(paper.key)]
        if broken:
            get_paper(broken[0])
        raise _missing("variant", name, _variant_table())
    return found


def experiments(paper: str | None = None) -> list[Experiment]:
    """All experiments, or those of one paper."""
    chosen = [get_paper(paper)] if paper else papers()
    return [
        Experiment(f"{one.key}/{name}", one, spec)
        for one in chosen
        if one.facts
        for name, spec in one.facts.experiments.items()
    ]


def get_experiment(name: str) -> Experiment:
    """The experiment `<paper>/<name>`; a typo raises `ReplivitError` with suggestions."""
    table = {experiment.name: experiment for experiment in experiments()}
    if name not in table:
        raise _missing("experiment", name, table)
    return table[name]


def _check_arguments(variant: Variant, builder: Callable, arguments: dict[str, Any]) -> None:
    parameters = inspect.signature(builder).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return
    for name in arguments:
        if name not in parameters:
            allowed = ", ".join(p for p in parameters if p not in ("num_classes", "image_size"))
            raise ReplivitError(
                f"{variant.name} takes no option {name!r}; it takes: {allowed or 'none'}"
            )


def default_options(variant: Variant) -> dict[str, Any]:
    """What a variant is built with where nothing else is said: its paper's and its builder's."""
    builder = variant.paper.resolve(variant.spec.build)
    known = inspect.signature(builder).parameters.values()
    own = {one.name: one.default for one in known if one.default is not inspect.Parameter.empty}
    return {**own, **variant.spec.args}


def build(
    name: str,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a variant: `(B, 3, H, W) -> (B, num_classes)` in eval mode.

    Deterministic under `torch.manual_seed`. The module carries `pretrained_cfg` and
    `default_cfg` as timm's models do.

    Raises:
        ReplivitError: unknown name or option, an option of the wrong type, an image or a number
            of classes that is none.
        ValueError: the method cannot be built so (the message says what can).
    """
    from harness.linear import choose_linears

    variant = get_variant(name)
    builder = variant.paper.resolve(variant.spec.build)
    arguments = {**variant.spec.args, **overrides}
    _check_arguments(variant, builder, arguments)
    size = variant.spec.image_size if image_size is None else image_size
    classes = variant.spec.num_classes if num_classes is None else num_classes
    _check_sizes(size, classes)
    try:
        model = builder(num_classes=classes, image_size=size, **arguments)
    except TypeError as error:
        if not overrides:  # nobody's options are to blame
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in overrides.items())
        raise ReplivitError(
            f"{variant.name} cannot be built with {given} "
            f"({textwrap.shorten(one_line(error), 160, placeholder=' ...')})"
        ) from error
    choose_linears(model)
    model.pretrained_cfg = model.default_cfg = pretrained_cfg(variant, classes, size)
    return model


def _check_sizes(image_size: Any, num_classes: Any) -> None:
    sides = [image_size] * 2 if isinstance(image_size, int) else image_size
    pair = isinstance(sides, list | tuple) and len(sides) == 2
    if not pair or any(type(one) is not int or one < 1 for one in sides):
        raise ReplivitError(
            f"image_size must be a whole number of pixels, or (height, width), not {image_size!r}"
        )
    if type(num_classes) is not int or num_classes < 0:
        raise ReplivitError(f"num_classes must be a whole number from 0 on, not {num_classes!r}")


def pretrained_cfg(
    variant: Variant, num_classes: int, image_size: int | tuple[int, int]
) -> dict[str, Any]:
    """timm's description of a variant's input (mean, std, crop, ...) and weights."""
    from harness.data import input_spec

    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    spec = input_spec(variant)
    weights = variant.weights_file()
    return {
        "architecture": f"replivit_{variant.name}",
        "num_classes": num_classes,
        "input_size": (3, height, width),
        "fixed_input_size": True,
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "mean": spec.mean,
        "std": spec.std,
        "file": str(weights) if weights else None,
        "paper_name": variant.paper.facts.title,
    }
