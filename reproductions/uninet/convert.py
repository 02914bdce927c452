"""Checkpoints of the authors in our names.

The authors number the layers of `nn.Sequential`s; here they have names. Squeeze-and-excite layers
are 1x1 convolutions there and linear layers here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from harness.errors import ReplivitError

_SEPARABLE = ("depthwise", "norm", "pointwise")
#: (pattern, replacement) from the authors' names to ours; every rule is applied, in this order.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\bresidual\.[01]\.", "residual.conv."),
        *((rf"\bdownsample\.{i}\.", f"local.{name}.") for i, name in enumerate(_SEPARABLE)),
        *((rf"\bq\.{i}\.", f"query.{name}.") for i, name in enumerate(_SEPARABLE)),
        (r"\bb1\.", "expand."),
        (r"\bb2\.0\.", "depthwise."),
        (r"\bb2\.1\.", "depthwise_norm."),
        (r"\bb2\.3\.fc", "se.fc"),
        (r"\bb2\.4\.(?=weight|bias)", "project."),
        (r"\bb2\.5\.", "project_norm."),
        (r"\battn\.", "mixer."),
    )
]


def our_name(key: str) -> str:
    """The name here of an entry that the authors call `key`."""
    for pattern, replacement in _RULES:
        key = pattern.sub(replacement, key)
    return key


def rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries of a network, or of one of its modules, under our names and in our shapes.

    A convolution block without squeeze-and-excite numbers its last two layers one lower.
    """
    without = {found[1] for key in state_dict if (found := re.match(r"(.*\bb2\.)3\.weight$", key))}

    def as_with(key: str) -> str:
        found = re.fullmatch(r"(.*\bb2\.)([34])\.(\w+)", key)
        known = found is not None and found[1] in without
        return f"{found[1]}{int(found[2]) + 1}.{found[3]}" if known else key

    return {
        our_name(as_with(key)): (
            value.flatten(1) if re.search(r"\.3\.fc[12]\.weight$", key) else value
        )
        for key, value in state_dict.items()
    }


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' entries under our names; our own entries pass as they are.

    Raises:
        ReplivitError: the entries are of another kind of model.
    """
    entries = {key.removeprefix("module."): value for key, value in state_dict.items()}
    if "stem.0.weight" not in entries or not any(key.startswith("blocks.0.") for key in entries):
        first = next(iter(entries), "nothing at all")
        raise ReplivitError(
            "this checkpoint is no UniNet: it has no 'stem.0.weight' and 'blocks.0.'; it starts "
            f"with {first!r}"
        )
    return rename(entries)
