"""`deploy`: the five steps, each checked against the original's outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from harness.deployment.batch_norms import fold_batch_norms
from harness.deployment.packed import pack_linears
from harness.errors import ReplivitError, one_line

#: Largest allowed relative error ‖a−b‖/‖b‖ of the deployed outputs.
TOLERANCE = 1e-5


@dataclass
class DeployReport:
    """What `deploy` did to a model; as text it is one sentence.

    Attributes:
        own: names of the modules that folded themselves.
        folded: `"norm -> layer"` for each batch norm that moved.
        fused: names of the timm modules whose attention was switched to the fused kernel.
        tables: names of the modules whose table is no longer gathered in every call.
        channels_last: number of convolutions with that layout.
        packed: names of the linear layers whose weights are packed for the processor.
        relative_error: the largest after any of the steps.
    """

    own: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    channels_last: int = 0
    packed: list[str] = field(default_factory=list)
    relative_error: float = 0.0

    def __str__(self) -> str:
        return (
            f"{len(self.own)} modules folded themselves, {len(self.folded)} batch norms folded, "
            f"{len(self.fused)} attentions fused, {len(self.tables)} tables cached, "
            f"{self.channels_last} convolutions channels-last, {len(self.packed)} linears packed, "
            f"relative error {self.relative_error:.1e}"
        )


@torch.no_grad()
def deploy(
    module: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
) -> nn.Module:
    """A copy of `module` in its deployment form: eval mode, frozen, equal outputs.

    The copy has `deployed = True` and its `deploy_report`; it is not meant to be trained. A model
    in which nothing can be folded comes back as a frozen copy.

    Args:
        module: any model, in float32 or float64; it is left as it was.
        image_size: pixels of the check's images; by default what `module.pretrained_cfg` says.
        example_inputs: what to call the model with, where that is not one batch of images.

    Raises:
        ReplivitError: a step changed the outputs by more than 1e-5, the model does not run on such
            inputs, is in half precision, or has no weights yet.
    """
    if getattr(module, "deployed", False):
        return copy.deepcopy(module)
    device = _device_of(module)
    # Folded and checked on the CPU, where float32 means float32 (no TF32).
    model = copy.deepcopy(module).cpu().eval().requires_grad_(False)
    inputs = example_inputs or _images(module, image_size)
    inputs = tuple(one.cpu() if isinstance(one, Tensor) else one for one in inputs)
    reference = _run(model, inputs, "the model itself")
    report = DeployReport()

    def step(what: str, change: Callable[[], Any]) -> Any:
        done = change()
        if not done:
            return done
        error = relative_error(_run(model, inputs, what), reference)
        if not error <= TOLERANCE:
            raise ReplivitError(
                f"deploy: {what} changed the outputs by {error:.1e} "
                f"(relative; at most {TOLERANCE:.0e} is allowed)"
            )
        report.relative_error = max(report.relative_error, error)
        return done

    report.own = step("the model's own deploy_()", lambda: fold_own(model))
    report.folded = step("folding batch norms", lambda: fold_batch_norms(model, inputs))
    report.fused = step("fused attention", lambda: fuse_attention(model))
    report.tables = step("caching tables", lambda: cache_tables(model))
    if (report.own or report.folded or report.fused or report.tables) and _all_zero(reference):
        # A new classifier may start at zero: then the same folding is checked where it shows.
        twin = _with_noise_for_zeros(module)
        if twin is None:
            raise ReplivitError(
                "deploy: the outputs are all zero, so nothing can be compared; load weights first"
            )
        report.relative_error = deploy(
            twin, image_size, example_inputs=example_inputs
        ).deploy_report.relative_error
    report.channels_last = step("channels-last", lambda: to_channels_last(model))
    report.packed = step("packing linear layers", lambda: pack_linears(model))
    model.requires_grad_(False).eval().to(device)
    model.deployed, model.deploy_report = True, report
    return model


def fold_own(model: nn.Module) -> list[str]:
    """Call `deploy_()` of every sub-module that has one, children first; returns their names."""
    asked: dict[nn.Module, str] = {}
    for name, module in list(_children_first(model)):
        if module not in asked and callable(getattr(module, "deploy_", None)):
            module.deploy_()
            asked[module] = name or type(module).__name__
    return list(asked.values())


def _children_first(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in module.named_children():
        yield from _children_first(child, f"{name}.{child_name}" if name else child_name)
    yield name, module


def fuse_attention(model: nn.Module) -> list[str]:
    """Switch timm's `fused_attn` on where it is off (Swin)."""
    changed = []
    for name, module in model.named_modules():
        if getattr(module, "fused_attn", None) is False:
            module.fused_attn = True
            changed.append(name)
    return changed


class _Table(nn.Module):
    """A constant in place of a method that computes it."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach().contiguous(), persistent=False)

    def forward(self) -> Tensor:
        return self.value


def cache_tables(model: nn.Module) -> list[str]:
    """Gather timm's relative position biases once, instead of in every call (Swin, BEiT)."""
    changed = []
    for name, module in list(model.named_modules()):
        if getattr(module, "relative_position_bias_table", None) is None:
            continue
        if hasattr(module, "_get_rel_pos_bias"):
            module.gathered_bias = _Table(module._get_rel_pos_bias())
            # Beside the registration, which moves it between devices, it shadows the method.
            module.__dict__["_get_rel_pos_bias"] = module.gathered_bias
            changed.append(name)
    return changed


def to_channels_last(model: nn.Module) -> int:
    """Lay the 2-d convolutions' weights out channels-last; returns how many there are.

    The layout spreads from the weights to the maps, so the input may stay contiguous. On a CPU this
    is never slower and up to 1.4x faster (MobileNetV2, EfficientFormer), hence no choice by model.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for layer in layers:
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return len(layers)


def relative_error(ours: Any, reference: Any) -> float:
    """The largest ‖ours − reference‖ / ‖reference‖ over the tensors of two (nested) outputs.

    Infinite where shapes or counts differ, integers are unequal or something is not a number.
    """
    ours, reference = tree_leaves(ours), tree_leaves(reference)
    if len(ours) != len(reference):
        return math.inf
    return max((_distance(*pair) for pair in zip(ours, reference, strict=True)), default=0.0)


def _distance(one: Any, two: Any) -> float:
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return 0.0 if one is two or one == two else math.inf
    if one.shape != two.shape:
        return math.inf
    if torch.equal(one, two):
        return 0.0
    if not two.is_floating_point():
        return math.inf
    error = (one.double() - two.double()).norm() / two.double().norm()
    return error.item() if error.isfinite() else math.inf


def _all_zero(outputs: Any) -> bool:
    return not any(isinstance(one, Tensor) and one.any() for one in tree_leaves(outputs))


def _with_noise_for_zeros(module: nn.Module) -> nn.Module | None:
    """A copy with seeded noise in linear layers whose weights are all zero, or None."""
    twin = copy.deepcopy(module)
    layers = [one for one in twin.modules() if isinstance(one, nn.Linear) and not one.weight.any()]
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        noise = torch.randn(layer.weight.shape, generator=generator)
        layer.weight.data = noise.to(layer.weight)
    return twin if layers else None


def _device_of(module: nn.Module) -> torch.device:
    """The model's device, after a look at whether it can be folded at all."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(one.is_meta for one in tensors):
        raise ReplivitError("deploy: the model has no weights yet (it is on the device meta)")
    if any(one.dtype in (torch.float16, torch.bfloat16) for one in tensors):
        raise ReplivitError("deploy: fold in float32, then convert: deploy(model).bfloat16()")
    return tensors[0].device if tensors else torch.device("cpu")


def _images(module: nn.Module, image_size: int | tuple[int, int] | None) -> tuple[Tensor]:
    """Two seeded standard normal images `(2, 3, H, W)`."""
    config = getattr(module, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, None, None))
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height is None:
        raise ReplivitError("deploy: the module does not say its image size; give image_size")
    dtype = next((one.dtype for one in module.parameters()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, height, width, generator=generator)
    return (images.to(dtype),)


def _run(model: nn.Module, inputs: tuple, what: str) -> Any:
    try:
        return model(*inputs)
    except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
        raise ReplivitError(f"deploy: {what} fails ({one_line(error)})") from error
