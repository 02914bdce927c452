"""ATS against the dense DeiT and against the authors' code: one process, in alternation.

    python benchmarks/ats_versus.py                                    # against the dense parent
    git clone https://github.com/adaptivetokensampling/ATS
    python benchmarks/ats_versus.py --authors ATS --batch 1 8

Weights are normal with the variance of one over the fan-in, so that attention is not flat and
tokens are dropped; images are white noise. The bar: the default form reaches at least 85 % of the
ratio of multiply-adds, counted on the images that are timed, over the dense parent with fused
attention. The authors' code and its rebuild (mode `released`) are compared in their outputs first.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import types
import warnings
from pathlib import Path

import timm
import torch
from race import Table, check_names, passes, race_parser, relative_error, run, speedup, take_turns
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.measurement.macs import count_macs
from harness.measurement.yardstick import seeded_images
from reproductions.ats.conventions import macs_of_counts, tokens_in_blocks

BAR = 0.85
WIDTHS = {"deit_ti": (192, 3), "deit_s": (384, 6), "deit_b": (768, 12)}
LIMITS = (1.0, 0.7, 0.5)


def authors_model(checkout: Path, base: str) -> nn.Module:
    """Their `ViT` in the released configuration (tokens dropped, no limit), in evaluation mode.

    Raises:
        ReplivitError: `checkout` is not their repository.
    """
    folder = checkout / "libs" / "models" / "transformers"
    if not (folder / "vit.py").is_file():
        raise ReplivitError(f"{folder / 'vit.py'} is missing: is {checkout} their repository?")
    # their package imports a video framework that the network does not need
    package = types.ModuleType("authors_ats")
    package.__path__ = [str(folder.parent)]
    inner = types.ModuleType("authors_ats.transformers")
    inner.__path__ = [str(folder)]
    build = types.ModuleType("authors_ats.build")
    build.MODEL_REGISTRY = types.SimpleNamespace(register=lambda: lambda built: built)
    for module in (package, inner, build):
        sys.modules[module.__name__] = module
    # where timm kept these in 2021
    sys.modules.setdefault("timm.models.layers", timm.layers)
    sys.modules.setdefault("timm.models.registry", timm.models)
    width, heads = WIDTHS[base]
    settings = types.SimpleNamespace(
        IMG_SIZE=224, PATCH_SIZE=16, IN_CHANNELS=3, NUM_CLASSES=1000, EMBED_DIM=width, DEPTH=12,
        NUM_HEADS=heads, MLP_RATIO=4.0, QKV_BIAS=True, QK_SCALE=None, REPRESENTATION_SIZE=None,
        DROP_RATE=0.0, ATTN_DROP_RATE=0.0, DROP_PATH_RATE=0.0, HYBRID_BACKBONE=None,
        NORM_LAYER=None, ATS_BLOCKS=list(range(3, 12)), NUM_TOKENS=[197] * 12, DROP_TOKENS=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that timm has moved
        vit = importlib.import_module("authors_ats.transformers.vit")
    warnings.filterwarnings("ignore", message=".*deprecated")
    return vit.ViT(types.SimpleNamespace(VIT=settings)).eval()


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """Weights whose attention is far from uniform."""
    torch.manual_seed(0)
    for one in model.parameters():
        if one.ndim > 1:
            one.normal_(std=(one.numel() / len(one)) ** -0.5)
    return model.eval()


@torch.inference_mode()
def compare(base: str, batch: int, arguments: argparse.Namespace, table: Table) -> None:
    """The dense parent, all limits and, if asked for, the release and its rebuild take turns."""
    dense = lively(harness.build(base))
    state = dense.state_dict()
    models, images = {"dense": dense}, seeded_images(batch, 224, count=1)[0]
    whole, macs, errors = float(count_macs(dense, 224).total), {}, {}
    for limit in LIMITS:
        model = harness.load_official(f"ats_{base}", state, tokens=limit)
        counts = tokens_in_blocks(model, model.forward_with_tokens(images)[1])
        macs[f"ATS {limit:.0%}"] = float(macs_of_counts(model, counts).mean())
        models[f"ATS {limit:.0%}"] = model
    if arguments.authors is not None:
        theirs = authors_model(arguments.authors, base)
        theirs.load_state_dict(state, strict=False)  # their masks of zeros are missing
        ours = harness.load_official(f"ats_{base}", theirs.state_dict(), mode="released")
        models |= {"authors": _Logits(theirs), "released": ours}
        errors["released"] = relative_error(ours, models["authors"], images)
    warm_up = min(15.0, arguments.budget_s / 4)
    timings = take_turns(passes(models, images), arguments, warm_up_limit_s=warm_up)
    for name, own in timings.items():
        good, note, faster = True, "", speedup(own)
        if name in macs:
            ratio = whole / macs[name]
            good = faster.value / ratio >= BAR
            note = f"MACs {ratio:.2f}x, reached {faster.value / ratio:.0%}"
        if name == "released":
            note = f"{timings['authors'].median / own.median:.2f}x as fast as theirs"
        table.row(base, batch, name, own, error=errors.get(name), good=good, note=note)


class _Logits(nn.Module):
    """Their model answers with logits and an empty list."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answer = self.model(images)
        return answer[0] if isinstance(answer, tuple) else answer


def main() -> bool:
    parser = race_parser(__doc__, budget_s=60.0, batch=[8], authors="")
    parser.add_argument("bases", nargs="*", default=["deit_s"], help=", ".join(WIDTHS))
    parser.add_argument("--authors", type=Path, help="checkout of their repository")
    arguments = parser.parse_args()
    check_names(arguments.bases, WIDTHS, "base")
    table = Table()
    for base in arguments.bases:
        for batch in arguments.batch:
            compare(base, batch, arguments, table)
    return table.passed


if __name__ == "__main__":
    run(main)
