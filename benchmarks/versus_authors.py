"""Ours against the authors' code: the same weights, in one process, in alternation.

The authors' module is imported from your own checkout of their repository:

    git clone https://github.com/snap-research/EfficientFormer
    python benchmarks/versus_authors.py --authors EfficientFormer
    python benchmarks/versus_authors.py --authors EfficientFormer efficientformer_v2_s0 --batch 8

For each variant and batch size three forms take turns: theirs (eager), ours (eager), ours deployed.
Outputs are compared first: a speed counts only for the same function.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm.layers
import torch
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.measurement.latency import Timing, time_callables
from harness.measurement.yardstick import seeded_images

#: variant -> file in the authors' repository, function that builds the model.
BUILDERS = {
    **{f"efficientformer_{size}": ("models/efficientformer.py", f"efficientformer_{size}")
       for size in ("l1", "l3", "l7")},
    **{f"efficientformer_v2_{size}": ("models/efficientformer_v2.py", f"efficientformerv2_{size}")
       for size in ("s0", "s1", "s2", "l")},
}  # fmt: skip
DEPLOY_BAR = 1.2
RELATIVE_ERROR = 1e-5


def authors_model(checkout: Path, variant: str) -> nn.Module:
    """The authors' model with its own random initialisation, in eval mode.

    Raises:
        ReplivitError: no such file in the checkout, or no builder known for the variant.
    """
    if variant not in BUILDERS:
        raise ReplivitError(
            f"no authors' builder known for {variant}; known: {', '.join(BUILDERS)}"
        )
    file, function = BUILDERS[variant]
    path = checkout / file
    if not path.is_file():
        raise ReplivitError(f"{path} is missing: is {checkout} a checkout of the authors' code?")
    # their code was written for a timm that kept its layers below timm.models
    sys.modules.setdefault("timm.models.layers", timm.layers)
    sys.modules.setdefault("timm.models.layers.helpers", timm.layers.helpers)
    spec = importlib.util.spec_from_file_location(f"authors_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # timm's register_model looks it up there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that timm has moved, or now has itself
        spec.loader.exec_module(module)
    torch.manual_seed(0)
    return getattr(module, function)(pretrained=False).eval()


@torch.inference_mode()
def relative_error(model: nn.Module, reference: nn.Module, images: torch.Tensor) -> float:
    """||model - reference|| / ||reference|| of the outputs."""
    wanted = reference(images)
    return float((model(images) - wanted).norm() / wanted.norm())


def race(
    variant: str, checkout: Path, batch: int, budget_s: float, clock
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Timings of theirs, ours and ours deployed (ratios to theirs), and ours' relative errors."""
    theirs = authors_model(checkout, variant)
    ours = harness.load_official(variant, theirs.state_dict())
    models = {"theirs": theirs, "ours": ours, "deployed": harness.deploy(ours)}
    images = seeded_images(batch, harness.get_variant(variant).spec.image_size, count=1)[0]
    errors = {name: relative_error(models[name], theirs, images) for name in ("ours", "deployed")}
    calls = {name: (lambda model=model: model(images)) for name, model in models.items()}
    return time_callables(calls, budget_s=budget_s, clock=clock), errors


def report(variant: str, batch: int, timings: dict[str, Timing], errors: dict[str, float]) -> bool:
    """Print one row per form of ours; returns whether all bars are met."""
    passed = True
    for name, error in errors.items():
        own = timings[name]
        low, high = (1 / bound for bound in reversed(own.ratio_interval))
        speedup = 1 / own.ratio
        good = speedup >= DEPLOY_BAR if name == "deployed" else high >= 1
        good = good and error <= RELATIVE_ERROR
        passed = passed and good
        print(
            f"{variant:22} {batch:5} {name:9} {1e3 * timings['theirs'].median:9.2f} "
            f"{1e3 * own.median:9.2f} {speedup:7.2f}x  {low:.2f} to {high:.2f}  {error:.0e}  "
            f"{own.ratio_status:9}  {'ok' if good else 'BELOW THE BAR'}",
            flush=True,
        )
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", type=Path, required=True, help="checkout of their repository")
    parser.add_argument("variants", nargs="*", default=list(BUILDERS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=20.0, help="seconds per race")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that is not quiet")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print(
        f"{'variant':22} {'batch':>5} {'ours':9} {'theirs ms':>9} {'ours ms':>9} {'faster':>8}  "
        "95 %          error  status"
    )
    passed = True
    try:
        for variant in arguments.variants:
            for batch in arguments.batch:
                found = race(variant, arguments.authors, batch, arguments.budget_s, clock)
                passed = report(variant, batch, *found) and passed
    except ReplivitError as error:
        sys.exit(f"error: {error}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
