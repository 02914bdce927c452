"""The second opinion: fvcore's counter with our handlers, and why the two counters differ.

fvcore traces the module with TorchScript and adds up per-operator handlers. Its own handlers lack
attention, round einsum, and miss broadcasting; ours replace those. It also counts normalisation,
adaptive pooling and up-sampling, which the canonical count leaves out: `explain_gap` names them.
The adapter keeps fvcore's assumptions (last release 2022) in this one file.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.measurement.evaluation_form import (
    ImageSize,
    Inputs,
    evaluation_form,
    resolve_inputs,
)
from harness.measurement.macs import MacsCount

with warnings.catch_warnings():  # on import fvcore scripts its losses, which torch deprecates
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import get_shape

#: A gap between the counters that is worth a visible flag, relative to the canonical count.
NOTABLE_GAP = 0.005


@dataclass(frozen=True)
class FvcoreCount:
    """fvcore's total per image; `unsupported` are calls of operators that counted zero."""

    total: int
    by_operator: dict[str, int]
    unsupported: dict[str, int]


@dataclass(frozen=True)
class GapReason:
    """A part of the gap: `macs` is fvcore minus canonical, `why` says where it comes from."""

    operator: str
    macs: int
    why: str


@dataclass(frozen=True)
class Gap:
    """fvcore minus canonical; the reasons add up to `macs` exactly.

    `relative` is to the canonical count; None where that is zero and the gap is not.
    """

    macs: int
    relative: float | None
    reasons: tuple[GapReason, ...]

    @property
    def notable(self) -> bool:
        """Whether the gap is over 0.5 % of the canonical count."""
        return self.relative is None or abs(self.relative) > NOTABLE_GAP


# --- handlers: jit values in, multiply-adds out ----------------------------------------------


def _attention(inputs: list, outputs: list) -> int:
    """B H Nq Nk (Dk + Dv); the output has the query's batch, heads and length."""
    query, key, value = (get_shape(one) for one in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _product(contracted: int) -> Callable[[list, list], int]:
    """Handler: elements of the output times the last size of the input at `contracted`."""

    def handler(inputs: list, outputs: list) -> int:
        return math.prod(get_shape(outputs[0])) * get_shape(inputs[contracted])[-1]

    return handler


def _addbmm(inputs: list, outputs: list) -> int:
    return math.prod(get_shape(inputs[1])) * get_shape(inputs[2])[-1]


def _einsum(inputs: list, outputs: list) -> int:
    shapes = [tuple(get_shape(one)) for one in inputs[1].node().inputs()]
    path = inputs[2].toIValue() if len(inputs) > 2 else None
    return einsum_macs(inputs[0].toIValue(), shapes, path)


def _labels(term: str, ndim: int) -> list[str]:
    """The dimensions of one operand by name; those of "..." are named from the right."""
    before, dots, after = term.partition("...")
    if not dots:
        return list(term)
    hidden = ndim - len(before) - len(after)
    return [*before, *(f"...{i}" for i in range(hidden, 0, -1)), *after]


def einsum_macs(equation: str, shapes: list[tuple[int, ...]], path: list[int] | None = None) -> int:
    """Multiply-adds of an einsum, contracted pair by pair as torch does it.

    A pair that shares no summed index is an element-wise or outer product: no matrix product,
    0. `path` is torch's flat list of operand pairs; without it operands go from left to right.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [_labels(term, len(shape)) for term, shape in zip(left.split(","), shapes, strict=True)]
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for label, size in zip(term, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    if not arrow:  # implicit: "..." and every label that stands once
        right = "..." + "".join(one for one in sizes if left.count(one) == 1)
    output = {one for one in sizes if one in right or ("..." in right and one[0] == ".")}
    pairs = list(zip(path[::2], path[1::2], strict=True)) if path else [(0, 1)] * (len(terms) - 1)
    rest, macs = [set(term) for term in terms], 0
    for first, second in pairs:
        a, b = rest[first], rest[second]
        others = [one for i, one in enumerate(rest) if i not in (first, second)]
        needed = output.union(*others)
        summed = (a & b) - needed
        kept = (a | b) & needed
        if summed:  # what only one operand has and nobody needs is summed before the product
            macs += math.prod(sizes[label] for label in kept | summed)
        rest = [*others, kept] if path else [kept, *others]
    return macs


_HANDLERS = {
    "aten::scaled_dot_product_attention": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::einsum": _einsum,
    "aten::matmul": _product(0),
    "aten::mv": _product(0),
    "aten::dot": _product(0),
    "aten::addmv": _product(1),
    "aten::baddbmm": _product(1),
    "aten::addbmm": _addbmm,
}


# --- tracing ---------------------------------------------------------------------------------


class _Context:
    """Stands in for the `ctx` of a custom autograd function: nothing is kept."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    save_for_forward = mark_dirty = mark_non_differentiable = save_for_backward
    set_materialize_grads = save_for_backward


@contextmanager
def _transparent_functions() -> Iterator[None]:
    """Custom autograd functions run as plain code, so that a trace sees the kernels inside.

    A function whose `apply` was stored before (`f = MyFunction.apply`) stays opaque; it is
    listed as unsupported.
    """
    function = torch.autograd.Function
    original = function.__dict__["apply"]

    def apply(cls, *args, **kwargs):
        if cls.setup_context is not function.setup_context:
            return cls.forward(*args, **kwargs)
        return cls.forward(_Context(len(args)), *args, **kwargs)

    try:
        function.apply = classmethod(apply)
        yield
    finally:
        function.apply = original


@contextmanager
def _without_new_hooks(module: nn.Module) -> Iterator[None]:
    """Removes the hooks that fvcore leaves behind when a trace fails."""
    tables = [
        table
        for part in module.modules()
        for table in (part._forward_hooks, part._forward_pre_hooks)
    ]
    before = [set(table) for table in tables]
    try:
        yield
    finally:
        for table, known in zip(tables, before, strict=True):
            for key in set(table) - known:
                del table[key]


def count_macs_fvcore(
    module: nn.Module,
    image_size: ImageSize | None = None,
    batch_size: int = 1,
    *,
    inputs: Inputs | None = None,
) -> FvcoreCount:
    """Count `module` with fvcore and our handlers (arguments as in `count_macs`).

    Raises:
        ValueError: neither image size nor inputs, or the module is on the meta device, where
            TorchScript cannot trace.
    """
    module = getattr(module, "_orig_mod", module)
    inputs, batch_size = resolve_inputs(module, image_size, batch_size, inputs)
    if any(one.is_meta for one in (*module.parameters(), *module.buffers())):
        raise ValueError("fvcore traces a real forward pass: build the module on a real device")
    analysis = FlopCountAnalysis(module, inputs).set_op_handle(**_HANDLERS)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    with evaluation_form(module), _without_new_hooks(module), _transparent_functions():
        by_operator = analysis.by_operator()
    return FvcoreCount(
        total=round(analysis.total() / batch_size),
        by_operator={name: round(n / batch_size) for name, n in sorted(by_operator.items())},
        unsupported=dict(sorted(analysis.unsupported_ops().items())),
    )


# --- the gap ---------------------------------------------------------------------------------

_CONVENTIONS = {
    "batch_norm": "normalisation: fvcore counts 2 per element",
    "layer_norm": "normalisation: fvcore counts 5 per element",
    "group_norm": "normalisation: fvcore counts 5 per element",
    "instance_norm": "normalisation: fvcore counts 5 per element",
    "adaptive_avg_pool2d": "pooling: fvcore counts 1 per input element",
    "upsample_nearest2d": "up-sampling: fvcore counts 1 per output element",
    "upsample_bilinear2d": "up-sampling: fvcore counts 4 per output element",
    "grid_sampler": "resampling: fvcore counts 4 per output element",
}
#: Opaque to fvcore, and able to hold matrix products.
_OPAQUE = ("prim::PythonOp", "prim::CallFunction", "multi_head", "encoder_layer", "rnn", "lstm")


def _sum(table: dict[str, int], convolutions: bool) -> int:
    return sum(
        macs
        for name, macs in table.items()
        if name not in _CONVENTIONS and ("conv" in name) == convolutions
    )


def explain_gap(macs: MacsCount, fvcore: FvcoreCount) -> Gap:
    """Which operators lie behind the difference between the two counters of one module."""
    reasons = [
        GapReason(name, fvcore.by_operator[name], why)
        for name, why in _CONVENTIONS.items()
        if fvcore.by_operator.get(name)
    ]
    opaque = [name for name in fvcore.unsupported if any(part in name for part in _OPAQUE)]
    for family, convolutions in (("convolutions", True), ("matrix products", False)):
        theirs, ours = _sum(fvcore.by_operator, convolutions), _sum(macs.by_operator, convolutions)
        if theirs != ours:
            why = f"{family}: fvcore sees {theirs:,}, torch {ours:,}"
            why += f"; fvcore cannot look into {', '.join(opaque)}" if opaque else ""
            reasons.append(GapReason(family, theirs - ours, why))
    difference = fvcore.total - macs.total
    rounding = difference - sum(reason.macs for reason in reasons)
    if rounding:  # a batch that does not divide evenly
        reasons.append(GapReason("rounding", rounding, "counts per image were rounded"))
    reasons.sort(key=lambda reason: -abs(reason.macs))
    relative = difference / macs.total if macs.total else (None if difference else 0.0)
    return Gap(difference, relative, tuple(reasons))
