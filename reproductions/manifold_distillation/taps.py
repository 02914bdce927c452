"""Feature taps: what a network's layers give, by index or by name, while it runs.

    with tapped(model, [0, 3, 11]) as taps:
        logits = model(images)
    features = taps.features()          # three `Features`: tokens (B, N, C), prefix, grid

A tap is the residual stream after a block, before the final norm (official code: the patched
forward functions of `customized_forward.py`, which return every block's output).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from reproductions.manifold_distillation.matching import Features

Layer = int | str
#: What timm lists among a network's stages although no block is inside.
NO_STAGE = re.compile(r"(stem|act|conv|bn|patch_embed|pos|norm)")


def block_names(model: nn.Module) -> list[str]:
    """The names of a network's blocks, in order, over all its stages.

    Known are timm's models, which list their stages in `feature_info`, and whatever has `blocks`
    or `stages`.
    The blocks of CaiT that only the class token passes are not among them.
    """
    info = getattr(model, "feature_info", None) or ()
    stages = [one["module"] for one in info if not NO_STAGE.match(one["module"])]
    if all(re.fullmatch(r"blocks\.\d+", one) for one in stages):
        stages = []  # one list, of which perhaps not every block is named
    names = [name for stage in stages for name in _inside(model, stage)]
    # timm's MViT and Twins name stages that they do not have
    names = names or _inside(model, "blocks") or _inside(model, "stages")
    return list(dict.fromkeys(names))


def _inside(model: nn.Module, stage: str) -> list[str]:
    """The blocks of a stage; the stage itself where it has none inside."""
    try:
        module = model.get_submodule(stage)
    except AttributeError:
        return []
    if isinstance(getattr(module, "blocks", None), nn.Module):
        return _inside(model, f"{stage}.blocks")
    children = [name for name, _ in module.named_children()]
    listed = isinstance(module, nn.Sequential | nn.ModuleList)
    if children and (listed or all(re.fullmatch(r"b\d+", name) for name in children)):
        return [name for child in children for name in _inside(model, f"{stage}.{child}")]
    return [stage]


def find_layers(model: nn.Module, layers: Sequence[Layer], who: str) -> list[nn.Module]:
    """The modules to tap.

    Args:
        layers: numbers of blocks from 0 (negative: from the end), or names of modules.
        who: whose they are, in the error.

    Raises:
        ValueError: a layer that the model does not have, or what is neither number nor name.
    """
    names = block_names(model)
    found = []
    for layer in layers:
        if isinstance(layer, str):
            known = dict(model.named_modules())
            if layer not in known or not layer:
                raise ValueError(f"the {who} ({type(model).__name__}) has no layer {layer!r}")
            found.append(known[layer])
        elif not isinstance(layer, int) or isinstance(layer, bool):
            raise ValueError(f"a layer is a number or a name, not {layer!r}")
        elif -len(names) <= layer < len(names):
            found.append(model.get_submodule(names[layer]))
        else:
            has = f"its blocks are 0 to {len(names) - 1}" if names else "no blocks were found in it"
            raise ValueError(f"the {who} ({type(model).__name__}) has no layer {layer}: {has}")
    return found


class Taps:
    """The outputs of some layers during the last forward pass."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        self.grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        self.channels_last = str(getattr(model, "output_fmt", "")).endswith("NHWC")
        self.outputs: dict[nn.Module, Tensor] = {}

    def keep(self, layer: nn.Module, _: object, output: object) -> None:
        """The hook: remember what a layer gives (of several things the first)."""
        first = output[0] if isinstance(output, tuple | list) else output
        self.outputs[layer] = first

    def features(self) -> list[Features]:
        """One for each layer, in the order asked for.

        Raises:
            ValueError: a layer that did not run, or gives neither tokens nor a map.
        """
        for layer in self.layers:
            if not isinstance(self.outputs.get(layer), Tensor):
                raise ValueError(f"a tapped {type(layer).__name__} gave no features: did it run?")
        return [
            Features.of(self.outputs[layer], self.grid, self.channels_last)
            for layer in self.layers
        ]  # fmt: skip


@contextmanager
def tapped(
    model: nn.Module, layers: Sequence[Layer | nn.Module], who: str = "model"
) -> Iterator[Taps]:
    """Listen to layers of `model` inside the `with`; nothing stays attached to it afterwards.

    Raises:
        ValueError: a layer that the model does not have.
    """
    modules = [
        one if isinstance(one, nn.Module) else find_layers(model, [one], who)[0] for one in layers
    ]
    taps = Taps(model, modules)
    hooks = [module.register_forward_hook(taps.keep) for module in dict.fromkeys(modules)]
    try:
        yield taps
    finally:
        for hook in hooks:
            hook.remove()
