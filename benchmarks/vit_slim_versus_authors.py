"""ViT-Slim: ours against the authors' code and against the dense parent, in alternation.

The authors' modules are imported from your own checkout of their repository:

    git clone https://github.com/Arnav0400/ViT-Slim
    python benchmarks/vit_slim_versus_authors.py --authors ViT-Slim
    python benchmarks/vit_slim_versus_authors.py --authors ViT-Slim vit_slim_deit_ti --batch 8

Both get the same weights, masks and images; outputs are compared first, since a speed counts only
for the same function. Three questions:

- slim: the network cut to a budget, against the authors' masked form of the same budget and against
  the dense DeiT with fused attention. The bar: the gain over the dense parent is at least 85 % of
  the ratio of multiply-adds.
- search: the soft network in evaluation.
- step: an update of weights and masks, by each side's AdamW.
"""

from __future__ import annotations

import itertools
import sys
import types
import warnings
from functools import partial
from pathlib import Path

import timm.layers
import timm.models
import torch
from race import Table, check_names, passes, race_parser, relative_error, run, speedup, take_turns
from torch import Tensor, nn

import harness
from harness.errors import ReplivitError
from harness.measurement.latency import Timing
from harness.measurement.macs import count_macs
from harness.measurement.yardstick import seeded_images
from harness.training import cross_entropy, read_recipe
from harness.training.optim import create_optimizer
from reproductions.vit_slim.method import SparsitySearch
from reproductions.vit_slim.slimming import slim

#: Least share of the multiply-adds' ratio that the slimmed network gains over its dense parent.
SHARE = 0.85
FACTORIES = {
    "vit_slim_deit_ti": "deit_tiny_patch16_224",
    "vit_slim_deit_s": "deit_small_patch16_224",
    "vit_slim_deit_b": "deit_base_patch16_224",
}
PENALTY = (2e-4, 5e-5, 1e-4)


def import_authors(checkout: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """Their modules `models.model` and `losses`.

    Raises:
        ReplivitError: `checkout` is not their repository.
    """
    folder = checkout / "ViT-Slim"
    if not (folder / "models" / "base_model.py").is_file():
        raise ReplivitError(f"{checkout} is no checkout of the authors' code")
    # where timm was in 2021, and two of its helpers that they import and do not need
    registry = types.ModuleType("timm.models.registry")
    registry.register_model = lambda function: function
    helpers = types.ModuleType("timm.models.helpers")
    helpers.build_model_with_cfg = helpers.overlay_external_default_cfg = None
    sys.modules["timm.models.registry"], sys.modules["timm.models.helpers"] = registry, helpers
    sys.modules["timm.models.layers"] = timm.layers
    timm.layers.lecun_normal_ = getattr(timm.layers, "lecun_normal_", None)
    sys.path.insert(0, str(folder.resolve()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import losses
        from models import layers, model, vision_transformer
    vision_transformer.Mlp = layers.Mlp  # timm's has two dropouts by now, theirs reads one
    return model, losses


def build_pair(variant: str, checkout: Path) -> tuple[nn.Module, nn.Module, types.ModuleType]:
    """Their searchable network and ours with the same weights and spread masks; their losses."""
    module, losses = import_authors(checkout)
    torch.manual_seed(0)
    theirs = getattr(module, FACTORIES[variant])(method="search").eval()
    with torch.no_grad():
        for name, one in theirs.named_parameters():
            if name.endswith("zeta") and "patch" not in name:
                # heads and layers of their own size, as masks have after a search
                size = torch.empty(1, 1, one.shape[2], 1, 1) if one.dim() == 5 else torch.empty(1)
                one.copy_((0.5 + 0.3 * torch.randn_like(one)) * size.uniform_(0.4, 1.3))
            elif name.endswith("patch_zeta"):
                one.add_(torch.randn_like(one))
            elif name.startswith("head"):
                one.copy_(0.02 * torch.randn_like(one))
    return theirs, harness.load_official(variant, theirs.state_dict()), losses


def race_slim(budgets: tuple[float, ...], variant: str, batch: int, checkout: Path) -> tuple:
    """Calls, our error against their masked form, and the ratio of multiply-adds."""
    theirs, ours, _ = build_pair(variant, checkout)
    theirs.compress(*budgets)
    small = slim(ours, *budgets).eval()
    dense = harness.build(harness.get_variant(variant).spec.args["base"]).eval()
    models = {"dense": dense, "theirs masked": theirs, "ours": small,
              "ours deployed": harness.deploy(small)}  # fmt: skip
    images = seeded_images(batch, 224, count=1)[0]
    error = max(relative_error(models[one], theirs, images) for one in list(models)[2:])
    ratio = count_macs(dense, 224).total / count_macs(small, 224).total
    return passes(models, images), error, ratio


def race_search(variant: str, batch: int, checkout: Path) -> tuple:
    theirs, ours, _ = build_pair(variant, checkout)
    images = seeded_images(batch, 224, count=1)[0]
    models = {"theirs": theirs, "ours": ours, "ours deployed": harness.deploy(ours)}
    error = max(relative_error(models[one], theirs, images) for one in list(models)[1:])
    return passes(models, images), error, None


def race_step(variant: str, batch: int, checkout: Path) -> tuple:
    theirs, ours, losses = build_pair(variant, checkout)
    theirs.train()
    ours.train()
    images, labels = seeded_images(batch, 224, count=1)[0], torch.arange(batch) % 10
    criterion = losses.SearchingDistillationLoss(
        lambda _, logits, targets: cross_entropy(logits, targets), "cpu", *PENALTY
    )
    wrapped = types.SimpleNamespace(module=theirs)  # it reads the network out of a wrapper
    objective = SparsitySearch(*PENALTY)
    recipe = read_recipe("search", harness.get_variant(variant)).changed(lr=1e-6)

    def their_loss() -> Tensor:
        return criterion(images, theirs(images), labels, wrapped)

    def our_loss() -> Tensor:
        return cross_entropy(ours(images), labels) + objective.penalty(ours)

    sides = {
        "theirs": (their_loss, torch.optim.AdamW(theirs.parameters(), lr=1e-6, weight_decay=1e-3)),
        "ours": (our_loss, create_optimizer(ours, recipe)),
    }
    values = [loss().item() for loss, _ in sides.values()]

    @torch.inference_mode(False)  # the instrument times without autograd
    @torch.enable_grad()
    def step(name: str) -> None:
        loss, optimizer = sides[name]
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    calls = {name: (lambda name=name: step(name)) for name in sides}
    return calls, abs(values[1] / values[0] - 1), None


def report(
    table: Table, what: str, batch: int, timings: dict[str, Timing], error: float,
    ratio: float | None,
) -> None:  # fmt: skip
    """A row for each competitor; the bar is set at batch 8."""
    for name, own in timings.items():
        ours, gain, good, note = name.startswith("ours"), speedup(own).value, True, ""
        if ours and ratio is not None:
            note = f"{gain / ratio:.0%} of the MACs ratio {ratio:.2f}"
            good = batch != 8 or gain >= SHARE * ratio
        table.row(what, batch, name, own, error=error if ours else None, good=good, note=note)


def main() -> bool:
    parser = race_parser(__doc__, budget_s=60.0)
    parser.add_argument("variants", nargs="*", default=["vit_slim_deit_s"])
    parser.add_argument("--budgets", type=float, nargs=3, default=[0.6, 0.6, 1.0],
                        metavar=("ATTENTION", "MLP", "TOKENS"))  # fmt: skip
    parser.add_argument("--only", choices=("slim", "search", "step"), help="default: all")
    arguments = parser.parse_args()
    check_names(arguments.variants, FACTORIES, "variant of the authors")
    races = {"slim": partial(race_slim, arguments.budgets), "search": race_search,
             "step": race_step}  # fmt: skip
    table = Table()
    for variant, batch in itertools.product(arguments.variants, arguments.batch):
        for what in [arguments.only] if arguments.only else races:
            calls, error, ratio = races[what](variant, batch, arguments.authors)
            timings = take_turns(calls, arguments)
            report(table, f"{variant} {what}", batch, timings, error, ratio)
    return table.passed


if __name__ == "__main__":
    run(main)
