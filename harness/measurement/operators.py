"""What torch's counter knows and what it does not: formulas, and the log of everything else.

`formulas()` are handed to `FlopCounterMode`. `OperatorLog` runs beneath it and lists every
operator that was executed and counted nothing, by kind, so that no work is silently zero.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from harness.errors import ReplivitError

aten = torch.ops.aten

# --- formulas, in FLOPs: two per multiply-add ------------------------------------------------


def attention_flops(query: tuple, key: tuple, value: tuple, *_: Any, **__: Any) -> int:
    """2 B H Nq Nk (Dk + Dv) for query `(B, H, Nq, Dk)` and value `(B, Hkv, Nk, Dv)`."""
    batch, heads, queries, key_dim = query
    return 2 * batch * heads * queries * key[2] * (key_dim + value[3])


def _mv_flops(matrix: tuple, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _addmv_flops(_bias: tuple, matrix: tuple, *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _addbmm_flops(_bias: tuple, left: tuple, right: tuple, *_: Any, **__: Any) -> int:
    return 2 * math.prod(left) * right[-1]


#: Products with vectors and summed batches: torch has the kernels and no formulas for them.
PRODUCTS: dict[Any, Callable[..., int]] = {
    aten.mv: _mv_flops,
    aten.dot: _mv_flops,
    aten.vdot: _mv_flops,
    aten.addmv: _addmv_flops,
    aten.addbmm: _addbmm_flops,
}

ATTENTION_KERNELS = tuple(
    getattr(aten, name)
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math_for_mps",
    )
    if hasattr(aten, name)
)


def _counts_attention(mapping: dict[Any, Callable[..., int]], device: str) -> bool:
    """Whether a known fused call, 4 queries on 6 keys, comes out right."""
    query, key = torch.zeros(1, 2, 4, 8, device=device), torch.zeros(1, 2, 6, 8, device=device)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        F.scaled_dot_product_attention(query, key, key)
    return counter.get_total_flops() == attention_flops(query.shape, key.shape, key.shape)


@functools.cache
def formulas(device: str = "cpu") -> dict[Any, Callable[..., int]]:
    """What `FlopCounterMode` must be told: products without formula, and attention if need be.

    The self-check runs once per process and kind of device: some torch versions count fused
    attention as zero on some devices; then all attention kernels get our formula.

    Raises:
        ReplivitError: attention is counted wrongly even so; no count would be right.
    """
    mapping = dict(PRODUCTS)
    mapping |= {one: attention_flops for one in ATTENTION_KERNELS if one not in flop_registry}
    if not _counts_attention(mapping, device):
        mapping |= dict.fromkeys(ATTENTION_KERNELS, attention_flops)
        if not _counts_attention(mapping, device):
            raise ReplivitError(
                f"torch {torch.__version__} does not count a known attention call right on "
                f"{device}, so no MACs can be counted there; use another version"
            )
    return mapping


# --- the log of what counts nothing ----------------------------------------------------------

#: Kinds of uncounted operators by the kernel's name, without underscores around it.
_NAMES = (
    ("index", r"(arg|m)?sort|topk|kthvalue|gather|scatter\w*|index\w*|take|masked_(select|scatter)"
              r"|nonzero\w*|unique\w*|embedding\w*|bucketize|searchsorted|multinomial|bincount"
              r"|local_scalar_dense"),
    ("fft", r"fft_\w+"),
    ("distance", r"cdist_forward|euclidean_dist|pdist_forward"),
    ("normalisation", r"\w*(batch|layer|group|instance|rms)_norm\w*|\w*vector_norm"),
    ("resampling", r"\w*pool\d?d?\w*|\w*upsample\w*|\w*grid_sampler\w*"),
    ("reduction", r"sum|mean|prod|amax|amin|aminmax|max|min|var|var_mean|std|std_mean|norm|any|all"
                  r"|argmax|argmin|logsumexp|cumsum|cumprod|cummax"),
    ("elementwise", r"\w*softmax\w*|masked_fill|clamp\w*|where|glu|native_dropout"),
    ("movement", r"clone|copy|to_copy|cat|stack|\w*pad\w*|roll|flip|im2col|col2im|repeat\w*|tril"
                 r"|triu|pixel_\w+|channel_shuffle|full\w*|zeros?\w*|ones\w*|fill|arange|linspace"
                 r"|eye|scalar_tensor|normal\w*|uniform|rand\w*|bernoulli|constant\w*"),
    ("free", r"empty\w*|new_empty\w*|unsafe_view|detach|alias|lift_fresh|resize|set"),
)  # fmt: skip
_KINDS = tuple((kind, re.compile(pattern)) for kind, pattern in _NAMES)

#: Kinds that may hide multiply-adds a reader would expect in a count.
SUSPICIOUS = ("hidden product", "fft", "distance", "other")


@dataclass(frozen=True)
class OperatorUse:
    """An operator that no formula covers.

    Attributes:
        kind: index, fft, distance, hidden product, normalisation, resampling, reduction,
            elementwise, movement or other.
        calls: executions in one forward pass.
        bytes_moved: tensors read and written in one forward pass, each call for itself.
        estimated_macs: what the work amounts to where a formula exists (fft, distance, hidden
            product, interpolation), per forward pass. Never part of a total.
    """

    kind: str
    calls: int = 0
    bytes_moved: int = 0
    estimated_macs: int = 0


def _stored(tensor: torch.Tensor) -> int:
    """Elements that exist in memory: a dimension expanded with stride 0 exists once."""
    if tensor.layout != torch.strided:
        return tensor.numel()
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride)


def _hides_a_product(name: str, tensors: list[torch.Tensor], out: Any) -> bool:
    """A broadcast product larger than both factors: with a sum behind it, a matrix product."""
    return name == "mul" and len(tensors) == 2 and out.numel() > max(map(_stored, tensors))


def _estimate(name: str, kind: str, args: tuple, out: Any) -> int:
    """Multiply-adds of an uncounted operator, rounded; 0 where there is no formula."""
    if kind == "hidden product":
        return out.numel()
    if kind == "fft":  # 2.5 N log2 N FLOPs for N real points, 5 N log2 N for N complex ones
        points = out if name == "fft_c2r" else args[0]
        length = math.prod(points.shape[dim] for dim in args[1])
        flops = 2.5 if "c2c" not in name else 5.0
        return round(flops * points.numel() * math.log2(length) / 2) if length > 1 else 0
    if name in ("cdist_forward", "euclidean_dist"):  # every pair, one multiply-add per feature
        return out.numel() * args[0].shape[-1]
    if "bilinear" in name or name == "grid_sampler_2d":
        return 4 * out.numel()
    if "bicubic" in name:
        return 16 * out.numel()
    return 0


class OperatorLog(TorchDispatchMode):
    """Notes every operator that reaches a kernel and is not in `counted`.

    Enter it before (outside) the counter, which breaks composite operators up first.
    """

    supports_higher_order_operators = True

    def __init__(self, counted: Any) -> None:
        super().__init__()
        self.counted = counted
        self.uses: dict[str, OperatorUse] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        schema = getattr(func, "_schema", None)
        if schema is None or func.overloadpacket in self.counted:
            return out  # no schema: a higher-order operator, which the counter counts or refuses
        aliases = [one.alias_info for one in schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view:
            self._note(schema.name.replace("::", "."), func, (args, kwargs or {}), out)
        return out

    def _note(self, qualified: str, func: Any, arguments: tuple[tuple, dict], out: Any) -> None:
        name = qualified.rpartition(".")[2].strip("_")
        inputs = [one for one in tree_leaves(arguments) if isinstance(one, torch.Tensor)]
        outputs = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        kind = next((kind for kind, known in _KINDS if known.fullmatch(name)), "other")
        if _hides_a_product(name, inputs, out):
            kind, qualified = "hidden product", f"{qualified} (broadcast)"
        elif kind == "other" and torch.Tag.pointwise in func.tags:
            kind = "elementwise"
        if kind == "free":
            return
        moved = sum(_stored(one) * one.element_size() for one in inputs + outputs)
        old = self.uses.get(qualified, OperatorUse(kind))
        self.uses[qualified] = OperatorUse(
            kind,
            old.calls + 1,
            old.bytes_moved + moved,
            old.estimated_macs + _estimate(name, kind, arguments[0], out),
        )
