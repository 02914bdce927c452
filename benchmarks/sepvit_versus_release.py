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

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm.layers
import torch
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.measurement.latency import Timing
from harness.measurement.side_by_side import time_models
from harness.measurement.yardstick import seeded_images

FILE = "classification/sepvit.py"
#: Our variant -> their factory.
FACTORIES = {
    f"sepvit_{size.lower()}": f"SepViT_{size}" for size in ("Lite", "Tiny", "Small", "Base")
}
#: Batch -> least speed-up; other batches are printed without a bar.
BARS = {1: 1.0, 8: 1.15}
RELATIVE_ERROR = 1e-5


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


@torch.inference_mode()
def relative_error(model: nn.Module, reference: nn.Module, images: torch.Tensor) -> float:
    """||model - reference|| / ||reference|| of the outputs."""
    wanted = reference(images)
    return float((model(images) - wanted).norm() / wanted.norm())


def report(variant: str, batch: int, name: str, timing: Timing, error: float) -> bool:
    """Print one row; returns whether form, speed and equality are as they should be."""
    low, high = (1 / bound for bound in reversed(timing.ratio_interval))
    speedup, bar = 1 / timing.ratio, BARS.get(batch, 0.0)
    # at batch 1 "not slower" is meant: the interval may not lie below one
    good = (high if bar == 1.0 else speedup) >= bar and error <= RELATIVE_ERROR
    print(
        f"{variant:13} batch {batch:3} {name:9} {1e3 * timing.median:8.2f} ms  "
        f"{speedup:5.2f}x theirs ({low:.2f} to {high:.2f}, {timing.ratio_status})  "
        f"error {error:.0e}  {'ok' if good else 'BELOW THE BAR'}",
        flush=True,
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", type=Path, required=True, help="their checkout")
    parser.add_argument("variants", nargs="*", default=["sepvit_lite", "sepvit_tiny"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1, help="one is timed by its CPU time")
    parser.add_argument("--budget-s", type=float, default=40.0, help="seconds per race")
    arguments = parser.parse_args()
    passed = True
    try:
        theirs = load_theirs(arguments.authors)
        for variant in arguments.variants:
            if variant not in FACTORIES:
                raise ReplivitError(f"no race known for {variant}; known: {', '.join(FACTORIES)}")
            models = build(variant, theirs)
            for batch in arguments.batch:
                images = seeded_images(batch, 224, count=1)
                errors = {name: relative_error(models[name], models["theirs"], images[0])
                          for name in ("ours", "deployed")}  # fmt: skip
                timings = time_models(
                    models, images, threads=arguments.threads, budget_s=arguments.budget_s
                )
                print(f"{variant:13} batch {batch:3} theirs    "
                      f"{1e3 * timings['theirs'].median:8.2f} ms")  # fmt: skip
                for name, error in errors.items():
                    passed = report(variant, batch, name, timings[name], error) and passed
    except ReplivitError as error:
        sys.exit(f"error: {error}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
