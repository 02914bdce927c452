"""Our SepViT against the released code: the same weights, in one process, in alternation.

The authors' file is imported from your own checkout of their repository, with stand-ins for what
timm has moved or changed since 0.3.2:

    git clone https://github.com/liwei109/SepViT
    python benchmarks/sepvit_versus_release.py --authors SepViT --batch 1 8

Outputs are compared first: a speed counts only for the same function. Three forms take turns:
theirs, ours, ours deployed. The bar: at least 1.15 times as fast at batch 8, never slower at
batch 1.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import timm.layers
import torch
from race import Table, check_names, race_parser, relative_error, run, speedup
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.measurement.side_by_side import time_models
from harness.measurement.yardstick import seeded_images

FILE = "classification/sepvit.py"
#: Our variant -> their factory.
FACTORIES = {
    f"sepvit_{size.lower()}": f"SepViT_{size}" for size in ("Lite", "Tiny", "Small", "Base")
}
#: Batch -> least speed-up; other batches are printed without a bar.
BARS = {1: 1.0, 8: 1.15}


class _OldBlock(nn.Module):
    """What their block inherits of timm 0.3.2's: two norms, stochastic depth and the MLP."""

    def __init__(
        self, dim, num_heads, mlp_ratio=4.0, qkv_bias=False, qk_scale=None, drop=0.0, attn_drop=0.0,
        drop_path=0.0, act_layer=nn.GELU, norm_layer=nn.LayerNorm,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.attn = nn.Identity()  # they replace it
        self.drop_path = timm.layers.DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp = timm.layers.Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)


@contextmanager
def _old_names() -> Iterator[None]:
    """The modules of timm 0.3.2 that their file imports, for as long as it is imported."""
    contents = {
        "timm.models.layers": vars(timm.layers),
        "timm.models.registry": {"register_model": lambda function: function},
        "timm.models.vision_transformer": {"Block": _OldBlock, "_cfg": dict},
    }
    before = {name: sys.modules.get(name) for name in contents}
    for name, names in contents.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(
            {key: value for key, value in names.items() if not key.startswith("__")}
        )
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load_theirs(checkout: Path) -> ModuleType:
    """Their module.

    Raises:
        ReplivitError: no such file in the checkout.
    """
    path = checkout / FILE
    if not path.is_file():
        raise ReplivitError(f"{path} is missing: is {checkout} a checkout of liwei109/SepViT?")
    spec = importlib.util.spec_from_file_location("released_sepvit", path)
    module = importlib.util.module_from_spec(spec)
    with _old_names():
        spec.loader.exec_module(module)
    return module


def build(variant: str, theirs: ModuleType) -> dict[str, nn.Module]:
    """All forms of a variant with the same random weights."""
    torch.manual_seed(0)
    original = getattr(theirs, FACTORIES[variant])().eval()
    for name, parameter in original.named_parameters():
        if name.endswith("win_tokens"):  # at zero they would hide a token in the wrong place
            nn.init.normal_(parameter)
    ours = harness.load_official(variant, original.state_dict())
    return {"theirs": original, "ours": ours, "deployed": harness.deploy(ours)}


def main() -> bool:
    parser = race_parser(__doc__, budget_s=40.0, cpu_time=False)
    parser.add_argument("variants", nargs="*", default=["sepvit_lite", "sepvit_tiny"])
    arguments = parser.parse_args()
    check_names(arguments.variants, FACTORIES, "variant of the release")
    theirs = load_theirs(arguments.authors)
    table = Table()
    for variant in arguments.variants:
        models = build(variant, theirs)
        for batch in arguments.batch:
            images = seeded_images(batch, 224, count=1)
            errors = {name: relative_error(models[name], models["theirs"], images[0])
                      for name in ("ours", "deployed")}  # fmt: skip
            timings = time_models(
                models, images, threads=arguments.threads, budget_s=arguments.budget_s
            )
            for name, own in timings.items():
                bar, faster = BARS.get(batch, 0.0), speedup(own)
                # at batch 1 "not slower" is meant: the interval may not lie below one
                good = name == "theirs" or (faster.high if bar == 1 else faster.value) >= bar
                table.row(variant, batch, name, own, error=errors.get(name), good=good)
    return table.passed


if __name__ == "__main__":
    run(main)
