"""Every variant as a timm model: `timm.create_model("replivit_<variant>")`."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from harness import registry
from harness.registry import Variant

PREFIX = "replivit_"
_MODULE = "replivit_timm_models"

#: timm's own bookkeeping of pretrained weights, which has no meaning here.
_UNUSED = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
#: What timm's scripts pass to every model. A builder without such an option still does what they
#: say; with any other value it is an unknown option.
_DEFAULTS = {"in_chans": 3, "drop_rate": 0.0}


def _entry_point(variant: Variant) -> Callable[..., nn.Module]:
    """timm's entry point: `(pretrained, num_classes, img_size, **overrides) -> nn.Module`."""

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from harness.checkpoints import load_pretrained

        options = {name: value for name, value in kwargs.items() if name not in _UNUSED}
        known = inspect.signature(variant.paper.resolve(variant.spec.build)).parameters
        for name, value in _DEFAULTS.items():
            if name not in known and options.get(name) == value:
                del options[name]
        make = load_pretrained if pretrained else registry.build
        return make(
            variant.name,
            num_classes=options.pop("num_classes", None),
            image_size=options.pop("img_size", None),
            **options,
        )

    create.__name__ = create.__qualname__ = PREFIX + variant.name
    create.__module__ = _MODULE
    create.__doc__ = variant.spec.summary or f"{variant.name} of {variant.paper.key}"
    return create


def register_all() -> None:
    """Offer all variants to timm (only YAML is read; models are imported when built)."""
    module = sys.modules.setdefault(_MODULE, types.ModuleType(_MODULE))
    module.__all__ = []
    chosen = registry.variants()
    module.default_cfgs = generate_default_cfgs(
        {
            PREFIX + one.name: registry.pretrained_cfg(
                one, one.spec.num_classes, one.spec.image_size
            )
            for one in chosen
        }
    )
    for variant in chosen:
        register_model(_entry_point(variant))
