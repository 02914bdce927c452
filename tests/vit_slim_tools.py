"""The mask fills of ViT-Slim's fixtures, and networks filled by them."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from golden_tools import fill_value, load_golden
from timm.models.vision_transformer import VisionTransformer

import harness
from reproductions.vit_slim.masks import make_searchable

VARIANTS = {"deit_tiny": "vit_slim_deit_ti", "deit_small": "vit_slim_deit_s"}
LAYOUTS = ("head_search", "uniform_search")


def mask_value(key: str, shape: tuple[int, ...], layers: int) -> np.ndarray:
    """Rule zm-v1 for one mask, in float64."""
    rs = np.random.RandomState(zlib.crc32(key.encode()))
    if key.endswith("patch_zeta"):
        layer = int(key.split(".")[1])
        values = (1.5 + rs.standard_normal(shape)) * (1.3 - 0.9 * layer / (layers - 1))
        values[0, 0, 0] = 3.0
        return values
    values = 0.5 + 0.3 * rs.standard_normal(shape)
    gains = (1, 1, shape[2], 1, 1) if ".attn." in key else (1, 1, 1)
    return values * rs.uniform(0.4, 1.3, gains)


def filled_state(entries: list, masks: str = "zm-v1") -> dict[str, torch.Tensor]:
    """Weights by rs-v1, masks by `zm-v1`, `rs-v1` or left out (`initial`)."""
    layers = 1 + max(int(name.split(".")[1]) for name, *_ in entries if name.startswith("blocks."))
    state = {}
    for name, shape, _ in entries:
        if name.endswith("zeta") and masks == "initial":
            continue
        by_rule = name.endswith("zeta") and masks == "zm-v1"
        value = mask_value(name, tuple(shape), layers) if by_rule else fill_value(name, shape)
        state[name] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return state


def micro(dtype: torch.dtype = torch.float32, **layout: bool) -> VisionTransformer:
    """The fixtures' deit_micro with masks at their constants."""
    config = load_golden("vit_slim/deit_micro")["config"]
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=config["img_size"], patch_size=config["patch"], embed_dim=config["embed_dim"],
        depth=config["depth"], num_heads=config["heads"], num_classes=10,
    )  # fmt: skip
    return make_searchable(model.to(dtype), **layout).eval()


def filled(name: str, masks: str = "zm-v1", **layout: bool) -> VisionTransformer:
    """A fixture's network with its weights and masks, in evaluation mode."""
    entries = load_golden(f"vit_slim/{name}")["state_dict"]
    if name in VARIANTS:
        return harness.load_official(VARIANTS[name], filled_state(entries, masks))
    model = micro(**layout)
    if layout:  # the fixture lists the default layout's shapes
        entries = [[key, list(value.shape), "float32"] for key, value in model.state_dict().items()]
    model.load_state_dict(filled_state(entries, masks), strict=masks != "initial")
    return model


@torch.no_grad()
def network_of(fixture: str, case: dict[str, Any]) -> VisionTransformer:
    """The network of one case, with the changes of its masks that the case describes."""
    name = case["name"]
    masks = {"soft_rs_v1": "rs-v1", "soft_initial_masks": "initial", "plain_deit": "initial"}
    layout = {one: True for one in LAYOUTS if name.startswith(one)}
    model = filled(fixture, masks.get(name, "zm-v1"), **layout)
    if name == "edge_dead_head_mlp_attention":
        model.blocks[0].attn.zeta[:, :, 1] = -5
        model.blocks[1].mlp.zeta[:] = -5
        model.blocks[2].attn.zeta[:] = -5
    elif name == "edge_cls_masked_in_deep_layers":
        for layer, block in enumerate(model.blocks):
            block.attn.patch_zeta[0, 0, 0] = 1.0 - 0.6 * layer
    elif name == "edge_signed_sort":
        for block in model.blocks:
            block.attn.zeta[..., ::2] *= -1
            block.mlp.zeta[..., ::3] *= -1
    return model
