"""Checkpoints: ours and the authors' weights into models, and how well they fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from harness import registry
from harness.errors import ReplivitError, one_line
from harness.meta import on_meta
from harness.state_dicts import (
    State,
    file_sha256,
    read_metadata,
    read_state_dict,
    save_weights,
    unwrap,
)

__all__ = [
    "Coverage", "convert_official", "coverage", "file_sha256", "load_model", "load_official",
    "load_pretrained", "load_weights", "read_metadata", "read_state_dict", "save_weights",
]  # fmt: skip

Source = Path | str | Mapping[str, Any]


@dataclass(frozen=True)
class Coverage:
    """How a state dict fits a module, key by key.

    Attributes:
        matched: keys of equal shape.
        missing: parameters and float buffers of the module that the file lacks.
        unexpected: keys of the file that the module lacks.
        mismatched: `(key, shape in the module, shape in the file)`.
        derived: integer and boolean buffers that the file lacks: counters and index tables, which
            the module has made itself.
        total: number of elements in the module's parameters and float buffers.
        covered: those of them that the file fills.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    derived: tuple[str, ...]
    total: int
    covered: int

    @property
    def complete(self) -> bool:
        """Nothing missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    @property
    def percent(self) -> float:
        """Share of the module's weights that the file fills, in %."""
        return 100 * self.covered / self.total if self.total else 100.0

    def problems(self, limit: int = 3) -> str:
        """What is wrong, with the first keys of each kind; empty if complete."""
        shapes = [f"{key} {list(theirs)} for {list(ours)}" for key, ours, theirs in self.mismatched]
        kinds = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", shapes),
        )
        return "; ".join(
            f"{len(keys)} {kind} ({', '.join(keys[:limit])}{', ...' if len(keys) > limit else ''})"
            for kind, keys in kinds
            if keys
        )

    def __str__(self) -> str:
        head = f"{len(self.matched)} keys matched, {self.percent:.1f} % of the weights"
        return head if self.complete else f"{head}; {self.problems()}"


def coverage(model: nn.Module, state: Mapping[str, Tensor]) -> Coverage:
    """Compare a state dict with a module; nothing is loaded."""
    ours = model.state_dict()
    common = [key for key in ours if key in state]
    absent = [key for key in ours if key not in state]
    matched = [key for key in common if ours[key].shape == state[key].shape]
    sizes = {key: value.numel() for key, value in ours.items() if value.is_floating_point()}
    return Coverage(
        matched=tuple(matched),
        missing=tuple(key for key in absent if key in sizes),
        unexpected=tuple(key for key in state if key not in ours),
        mismatched=tuple(
            (key, tuple(ours[key].shape), tuple(state[key].shape))
            for key in common
            if ours[key].shape != state[key].shape
        ),
        derived=tuple(key for key in absent if key not in sizes),
        total=sum(sizes.values()),
        covered=sum(sizes.get(key, 0) for key in matched),
    )


def _fill(model: nn.Module, state: Mapping[str, Tensor], found: Coverage) -> nn.Module:
    """Copy what matched, in the module's own precision; the model in eval mode."""
    model.load_state_dict({key: state[key] for key in found.matched}, strict=False)
    return model.eval()


def _read(given: Source, variant: registry.Variant | None = None) -> tuple[State, str]:
    """A state dict and its name for messages; of the authors' wrappers the one of `variant`."""
    prefer = variant.spec.checkpoint_key if variant else None
    if isinstance(given, Mapping):
        return unwrap(given, "the state dict", prefer), "the state dict"
    return read_state_dict(given, prefer), str(given)


def load_weights(model: nn.Module, path: Source, strict: bool = True) -> Coverage:
    """Load weights with our key names into `model`, in the model's precision.

    Args:
        path: a file, or a state dict.
        strict: whether anything missing, unexpected or of another shape is an error; otherwise
            what matches is loaded, and the result tells the rest.

    Raises:
        ReplivitError: the file cannot be read; or it does not fit, and `strict`.
    """
    state, origin = _read(path)
    found = coverage(model, state)
    if strict and not found.complete:
        raise ReplivitError(f"{origin} does not fit {_name(model)}: {found.problems()}")
    training = model.training
    _fill(model, state, found).train(training)
    return found


def _name(model: nn.Module) -> str:
    cfg = getattr(model, "pretrained_cfg", None)
    named = cfg.get("architecture") if isinstance(cfg, Mapping) else None
    return named.removeprefix("replivit_") if named else type(model).__name__


def convert_official(name: str, path_or_state_dict: Source) -> State:
    """The authors' weights under our key names, as a new dict.

    Raises:
        ReplivitError: the file cannot be read, or the paper's converter does not know its keys.
    """
    variant = registry.get_variant(name)
    state, origin = _read(path_or_state_dict, variant)
    converter: Callable[[State], State] | None = variant.hook("convert")
    if converter is None:
        return state
    try:
        return converter(state)
    except ReplivitError:
        raise
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ReplivitError(
            f"{origin} is no official checkpoint of {variant.name} ({one_line(error)})"
        ) from error


def load_official(name: str, path_or_state_dict: Source, **overrides: Any) -> nn.Module:
    """Build a variant with the authors' weights, in eval mode; every weight must find its place.

    Args:
        overrides: options of the builder; `num_classes` is taken from the file unless given.

    Raises:
        ReplivitError: the file cannot be read or does not fit; if it fits a sibling, which one.
    """
    official, origin = _read(path_or_state_dict, registry.get_variant(name))
    state = convert_official(name, official)
    model, found = _build_for(name, state, overrides)
    if not found.complete:
        sibling = _fitting_sibling(registry.get_variant(name), official)
        hint = f"; it fits {sibling}" if sibling else ""
        raise ReplivitError(f"{origin} does not fit {name}: {found.problems()}{hint}")
    return _fill(model, state, found)


def _build_for(name: str, state: State, options: Mapping[str, Any]) -> tuple[nn.Module, Coverage]:
    """Build a variant; with the file's number of classes, unless `options` gives one."""
    model = registry.build(name, **options)
    found = coverage(model, state)
    classes = _classes_of_file(model, found)
    if classes is not None and options.get("num_classes") is None:
        model = registry.build(name, **{**options, "num_classes": classes})
        found = coverage(model, state)
    return model, found


def _classes_of_file(model: nn.Module, found: Coverage) -> int | None:
    """The file's number of classes, if the classifier's size is all that differs."""
    changes = {
        (ours[0], theirs[0]) if ours and theirs and ours[1:] == theirs[1:] else None
        for _, ours, theirs in found.mismatched
    }
    if len(changes) != 1 or None in changes:
        return None
    before, after = changes.pop()
    return after if before == getattr(model, "num_classes", None) else None


def _fitting_sibling(variant: registry.Variant, official: State) -> str | None:
    """Another variant of the paper that the weights fit entirely; compared without memory."""
    for other in registry.variants(paper=variant.paper.key):
        if other.name == variant.name:
            continue
        try:
            state = convert_official(other.name, official)
            with on_meta():
                _, found = _build_for(other.name, state, {})
            if found.complete:
                return other.name
        except Exception:  # a hint may fail in any way; the error it explains may not be lost
            continue
    return None


def load_pretrained(
    name: str,
    track: str | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a variant with the weights that are shipped with it, in eval mode.

    Args:
        track: whose weights; the variant's own track unless given.
        num_classes: where it differs from the weights', the classifier is made anew (untrained).

    Raises:
        ReplivitError: no weights are shipped for that track, or they do not fit.
    """
    variant = registry.get_variant(name)
    path = variant.weights_file(track)
    if path is None:
        shipped = ", ".join(variant.spec.weights) or "none"
        raise ReplivitError(
            f"{variant.name} ships no weights for {track or variant.track} (shipped: {shipped}); "
            "give a file, or train it"
        )
    model = load_model(name, path, image_size=image_size, **overrides)
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    return model.eval()


def load_model(
    name: str,
    path: Source,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a variant with weights from a file of ours or of the authors, in eval mode.

    Raises:
        ReplivitError: the file cannot be read or does not fit.
    """
    state, origin = _read(path)
    options = {"num_classes": num_classes, "image_size": image_size, **overrides}
    model, found = _build_for(name, state, options)
    if found.complete:
        return _fill(model, state, found)
    ours = not isinstance(path, Mapping) and "variant" in read_metadata(path)
    if registry.get_variant(name).spec.convert and not ours:
        return load_official(name, path, **options)
    raise ReplivitError(f"{origin} does not fit {name}: {found.problems()}")
