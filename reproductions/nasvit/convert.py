"""The authors' checkpoints -> ours.

The released file holds the supernet, under the names of its dynamic layers. A variant that is one
network takes its slices from it. A network that the authors' code extracted has other names and
full-width transformer blocks; it is taken as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from harness.errors import ReplivitError
from reproductions.nasvit.named import named_configs
from reproductions.nasvit.space import NASVIT, Config, Space
from reproductions.nasvit.supernet import slice_state

State = dict[str, Tensor]

#: Never used, or the same in every model: indices, and norms that tracked nothing.
_DROPPED = re.compile(r"relative_position_index$|\.bn_tracking\.\d\.")
#: (pattern, replacement) from the authors' names to ours; every rule is applied, in this order.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.conv\.conv\.", ".conv."),
        (r"\.bn\.bn\.", ".bn."),
        (r"\.linear\.linear\.", ".linear."),
        (r"^classifier\.linear\.", "classifier."),
        (r"^last_conv\.final_expand_layer\.|^last_conv\.0\.", "final_expand."),
        (r"^last_conv\.feature_mix_layer\.conv\.|^last_conv\.2\.conv\.", "feature_mix."),
        (r"\.mobile_inverted_conv\.inverted_bottleneck\.", ".expand."),
        (r"\.mobile_inverted_conv\.depth_conv\.se\.fc\.", ".se."),
        (r"\.mobile_inverted_conv\.depth_conv\.", ".depthwise."),
        (r"\.mobile_inverted_conv\.point_linear\.", ".project."),
        (r"\.mobile_inverted_conv\.rescale$", ".rescale"),
        (r"\.attn\.proj_l\.", ".attn.before."),
        (r"\.attn\.proj_w\.", ".attn.after."),
        (r"\.attn\.relative_position_bias_table$", ".attn.table"),
        (r"\.attn\.(q|k|v|proj|before|after)\.linear\.", r".attn.\1."),
        (r"\.(mlp[12])\.(linear[12])\.linear\.", r".\1.\2."),
    )
]


def our_name(key: str, places: list[str]) -> str:
    """The name here of an entry that the authors call `key`; `places[i]` is that of block i."""
    if key.startswith("blocks."):
        _, number, rest = key.split(".", 2)
        key = f"{places[int(number)]}.{rest}"
    for pattern, replacement in _RULES:
        key = pattern.sub(replacement, key)
    return key


def _renamed(state: Mapping[str, Tensor], space: Space, config: Config) -> State:
    """Our names and shapes for a supernet's entries, or for those of an extracted `config`."""
    places = [block.name for block in space.blocks(config)]
    renamed = {}
    for key, value in state.items():
        if _DROPPED.search(key):
            continue
        name = our_name(key, places)
        if name.endswith(".table"):
            value = resize_table(value, 2 * space.window - 1)
        elif value.ndim == 4 and (".se." in name or name.startswith("feature_mix.")):
            value = value.flatten(1)  # a convolution of one pixel
        renamed[name] = value
    return renamed


def to_supernet(state: Mapping[str, Tensor]) -> State:
    """The released supernet under our names.

    Raises:
        ReplivitError: it is no checkpoint of that supernet.
    """
    if "stages.0.0.depthwise.conv.weight" in state:
        return dict(state)
    if "first_conv.conv.conv.weight" not in state:
        raise ReplivitError(
            "this is no checkpoint of NASViT's supernet: 'first_conv.conv.conv.weight' is missing"
            + ("; it holds one extracted network" if "first_conv.conv.weight" in state else "")
        )
    return _renamed(state, NASVIT, NASVIT.largest())


def to_subnet(state: Mapping[str, Tensor], config: Config, space: Space = NASVIT) -> State:
    """A dense network, from the supernet or from a network that the authors' code extracted.

    Raises:
        ReplivitError: it is neither; or it was extracted for another configuration.
    """
    if "stages.0.0.depthwise.conv.weight" in state:
        is_supernet = any(".rescale_attn" in key for key in state)
        return slice_state(state, space, config) if is_supernet else dict(state)
    if "first_conv.conv.conv.weight" in state:
        return slice_state(to_supernet(state), space, config)
    if "first_conv.conv.weight" not in state:
        raise ReplivitError(
            "this is no checkpoint of NASViT: it has neither 'first_conv.conv.conv.weight' (the "
            "supernet) nor 'first_conv.conv.weight' (an extracted network)"
        )
    return _of_extracted(state, config, space)


def _of_extracted(state: Mapping[str, Tensor], config: Config, space: Space) -> State:
    """The authors' extracted network: static layers as they are, transformer blocks sliced."""
    try:
        renamed = _renamed(state, space, config)
        made = slice_state(renamed, space, config)
    except (KeyError, IndexError) as error:
        raise ReplivitError(
            f"this network was extracted for another configuration than {config}"
        ) from error
    for name, value in made.items():
        static = renamed.get(name)
        if static is not None and static.shape != value.shape and ".attn." not in name and not (
            re.search(r"\.(norm|mlp)\d\.", name)
        ):  # fmt: skip
            raise ReplivitError(
                f"this network was extracted for another configuration than {config}: {name} is "
                f"{tuple(static.shape)}, not {tuple(value.shape)}"
            )
    return made


def resize_table(table: Tensor, length: int) -> Tensor:
    """A table of relative positions for another window: `(L * L, h) -> (length * length, h)`.

    The heads' images are resampled (bicubic), as the released loader does.
    """
    before = round(len(table) ** 0.5)
    if before == length:
        return table
    images = table.T.unflatten(1, (before, before))[None]
    resized = F.interpolate(images, size=(length, length), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.contiguous()


#: `to_<name>` of every named network: what paper.yaml refers to.
_CONVERTERS: dict[str, Callable[[Mapping[str, Tensor]], State]] = {
    f"to_{name}": partial(to_subnet, config=config) for name, config in named_configs().items()
}


def __getattr__(name: str) -> Callable[[Mapping[str, Tensor]], State]:
    if name in _CONVERTERS:
        return _CONVERTERS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
