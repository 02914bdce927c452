"""The deterministic weight fill and the comparisons that the golden fixtures are stated in.

The rule is written out in `tests/golden/README.md`.
"""

from __future__ import annotations

import fnmatch
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def load_golden(name: str) -> dict[str, Any]:
    """The fixture `<paper>/<file>` without its suffix."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_cases(name: str) -> list:
    """The cases of a fixture as pytest parameters with readable ids."""
    import pytest

    cases = load_golden(name)["cases"]
    return [pytest.param(case, id=case.get("name", str(i))) for i, case in enumerate(cases)]


def fill_value(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Rule rs-v1 for one entry, in float64."""
    rs = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith("running_var"):
        return rs.uniform(0.5, 1.5, shape)
    if key.endswith("running_mean"):
        return 0.1 * rs.standard_normal(shape)
    if len(shape) >= 2:
        return rs.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
    if len(shape) == 1 and key.endswith("weight"):
        return 1 + 0.1 * rs.standard_normal(shape)
    return 0.1 * rs.standard_normal(shape)


def fill_value_ls(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Rule rs-v1-ls: as rs-v1, but every layer scale is 0.1 * N(0, 1)."""
    if "layer_scale_" in key:
        return 0.1 * np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    return fill_value(key, shape)


FILLS = {"rs-v1": fill_value, "rs-v1-ls": fill_value_ls}


def filled_state_dict(
    entries: list, fill: str = "rs-v1", skip: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """The authors' state dict of a fixture, filled; entries are `[name, shape, dtype]`.

    Integer and bool entries and those matching a pattern of `skip` are left out.
    """
    rule = FILLS[fill]
    filled = {}
    for name, shape, dtype in entries:
        if not dtype.startswith("float") or any(fnmatch.fnmatch(name, one) for one in skip):
            continue
        filled[name] = torch.from_numpy(np.asarray(rule(name, tuple(shape)), dtype=np.float32))
    return filled


def golden_input(shape: list[int], seed: int = 0) -> torch.Tensor:
    """Input randn-v1."""
    values = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(values)


def assert_matches(output: torch.Tensor, case: dict[str, Any], rtol: float | None = None) -> None:
    """Compare `output` (B, ...) with a case's first16, sum, l2 and argmax, sample by sample.

    `rtol` is the fixture's own `rtol_of_max` unless given: first16 relative to its largest
    element, sum relative to l2, l2 relative to itself.
    """
    rtol = case.get("rtol_of_max", 1e-5) if rtol is None else rtol
    if "output_shape" in case:
        assert list(output.shape) == list(case["output_shape"])
    for index, sample in enumerate(output.detach().double()):
        flat = sample.flatten()
        first = torch.tensor(case["first16"][index], dtype=torch.float64)
        error = (flat[: len(first)] - first).abs().max() / first.abs().max()
        assert error <= rtol, f"sample {index}: first16 off by {error:.2e} (allowed {rtol:.0e})"
        norm = case["l2"][index]
        assert abs(flat.sum() - case["sum"][index]) <= rtol * norm, f"sample {index}: sum"
        assert abs(flat.norm() - norm) <= rtol * norm, f"sample {index}: l2"
        if "argmax" in case:
            assert int(flat.argmax()) == case["argmax"][index], f"sample {index}: argmax"
