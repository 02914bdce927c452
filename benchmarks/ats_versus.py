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
import time
import types
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.measurement.latency import Timing, time_callables
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
def race(
    base: str, batch: int, checkout: Path | None, budget_s: float, clock
) -> tuple[dict[str, Timing], dict[str, float], float | None]:
    """Timings (ratios to the dense parent), multiply-adds per image, and the relative error of the
    rebuilt release."""
    dense = lively(harness.build(base))
    state = dense.state_dict()
    models, images = {"dense": dense}, seeded_images(batch, 224, count=1)[0]
    macs = {"dense": float(count_macs(dense, 224).total)}
    for limit in LIMITS:
        model = harness.load_official(f"ats_{base}", state, tokens=limit)
        counts = tokens_in_blocks(model, model.forward_with_tokens(images)[1])
        macs[f"ATS {limit:.0%}"] = float(macs_of_counts(model, counts).mean())
        models[f"ATS {limit:.0%}"] = model
    error = None
    if checkout is not None:
        theirs = authors_model(checkout, base)
        theirs.load_state_dict(state, strict=False)  # their masks of zeros are missing
        ours = harness.load_official(f"ats_{base}", theirs.state_dict(), mode="released")
        models |= {"authors": _Logits(theirs), "released": ours}
        wanted = models["authors"](images)
        error = float((ours(images) - wanted).norm() / wanted.norm())
    calls = {name: (lambda model=model: model(images)) for name, model in models.items()}
    effort = {"budget_s": budget_s, "warm_up_limit_s": min(15.0, budget_s / 4)}
    return time_callables(calls, clock=clock, **effort), macs, error


class _Logits(nn.Module):
    """Their model answers with logits and an empty list."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answer = self.model(images)
        return answer[0] if isinstance(answer, tuple) else answer


def report(
    base: str, batch: int, timings: dict[str, Timing], macs: dict[str, float], error: float | None
) -> bool:
    """Print a row per form; returns whether the bars are met."""
    passed = True
    for name, timing in timings.items():
        low, high = (1 / bound for bound in reversed(timing.ratio_interval))
        row = f"{base:8} {batch:5} {name:9} {1e3 * timing.median:9.1f} {1 / timing.ratio:7.2f}x  "
        row += f"{low:.2f} to {high:.2f}"
        if name in macs:
            ratio = macs["dense"] / macs[name]
            share = 1 / timing.ratio / ratio
            row += f"  MACs {ratio:.2f}x, reached {share:.0%}"
            if name != "dense" and high / ratio < BAR:
                passed, row = False, row + "  BELOW THE BAR"
        print(f"{row}  {timing.ratio_status}", flush=True)
    if error is not None:
        ours = timings["authors"].median / timings["released"].median
        print(f"  rebuilt release: {ours:.2f}x as fast as theirs, relative error {error:.0e}")
        passed = passed and error <= 1e-5
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bases", nargs="*", default=["deit_s"], help=", ".join(WIDTHS))
    parser.add_argument("--authors", type=Path, help="checkout of their repository")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=60.0, help="seconds per race")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that is not quiet")
    arguments = parser.parse_args()
    for base in arguments.bases:
        if base not in WIDTHS:
            parser.error(f"no base {base!r}; there are {', '.join(WIDTHS)}")
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    passed = True
    try:
        for base in arguments.bases:
            for batch in arguments.batch:
                found = race(base, batch, arguments.authors, arguments.budget_s, clock)
                passed = report(base, batch, *found) and passed
    except ReplivitError as error:
        sys.exit(f"error: {error}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
