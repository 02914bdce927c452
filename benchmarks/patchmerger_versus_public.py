"""Our PatchMerger ViT against vit-pytorch's: the same weights, in one process, in alternation.

The authors of the paper released no code; vit-pytorch has the layout nearest to theirs. It is
imported from your own checkout and needs `einops`:

    git clone https://github.com/lucidrains/vit-pytorch
    python benchmarks/patchmerger_versus_public.py --vit-pytorch vit-pytorch --batch 1 8

Outputs are compared first: a speed counts only for the same function. Three forms take turns:
theirs, ours, ours deployed; behind them the dense parent of ours, for the gain of merging. The bar:
neither of ours is slower than theirs beyond what the measurement can tell.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from race import Table, check_names, race_parser, relative_error, run, speedup
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.measurement.side_by_side import time_models
from harness.measurement.yardstick import seeded_images

FILE = "vit_pytorch/vit_with_patch_merger.py"
#: Our variant -> width and heads of theirs.
SIZES = {"patchmerger_vit_ti": (192, 3), "patchmerger_vit_s": (384, 6)}


def load_theirs(checkout: Path) -> ModuleType:
    """Their module.

    Raises:
        ReplivitError: no such file in the checkout, or `einops` is missing.
    """
    path = checkout / FILE
    if not path.is_file():
        raise ReplivitError(f"{path} is missing: is {checkout} a checkout of vit-pytorch?")
    spec = importlib.util.spec_from_file_location("vit_with_patch_merger", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ReplivitError(f"vit-pytorch needs a package that is not here: {error}") from error
    return module


def build(variant: str, theirs: ModuleType) -> dict[str, nn.Module]:
    """All forms of a variant with the same random weights; the dense parent has its own."""
    dim, heads = SIZES[variant]
    torch.manual_seed(0)
    original = theirs.ViT(
        image_size=224, patch_size=16, num_classes=1000, dim=dim, depth=12, heads=heads,
        mlp_dim=4 * dim,
    ).eval()  # fmt: skip
    ours = harness.load_official(variant, original.state_dict())
    dense = harness.build(variant, layers=()).eval()
    return {"theirs": original, "ours": ours, "deployed": harness.deploy(ours), "dense": dense}


def main() -> bool:
    parser = race_parser(__doc__, budget_s=20.0, authors="", cpu_time=False)
    parser.add_argument("--vit-pytorch", type=Path, required=True, help="their checkout")
    parser.add_argument("variants", nargs="*", default=list(SIZES))
    arguments = parser.parse_args()
    check_names(arguments.variants, SIZES, "variant of theirs")
    theirs = load_theirs(arguments.vit_pytorch)
    table = Table()
    for variant in arguments.variants:
        models = build(variant, theirs)
        for batch in arguments.batch:
            images = seeded_images(batch, 224, count=1)
            timings = time_models(
                models, images, threads=arguments.threads, budget_s=arguments.budget_s
            )
            for name, own in timings.items():
                error, good = None, True
                if name in ("ours", "deployed"):
                    error = relative_error(models[name], models["theirs"], images[0])
                    good = speedup(own).high >= 1
                table.row(variant, batch, name, own, error=error, good=good)
    return table.passed


if __name__ == "__main__":
    run(main)
