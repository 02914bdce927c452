"""DynamicViT: ours against the authors' code, evaluation and training step, in alternation.

The authors' modules are imported from your own checkout of their repository:

    git clone https://github.com/raoyongming/DynamicViT
    python benchmarks/dynamicvit_versus_authors.py --authors DynamicViT
    python benchmarks/dynamicvit_versus_authors.py --authors DynamicViT deit_s --batch 8 --only step

Both get the same weights, images and random numbers; logits and losses are compared first, since a
speed counts only for the same function. A training step is the student's and the teacher's forward
pass, the four losses, the backward pass and the update by each side's own AdamW. The dense DeiT
with fused attention runs beside them in evaluation, and DeiT-S has a bar against it at batch 8. A
training step costs the same at any keep ratio, so it is raced at the first one only.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import timm.layers
import torch
from race import Table, check_names, passes, race_parser, relative_error, run, speedup, take_turns
from torch import Tensor, nn

import harness
from harness.errors import ReplivitError
from harness.measurement.latency import Timing
from harness.measurement.yardstick import seeded_images
from harness.training import cross_entropy, freeze_teacher, read_recipe
from harness.training.optim import create_optimizer
from reproductions.dynamicvit.method import pruning_losses, teacher_answers

BAR = 1.1
#: Of DeiT-S at batch 8 against its dense parent, both as they are built: keep ratio -> speed-up.
PARENT_BARS = {0.7: 1.5, 0.9: 1.0}
WIDTHS = {"deit_ti": (192, 12, 3), "deit_256": (256, 12, 4), "deit_s": (384, 12, 6),
          "deit_b": (768, 12, 12), "lvvit_s": (384, 16, 6), "lvvit_m": (512, 20, 8)}  # fmt: skip
DENSE = {"deit_ti": "deit_ti", "deit_s": "deit_s", "deit_b": "deit_b"}
Losses = Callable[[Tensor, Tensor], dict[str, Tensor]]


def import_authors(checkout: Path) -> tuple[types.ModuleType, ...]:
    """Their modules `dyvit`, `dylvvit` and `losses`.

    Raises:
        ReplivitError: `checkout` is not their repository.
    """
    if not (checkout / "models" / "dyvit.py").is_file():
        raise ReplivitError(f"{checkout} is no checkout of the authors' code")
    # what their utils.py imports and these modules do not need, and where timm was in 2021
    for name, content in {"torch._six": {"inf": float("inf")},
                          "tensorboardX": {"SummaryWriter": None}}.items():  # fmt: skip
        sys.modules.setdefault(name, types.ModuleType(name)).__dict__.update(content)
    sys.modules.setdefault("timm.models.layers", timm.layers)
    sys.path.insert(0, str(checkout.resolve()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import losses
        from models import dylvvit, dyvit
    return dyvit, dylvvit, losses


def build_theirs(base: str, ratio: float, checkout: Path) -> tuple[nn.Module, nn.Module, Losses]:
    """Their student, their teacher with the same backbone, and their loss of (images, labels)."""
    dyvit, dylvvit, losses = import_authors(checkout)
    width, depth, heads = WIDTHS[base]
    shape = {"patch_size": 16, "embed_dim": width, "depth": depth, "num_heads": heads}
    ratios = [ratio, ratio**2, ratio**3]
    stages = {"pruning_loc": [depth // 4, depth // 2, 3 * depth // 4], "token_ratio": ratios,
              "distill": True}  # fmt: skip
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # they print as they go
        if base.startswith("lvvit"):
            shape |= {"mlp_ratio": 3.0, "p_emb": "4_2", "skip_lam": 2.0, "return_dense": True,
                      "mix_token": True}  # fmt: skip
            student = dylvvit.LVViTDiffPruning(**shape, **stages)
            teacher = dylvvit.LVViT_Teacher(**shape)
        else:
            shape |= {"mlp_ratio": 4, "qkv_bias": True}
            student = dyvit.VisionTransformerDiffPruning(**shape, **stages)
            teacher = dyvit.VisionTransformerTeacher(**shape)
        teacher.load_state_dict(student.state_dict(), strict=False)
        weight = 5.0 if base == "deit_b" else 2.0
        criterion = losses.DistillDiffPruningLoss_dynamic(
            teacher.eval(), nn.CrossEntropyLoss(), ratio_weight=weight, keep_ratio=ratios,
            clf_weight=1.0, mse_token=not base.startswith("lvvit"), print_mode=False,
        )  # fmt: skip

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return criterion(images, student(images), labels)[0]

    return student, teacher, loss


def our_loss(model: nn.Module) -> Losses:
    """The loss of (images, labels) as `DynamicViTObjective` computes it."""
    teacher = freeze_teacher(model.dense(), "cpu")

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        output = model(images)
        with torch.no_grad():
            answers = teacher_answers(teacher, images)
        return pruning_losses(
            output, answers, cross_entropy(output.logits, labels), model.keep_ratios,
            model.ratio_weight, kind=model.feature_loss,
        )["loss"]  # fmt: skip

    return loss


def evaluation(base: str, ratio: float, batch: int, checkout: Path) -> tuple[dict, float]:
    """Calls to time, and our relative error."""
    theirs = build_theirs(base, ratio, checkout)[0].eval()
    ours = harness.load_official(f"dynamicvit_{base}_k07", theirs.state_dict(), keep_ratio=ratio)
    models = {"theirs": theirs, "ours": ours, "deployed": harness.deploy(ours)}
    if base in DENSE:
        models["dense fused"] = harness.build(DENSE[base]).eval()
    images = seeded_images(batch, 224, count=1)[0]
    error = max(relative_error(models[name], theirs, images) for name in ("ours", "deployed"))
    return passes(models, images), error


def training_step(base: str, ratio: float, batch: int, checkout: Path) -> tuple[dict, float]:
    """Calls to time, and the relative difference of the losses under the same random numbers."""
    theirs, _, their_loss = build_theirs(base, ratio, checkout)
    name = f"dynamicvit_{base}_k07"
    ours = harness.load_official(name, theirs.state_dict(), keep_ratio=ratio)
    loss, images = our_loss(ours), seeded_images(batch, 224, count=1)[0]
    labels = torch.arange(batch) % 10
    theirs.train()
    ours.train()
    recipe = read_recipe("lvvit" if base.startswith("lvvit") else "deit", harness.get_variant(name))
    optimizers = {
        "theirs": torch.optim.AdamW(theirs.parameters(), lr=1e-6),
        "ours": create_optimizer(ours, recipe.changed(lr=1e-6)),
    }
    values = []
    for one in (their_loss, loss):
        torch.manual_seed(1)
        values.append(one(images, labels).item())

    @torch.inference_mode(False)  # which the instrument is in
    @torch.enable_grad()
    def step(which: str, of: Losses) -> None:
        torch.manual_seed(2)
        optimizers[which].zero_grad(set_to_none=True)
        of(images, labels).backward()
        optimizers[which].step()

    calls = {"theirs": lambda: step("theirs", their_loss), "ours": lambda: step("ours", loss)}
    return calls, abs(values[1] / values[0] - 1)


def main() -> bool:
    parser = race_parser(__doc__, budget_s=60.0)
    parser.add_argument("bases", nargs="*", default=["deit_s", "lvvit_s"], help=", ".join(WIDTHS))
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.7, 0.9])
    parser.add_argument("--only", choices=("eval", "step"), help="default: both")
    arguments = parser.parse_args()
    check_names(arguments.bases, WIDTHS, "base")
    races = [(evaluation, "eval", ratio) for ratio in arguments.ratio]
    races.append((training_step, "step", arguments.ratio[0]))
    table = Table()
    for base, batch, (race, what, ratio) in itertools.product(
        arguments.bases, arguments.batch, races
    ):
        if arguments.only in (None, what):
            calls, error = race(base, ratio, batch, arguments.authors)
            report(table, base, ratio, what, batch, take_turns(calls, arguments), error)
    return table.passed


def report(
    table: Table,
    base: str,
    ratio: float,
    what: str,
    batch: int,
    timings: dict[str, Timing],
    error: float,
) -> None:
    """A row for each competitor of one race, ours against their bars."""
    for name, own in timings.items():
        ours, note = name in ("ours", "deployed"), ""
        good = not ours or speedup(own).value >= BAR
        if name == "ours" and "dense fused" in timings:
            gain = timings["dense fused"].ratio / own.ratio
            note = f"{gain:.2f}x as fast as the dense parent"
            if (base, batch) == ("deit_s", 8):
                good = good and gain >= PARENT_BARS.get(ratio, 0.0)
        table.row(
            f"{base} {ratio:g} {what}", batch, name, own, error=error if ours else None,
            good=good, note=note,
        )  # fmt: skip


if __name__ == "__main__":
    run(main)
