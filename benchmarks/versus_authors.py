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
import warnings
from pathlib import Path

import timm.layers
import torch
from race import Table, check_names, passes, race_parser, relative_error, run, speedup, take_turns
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.measurement.yardstick import seeded_images

#: variant -> file in the authors' repository, function that builds the model.
BUILDERS = {
    **{f"efficientformer_{size}": ("models/efficientformer.py", f"efficientformer_{size}")
       for size in ("l1", "l3", "l7")},
    **{f"efficientformer_v2_{size}": ("models/efficientformer_v2.py", f"efficientformerv2_{size}")
       for size in ("s0", "s1", "s2", "l")},
}  # fmt: skip
DEPLOY_BAR = 1.2


def authors_model(checkout: Path, variant: str) -> nn.Module:
    """The authors' model with its own random initialisation, in eval mode.

    Raises:
        ReplivitError: no such file in the checkout.
    """
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


def compare(variant: str, batch: int, arguments: argparse.Namespace, table: Table) -> None:
    """Theirs, ours and ours deployed take turns; a row for each."""
    theirs = authors_model(arguments.authors, variant)
    ours = harness.load_official(variant, theirs.state_dict())
    models = {"theirs": theirs, "ours": ours, "deployed": harness.deploy(ours)}
    images = seeded_images(batch, harness.get_variant(variant).spec.image_size, count=1)[0]
    errors = {name: relative_error(models[name], theirs, images) for name in ("ours", "deployed")}
    for name, own in take_turns(passes(models, images), arguments).items():
        faster = speedup(own)
        good = faster.value >= DEPLOY_BAR if name == "deployed" else faster.high >= 1
        table.row(variant, batch, name, own, error=errors.get(name), good=good)


def main() -> bool:
    parser = race_parser(__doc__, budget_s=20.0)
    parser.add_argument("variants", nargs="*", default=list(BUILDERS))
    arguments = parser.parse_args()
    check_names(arguments.variants, BUILDERS, "variant of the authors")
    table = Table()
    for variant in arguments.variants:
        for batch in arguments.batch:
            compare(variant, batch, arguments, table)
    return table.passed


if __name__ == "__main__":
    run(main)
