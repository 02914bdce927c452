"""What the Reformer's fixtures are stated in: seeded arrays, probes, checksums."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor


def array(seed: int, shape) -> Tensor:
    """`RandomState(seed).standard_normal(shape)` in float32."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def probe(shape) -> Tensor:
    """The first probe, of which gradients are taken."""
    return array(1000, tuple(shape))


def crc(values: Tensor) -> int:
    """CRC-32 of int32 values."""
    return zlib.crc32(np.ascontiguousarray(values.numpy().astype("<i4")).tobytes())


def numbered(buckets: Tensor, total: int) -> Tensor:
    """Bucket ids `(..., rounds, L)` with those of round r raised by `r * total`."""
    return buckets.int() + (torch.arange(buckets.shape[-2]) * total)[:, None].int()


def assert_probed(output: Tensor, expected: dict[str, Any], rtol: float = 1e-5) -> None:
    """first16, sum, l2 and the probes: inner products, so that no permutation can pass."""
    output = output.detach().double()
    if "output_shape" in expected:
        assert list(output.shape) == expected["output_shape"]
    first = torch.tensor(expected["first16"], dtype=torch.float64)
    flat, norm = output.reshape(len(first), -1), float(output.norm())
    error = (flat[:, : first.shape[1]] - first).abs().max()
    assert error <= rtol * first.abs().max(), f"first16 off by {error:.2e}"
    for row, (total, length) in enumerate(zip(expected["sum"], expected["l2"], strict=True)):
        assert abs(flat[row].sum() - total) <= rtol * length, f"sum of {row}"
        assert abs(flat[row].norm() - length) <= rtol * length, f"l2 of {row}"
    for index, wanted in enumerate(expected["probes"]):
        weights = np.random.RandomState(1000 + index).standard_normal(tuple(output.shape))
        found = float((output * torch.from_numpy(weights)).sum())
        assert abs(found - wanted) <= rtol * norm, f"probe {index}: {found} and {wanted}"


def assert_gradients(parameters: dict, expected: dict, name, rtol: float = 1e-5) -> None:
    """Sum and norm of each weight's gradient; `name` gives our name of a key."""
    assert expected
    for key, (total, norm) in expected.items():
        found = parameters[name(key)].grad.double()
        assert abs(float(found.norm()) - norm) <= rtol * norm + 1e-7, key
        assert abs(float(found.sum()) - total) <= rtol * norm + 1e-6, key
