"""The canonical count: multiply-adds of convolutions, matrix products and attention, per image.

It is torch's `FlopCounterMode` / 2 over one real forward pass in evaluation form: exact, linear
in the batch, and the same whether attention is fused or not. What the counter does not know is
listed beside the total (`MacsCount.unsupported`), never silently zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness.linear import matrix_products
from harness.measurement.evaluation_form import (
    ImageSize,
    Inputs,
    evaluation_form,
    floating_like,
    resolve_inputs,
)
from harness.measurement.operators import SUSPICIOUS, OperatorLog, OperatorUse, formulas


@dataclass(frozen=True)
class ModuleCost:
    """A node of the per-module tree; what the children do not account for is the node's own.

    Attributes:
        name: last part of the module's name; the class's name for the root.
        macs: multiply-adds per image, children included.
        params: parameters, children included.
        calls: forward passes of the module in one forward pass of the whole.
    """

    name: str
    type: str
    macs: int
    params: int
    calls: int
    children: tuple[ModuleCost, ...] = ()

    def flat(self, depth: int, prefix: str = "") -> dict[str, int]:
        """Dotted name -> MACs, down to `depth` levels below this node."""
        table = {prefix or self.name: self.macs}
        for child in self.children if depth else ():
            table |= child.flat(depth - 1, f"{prefix}.{child.name}" if prefix else child.name)
        return table


@dataclass(frozen=True)
class MacsCount:
    """Multiply-adds per image, and everything that is not in the total.

    Attributes:
        total: convolutions, matrix products and attention, per image.
        by_operator: the same by kernel; sums up to `total`.
        unsupported: executed operators without a formula, for one forward pass of the batch.
        modules: the per-module tree; its root's `macs` is `total`.
        batch_size: images in the pass that was counted.
    """

    total: int
    by_operator: dict[str, int]
    unsupported: dict[str, OperatorUse]
    modules: ModuleCost
    batch_size: int

    @property
    def suspicious(self) -> dict[str, OperatorUse]:
        """Uncounted operators that may hide multiply-adds a reader would expect."""
        return {name: use for name, use in self.unsupported.items() if use.kind in SUSPICIOUS}


@dataclass(frozen=True)
class MacsDistribution:
    """Multiply-adds of single images, for models whose cost depends on the image."""

    mean: float
    p5: float
    p95: float
    values: tuple[int, ...]

    @property
    def n(self) -> int:
        """Images counted."""
        return len(self.values)


class _CallTree:
    """Attributes FLOPs to the path of calls: at each module's exit, what was added since entry.

    A shared module is charged to whoever calls it, which names alone could not do.
    """

    def __init__(self, root: nn.Module, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.names: dict[nn.Module, list[str]] = defaultdict(list)
        for name, module in root.named_modules(remove_duplicate=False):
            self.names[module].append(name)
        self.stack: list[tuple[str, int]] = []
        self.flops: dict[str, int] = defaultdict(int)
        self.calls: dict[str, int] = defaultdict(int)

    def _enter(self, module: nn.Module, *_) -> None:
        names, caller = self.names[module], self.stack[-1][0] if self.stack else ""
        inside = [one for one in names if caller and one.startswith(f"{caller}.")]
        path = min(inside or names, key=lambda one: one.count("."))
        self.stack.append((path, self.counter.get_total_flops()))

    def _leave(self, *_) -> None:
        path, before = self.stack.pop()
        self.calls[path] += 1
        if all(path != caller for caller, _ in self.stack):  # recursion counts once
            self.flops[path] += self.counter.get_total_flops() - before

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every module, removed at the end."""
        hooks = []
        try:
            for module in self.names:
                hooks.append(module.register_forward_pre_hook(self._enter, prepend=True))
                hooks.append(module.register_forward_hook(self._leave, always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def tree(self, module: nn.Module, batch_size: int, name: str = "") -> ModuleCost:
        """The node of `module` at the dotted `name`, with all below it."""
        children = tuple(
            self.tree(child, batch_size, f"{name}.{key}" if name else key)
            for key, child in module.named_children()
        )
        if name in self.calls:
            macs = round(self.flops[name] / 2 / batch_size)
        else:  # a container that is never called itself, or a module that was not used
            macs = sum(child.macs for child in children)
        return ModuleCost(
            name=name.rpartition(".")[2] or type(module).__name__,
            type=type(module).__name__,
            macs=macs,
            params=sum(one.numel() for one in module.parameters()),
            calls=self.calls[name],
            children=children,
        )


def count_macs(
    module: nn.Module,
    image_size: ImageSize | None = None,
    batch_size: int = 1,
    *,
    inputs: Inputs | None = None,
) -> MacsCount:
    """Count one forward pass of `module` on its own device, in its own dtype.

    The module's training flags, the random state and its hooks are as before afterwards.

    Args:
        image_size: pixels, for a seeded random image batch `(batch_size, 3, H, W)`.
        inputs: other inputs instead, e.g. tokens `(B, N)`: a tensor or a tuple of arguments;
            the first dimension of the first tensor is the batch.

    Raises:
        ValueError: neither image size nor inputs.
    """
    module = getattr(module, "_orig_mod", module)  # a compiled module runs kernels of its own
    inputs, batch_size = resolve_inputs(module, image_size, batch_size, inputs)
    mapping = formulas(floating_like(module).device.type)
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    log, calls = OperatorLog(counter.flop_registry), _CallTree(module, counter)
    with evaluation_form(module), matrix_products(), calls.watching(), log, counter:
        module(*inputs)
    by_operator = counter.get_flop_counts().get("Global", {})
    return MacsCount(
        total=round(counter.get_total_flops() / 2 / batch_size),
        by_operator={str(op): round(n / 2 / batch_size) for op, n in by_operator.items()},
        unsupported=dict(sorted(log.uses.items())),
        modules=calls.tree(module, batch_size),
        batch_size=batch_size,
    )


def breakdown(
    module: nn.Module, image_size: ImageSize | None = None, *, inputs: Inputs | None = None
) -> ModuleCost:
    """MACs and parameters of every sub-module, as a tree (arguments as in `count_macs`)."""
    return count_macs(module, image_size, inputs=inputs).modules


def count_macs_distribution(module: nn.Module, images: Iterable[torch.Tensor]) -> MacsDistribution:
    """Count image by image, `(3, H, W)` each: what an input-dependent model really spends.

    Raises:
        ValueError: no images.
    """
    like = floating_like(module)
    values, mapping = [], formulas(like.device.type)
    with evaluation_form(module), matrix_products():
        for image in images:
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                module(image[None].to(like.device, like.dtype))
            values.append(counter.get_total_flops() // 2)
    if not values:
        raise ValueError("a distribution needs at least one image")
    p5, p95 = np.percentile(values, [5, 95])
    return MacsDistribution(float(np.mean(values)), float(p5), float(p95), tuple(values))
