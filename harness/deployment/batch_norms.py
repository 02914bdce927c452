"""Batch norms into their neighbours, found by watching the model run once.

Patterns of names or containers miss most models: a norm may be a sibling attribute, sit in another
module, or bring an activation with it (timm). What counts is who reads what, and that is visible
while the model runs: a norm folds into a layer if it gets exactly what the layer returned and
nobody else reads it. A weight that is tied, or read from outside, is left alone likewise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.deployment.affine import batch_norm_affine, fold_after, fold_before, takes_affine
from harness.linear import Linear

# By `forward`, not by class: a subclass that computes something else is not folded.
LAYER_FORWARDS = {
    kind.forward for kind in (nn.Linear, Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)
}
NORM_FORWARDS = {_BatchNorm.forward, BatchNormAct2d.forward}


def _is_layer(module: nn.Module) -> bool:
    return type(module).forward in LAYER_FORWARDS


def _is_norm(module: nn.Module) -> bool:
    return type(module).forward in NORM_FORWARDS and module.running_mean is not None


def _untouched(module: nn.Module) -> bool:
    """No hook and no parametrization changes what the module computes."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and not parametrize.is_parametrized(module)


class _Watch(TorchDispatchMode):
    """Notes which module reads which tensor while `model` runs inside the `with` block.

    Attributes:
        readers: id of a tensor -> the innermost modules whose operations read it.
        outputs: layer or norm -> the tensors it returned, one for each call.
        inputs: layer or norm -> the ids of the tensors it got, one for each call.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.readers: dict[int, set[nn.Module]] = defaultdict(set)
        self.outputs: dict[nn.Module, list[Tensor]] = defaultdict(list)
        self.inputs: dict[nn.Module, list[int]] = defaultdict(list)
        self.model, self.stack, self.handles = model, [model], []

    def __enter__(self) -> _Watch:
        for module in self.model.modules():
            self.handles += [
                module.register_forward_pre_hook(self._enter_module),
                module.register_forward_hook(self._leave_module, always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*exception)

    def _enter_module(self, module: nn.Module, args: tuple) -> None:
        self.stack.append(module)
        if _is_layer(module) or _is_norm(module):
            self.inputs[module].append(id(args[0]) if args else 0)

    def _leave_module(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.stack.pop()
        if isinstance(output, Tensor) and (_is_layer(module) or _is_norm(module)):
            self.outputs[module].append(output)  # kept alive: from here on its id is its own,
            self.readers.pop(id(output), None)  # and readers of a dead tensor are forgotten

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.readers[id(leaf)].add(self.stack[-1])
        return func(*args, **(kwargs or {}))

    def feeds_only(self, first: nn.Module, second: nn.Module) -> bool:
        """Whether all that `first` returns goes to `second`, which gets nothing else."""
        made = [id(output) for output in self.outputs[first]]
        alone = all(self.readers[one] == {second} for one in made)
        return bool(made) and made == self.inputs[second] and alone

    def owns_parameters(self, module: nn.Module) -> bool:
        """Whether nobody but `module` reads its parameters."""
        return all(self.readers[id(one)] <= {module} for one in module.parameters(recurse=False))

    def channels_on_axis_one(self, layer: nn.Module) -> bool:
        """Where batch norms look for channels; in a linear layer's output only if `(B, C)`."""
        flat = all(output.dim() == 2 for output in self.outputs[layer])
        return flat or not isinstance(layer, nn.Linear)


def _activation_of(norm: nn.Module) -> nn.Module:
    """What is left of a folded norm: what timm's norms apply after it, or nothing."""
    after = [getattr(norm, name, nn.Identity()) for name in ("drop", "act")]
    after = [part for part in after if not isinstance(part, nn.Identity)]
    if len(after) < 2:
        return after[0] if after else nn.Identity()
    return nn.Sequential(*after)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, inputs: Sequence[Any]) -> list[str]:
    """Fold the batch norms of `model` (in eval mode) into their neighbours, in place.

    Args:
        inputs: what `model` is called with, once, to see which layer feeds which norm.

    Returns:
        `"norm -> layer"` for each folded norm, by the modules' names.
    """
    names = {module: name for name, module in model.named_modules() if _untouched(module)}
    with _Watch(model) as watch:
        model(*inputs)
    ran = [module for module in watch.outputs if module in names and watch.owns_parameters(module)]
    layers = [module for module in ran if _is_layer(module) and watch.channels_on_axis_one(module)]
    made_by = {id(output): layer for layer in layers for output in watch.outputs[layer]}
    read_by = {source: layer for layer in layers for source in watch.inputs[layer]}

    folded = []
    for norm in filter(_is_norm, ran):
        rest = _activation_of(norm)
        before = made_by.get(watch.inputs[norm][0])
        after = read_by.get(id(watch.outputs[norm][0]))
        if before is not None and watch.feeds_only(before, norm):
            layer, fold = before, fold_after
        elif (
            after is not None
            and isinstance(rest, nn.Identity)
            and takes_affine(after)
            and watch.feeds_only(norm, after)
        ):
            layer, fold = after, fold_before
        else:
            continue
        fold(layer, *batch_norm_affine(norm))
        _replace(model, norm, rest)
        folded.append(f"{names[norm]} -> {names[layer]}")
    return folded
