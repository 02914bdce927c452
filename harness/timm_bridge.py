"""Every variant as a timm model: `timm.create_model("replivit_<variant>")`."""

from __future__ import annotations

import sys
import types
from typing import Any

from timm.models import generate_default_cfgs, register_model

from harness import registry
from harness.registry import Variant

PREFIX = "replivit_"
_MODULE = "replivit_timm_models"


def _entry_point(variant: Variant):
    """timm's entry point: `(pretrained, num_classes, img_size, **overrides) -> nn.Module`."""

    def create(pretrained: bool = False, **kwargs: Any):
        from harness.checkpoints import load_pretrained

        for ignored in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(ignored, None)
        num_classes = kwargs.pop("num_classes", None)
        image_size = kwargs.pop("img_size", None)
        kwargs.pop("in_chans", None)
        if pretrained:
            return load_pretrained(
                variant.name, num_classes=num_classes, image_size=image_size, **kwargs
            )
        return registry.build(
            variant.name, num_classes=num_classes, image_size=image_size, **kwargs
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
