"""Settings of experiments: those of a scale, with single fields changed.

A setting is a frozen dataclass, a scale one instance of it, and every field an option:

    SCALES = {"tiny": Setting(epochs=1), "small": Setting(), "paper": Setting(track="imagenet")}
    setting = choose(SCALES, "small", {"epochs": 5, "seeds": "0,1"}, least={"epochs": 1})

Fields that are numbers are checked by their annotations, which therefore are read as text: a module
of settings starts with `from __future__ import annotations`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from harness.errors import ReplivitError

S = TypeVar("S")
#: Annotations of a number, and of several numbers or names.
ONE = re.compile(r"(int|float)( \| None)?")
SEVERAL = re.compile(r"(?:tuple|Sequence)\[(int|float|str)\b.*\]")


def of_scale(scales: Mapping[str, S], scale: str) -> S:
    """What a table holds for a scale.

    Raises:
        ReplivitError: there is no such scale.
    """
    if scale not in scales:
        raise ReplivitError(f"no scale {scale!r}; there are {', '.join(scales)}")
    return scales[scale]


def choose(
    scales: Mapping[str, S],
    scale: str,
    options: Mapping[str, Any],
    least: Mapping[str, float] | None = None,
) -> S:
    """The setting of a scale with some fields changed.

    A number may come as text (`1e-3`, which YAML takes for a word); several as one alone, a list,
    or a text like `0,1,2`; a setting inside of a setting as a mapping of what changes in it.

    Args:
        least: the least value of an option that makes sense.

    Raises:
        ReplivitError: an unknown scale or option, a value that cannot be, or no CUDA device where
            the setting says `cuda`.
    """
    base = of_scale(scales, scale)
    kinds = {one.name: str(one.type) for one in fields(base)}
    changes = {}
    for name, value in options.items():
        if name not in kinds:
            raise ReplivitError(f"no option {name!r}; there are {', '.join(kinds)}")
        inner = getattr(base, name)
        if is_dataclass(inner) and isinstance(value, Mapping):
            try:
                value = replace(inner, **value)
            except (TypeError, ValueError) as error:
                raise ReplivitError(f"option {name}: {error}") from error
        elif name == "seeds":
            value = as_seeds(value)
        else:
            value = as_annotated(name, value, kinds[name], (least or {}).get(name))
        changes[name] = value
    setting = replace(base, **changes)
    check_device(getattr(setting, "device", None))
    return setting


def as_annotated(name: str, given: Any, annotation: str, least: float | None = None) -> Any:
    """An option as its annotation has it: numbers also from texts, several from one or a text.

    Options that are neither numbers nor several of something stay as they are.

    Args:
        least: the least number that makes sense.

    Raises:
        ReplivitError: a value that cannot be.
    """
    if found := ONE.fullmatch(annotation):
        return given if given is None and found[2] else _number(name, given, found[1], least)
    if found := SEVERAL.fullmatch(annotation):
        return _several(name, given, found[1])
    return given


def as_seeds(given: int | str | Iterable[int]) -> tuple[int, ...]:
    """Seeds from a number, several of them, or a text like `0,1,2`.

    Raises:
        ReplivitError: none, one of them twice, or something that is no whole number.
    """
    wrong = f"seeds must be whole numbers that differ, not {given!r}"
    try:
        seeds = _several("seeds", given, "int")
    except ReplivitError as error:
        raise ReplivitError(wrong) from error
    if not seeds or len(set(seeds)) < len(seeds):
        raise ReplivitError(wrong)
    return seeds


def _several(name: str, given: Any, kind: str) -> tuple[Any, ...]:
    if isinstance(given, str):
        given = [one.strip() for one in given.split(",")]
    elif not isinstance(given, Iterable):
        given = (given,)
    return tuple(one if kind == "str" else _number(name, one, kind) for one in given)


def _number(name: str, given: Any, kind: str, least: float | None = None) -> int | float:
    """A number as it is, or from a text; `kind` is int or float.

    Raises:
        ReplivitError: it is none of this kind, or less than `least`.
    """
    value = given
    if isinstance(given, str):
        try:
            value = int(given) if kind == "int" else float(given)
        except ValueError:
            value = None
    allowed = int if kind == "int" else int | float
    good = isinstance(value, allowed) and not isinstance(value, bool)
    if not good or (least is not None and not value >= least):
        what = "a whole number" if kind == "int" else "a number"
        bound = "" if least is None else f" from {least} on"
        raise ReplivitError(f"option {name} must be {what}{bound}, not {given!r}")
    return value


def check_device(device: Any) -> None:
    """Refuse `cuda` on a machine without.

    Raises:
        ReplivitError: no CUDA device is available.
    """
    if isinstance(device, str) and device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise ReplivitError("no CUDA device is available; say device=cpu, or use scale small")
