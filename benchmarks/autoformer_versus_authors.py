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
import types
from pathlib import Path

import torch
from race import Table, check_names, passes, race_parser, relative_error, run, speedup, take_turns
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.measurement.yardstick import seeded_images
from reproductions.autoformer.space import PUBLISHED, SPACES, Config

BAR = 3.0


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


def compare(size: str, batch: int, arguments: argparse.Namespace, table: Table) -> None:
    """The four forms take turns; a row for each."""
    theirs = authors_supernet(arguments.authors, size)
    supernet = harness.load_official(f"autoformer_supernet_{size}", theirs.state_dict())
    supernet.set_config(PUBLISHED[size])
    dense = supernet.extract()
    dense.pretrained_cfg = harness.build(f"autoformer_{size}").pretrained_cfg
    models = {
        "theirs": theirs, "supernet": supernet, "extracted": dense,
        "deployed": harness.deploy(dense, 224),
    }  # fmt: skip
    images = seeded_images(batch, 224, count=1)[0]
    errors = {name: relative_error(models[name], theirs, images) for name in list(models)[1:]}
    for name, own in take_turns(passes(models, images), arguments).items():
        barred = (size, batch) == ("t", 1) and name in ("extracted", "deployed")
        good = not barred or speedup(own).value >= BAR
        table.row(f"autoformer_{size}", batch, name, own, error=errors.get(name), good=good)


def main() -> bool:
    parser = race_parser(__doc__, budget_s=20.0, authors="their folder AutoFormer")
    parser.add_argument("sizes", nargs="*", default=["t", "s"], help="of t, s, b")
    arguments = parser.parse_args()
    check_names(arguments.sizes, "tsb", "size")
    table = Table()
    for size in arguments.sizes:
        for batch in arguments.batch:
            compare(size, batch, arguments, table)
    return table.passed


if __name__ == "__main__":
    run(main)
