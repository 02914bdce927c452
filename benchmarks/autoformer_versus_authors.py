"""AutoFormer: ours against the authors' sliced supernet, the same weights, in alternation.

The authors' modules are imported from your own checkout of their repository:

    git clone https://github.com/microsoft/Cream
    python benchmarks/autoformer_versus_authors.py --authors Cream/AutoFormer
    python benchmarks/autoformer_versus_authors.py --authors Cream/AutoFormer s b --batch 8

Four forms of a published subnet take turns: the authors' supernet with the configuration set, our
supernet likewise, the extracted dense subnet, and that in its deployment form. Outputs are compared
first: a speed counts only for the same function. The bar is that the extracted subnet of
AutoFormer-T runs at least three times as fast as the authors' forward at batch 1.
"""

from __future__ import annotations

import argparse
import collections.abc
import sys
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.measurement.latency import time_callables
from harness.measurement.yardstick import seeded_images
from reproductions.autoformer.space import PUBLISHED, SPACES, Config

BAR = 3.0
RELATIVE_ERROR = 1e-5


def authors_supernet(checkout: Path, size: str) -> nn.Module:
    """Their supernet with the options of all their scripts, in eval mode, at the published subnet.

    Raises:
        ReplivitError: no such file in the checkout.
    """
    if not (checkout / "model" / "supernet_transformer.py").is_file():
        raise ReplivitError(f"{checkout} is no checkout of the authors' folder AutoFormer")
    # their code was written for a torch that still had this module
    shim = types.ModuleType("torch._six")
    shim.container_abcs = collections.abc
    sys.modules.setdefault("torch._six", shim)
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from model.supernet_transformer import Vision_TransformerSuper

    space = SPACES[size]
    torch.manual_seed(0)
    net = Vision_TransformerSuper(
        img_size=224, patch_size=16, num_classes=1000, embed_dim=space.super_dim,
        depth=space.super_depth, num_heads=space.super_heads, mlp_ratio=space.super_ratio,
        qkv_bias=True, drop_path_rate=0.1, gp=True, relative_position=True, change_qkv=True,
        max_relative_position=space.max_distance,
    )  # fmt: skip
    return set_theirs(net.eval(), PUBLISHED[size])


def set_theirs(net: nn.Module, config: Config) -> nn.Module:
    """Set a configuration in the authors' words."""
    net.set_sample_config(
        {
            "layer_num": config.depth,
            "embed_dim": [config.embed_dim] * config.depth,
            "mlp_ratio": list(config.mlp_ratios),
            "num_heads": list(config.num_heads),
        }
    )
    return net


@torch.inference_mode()
def relative_error(model: nn.Module, reference: nn.Module, images: torch.Tensor) -> float:
    """||model - reference|| / ||reference|| of the outputs."""
    wanted = reference(images)
    return float((model(images) - wanted).norm() / wanted.norm())


def race(size: str, checkout: Path, batch: int, budget_s: float, clock) -> bool:
    """Time the four forms and print a row for each of ours; returns whether the bar is met."""
    theirs = authors_supernet(checkout, size)
    supernet = harness.load_official(f"autoformer_supernet_{size}", theirs.state_dict())
    supernet.set_config(PUBLISHED[size])
    dense = supernet.extract()
    dense.pretrained_cfg = harness.build(f"autoformer_{size}").pretrained_cfg
    models = {
        "theirs": theirs, "supernet": supernet, "extracted": dense,
        "deployed": harness.deploy(dense, 224),
    }  # fmt: skip
    images = seeded_images(batch, 224, count=1)[0]
    errors = {name: relative_error(model, theirs, images) for name, model in models.items()}
    calls = {name: (lambda model=model: model(images)) for name, model in models.items()}
    with torch.inference_mode():
        timings = time_callables(calls, budget_s=budget_s, clock=clock)
    met = True
    for name in ("supernet", "extracted", "deployed"):
        own = timings[name]
        low, high = (1 / bound for bound in reversed(own.ratio_interval))
        good = errors[name] <= RELATIVE_ERROR
        if (size, batch) == ("t", 1) and name != "supernet":
            good = good and 1 / own.ratio >= BAR
        met = met and good
        print(
            f"autoformer_{size}  {batch:5} {name:9} {1e3 * timings['theirs'].median:9.2f} "
            f"{1e3 * own.median:9.2f} {1 / own.ratio:7.2f}x  {low:.2f} to {high:.2f}  "
            f"{errors[name]:.0e}  {own.ratio_status:9}  {'ok' if good else 'BELOW THE BAR'}",
            flush=True,
        )
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", type=Path, required=True, help="their folder AutoFormer")
    parser.add_argument("sizes", nargs="*", default=["t", "s"], choices=["t", "s", "b"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget-s", type=float, default=20.0, help="seconds per race")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that is not quiet")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print("variant       batch form       theirs ms   ours ms  speed-up  interval  error")
    met = [
        race(size, arguments.authors, batch, arguments.budget_s, clock)
        for size in arguments.sizes
        for batch in arguments.batch
    ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ReplivitError as error:
        sys.exit(f"error: {error}")
