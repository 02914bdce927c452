"""Our UniNet against the authors' code: the same weights, in one process, in alternation.

The authors' code is imported from your own checkout, unchanged; it runs on today's torch and timm:

    git clone https://github.com/Sense-X/UniNet
    python benchmarks/uninet_versus_authors.py --uninet UniNet --batch 1 8
    python benchmarks/uninet_versus_authors.py --uninet UniNet --batch 8 --training

Outputs are compared first: a speed counts only for the same function. Theirs, ours and ours
deployed take turns; the bar is 1.3 times theirs. With `--training`, training steps (forward, loss,
backward) of theirs and ours take turns; ours shall be no slower.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path
from types import ModuleType

import torch
from race import Table, check_names, race_parser, relative_error, run, speedup
from torch import Tensor, nn

import harness
from harness.errors import ReplivitError
from harness.measurement.side_by_side import time_models
from harness.measurement.yardstick import seeded_images
from reproductions.uninet.model import ARCHITECTURES

BAR, TRAINING_BAR = 1.3, 1.0
SIZES = [name for name in ARCHITECTURES if name != "micro"]


def load_theirs(checkout: Path) -> ModuleType:
    """Their module `uninet`.

    Raises:
        ReplivitError: no such file in the checkout, or it does not import.
    """
    if not (checkout / "uninet.py").is_file():
        raise ReplivitError(f"{checkout / 'uninet.py'} is missing: is it a checkout of UniNet?")
    sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module("uninet")
    except ImportError as error:
        raise ReplivitError(f"the authors' code does not import: {error}") from error
    finally:
        sys.path.remove(str(checkout))


def build(size: str, theirs: ModuleType) -> dict[str, nn.Module]:
    """Theirs, ours and ours deployed, with the same random weights.

    Branches that start at zero are given weight, or an error in them could not be seen.
    """
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # their factories print
        original = getattr(theirs, f"UniNet{size.upper()}")().eval()
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if "gamma_" in name or name.endswith("b2.5.weight"):
                parameter.normal_(0.2, 0.05)
        for module in original.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    ours = harness.load_official(f"uninet_{size}", original.state_dict())
    return {"theirs": original, "ours": ours, "deployed": harness.deploy(ours)}


class TrainingStep(nn.Module):
    """Forward, loss and backward of one batch, as something to call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.train().requires_grad_(True)

    def forward(self, images: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self.model.zero_grad(set_to_none=True)
            labels = torch.arange(len(images)) % 1000
            nn.functional.cross_entropy(self.model(images.clone()), labels).backward()


def main() -> bool:
    parser = race_parser(__doc__, budget_s=20.0, authors="", cpu_time=False)
    parser.add_argument("--uninet", type=Path, required=True, help="the authors' checkout")
    parser.add_argument("sizes", nargs="*", default=["b0", "b1"], help=f"of {', '.join(SIZES)}")
    parser.add_argument("--training", action="store_true", help="training steps instead")
    arguments = parser.parse_args()
    check_names(arguments.sizes, SIZES, "size")
    theirs = load_theirs(arguments.uninet.resolve())
    bar = TRAINING_BAR if arguments.training else BAR
    what = "training" if arguments.training else "inference"
    table = Table()
    for size in arguments.sizes:
        models = build(size, theirs)
        side = models["ours"].image_size[0]
        probe = seeded_images(2, side, count=1)[0]
        errors = {name: relative_error(models[name], models["theirs"], probe)
                  for name in ("ours", "deployed")}  # fmt: skip
        if arguments.training:
            del models["deployed"]
            models = {name: TrainingStep(one) for name, one in models.items()}
        for batch in arguments.batch:
            timings = time_models(
                models, seeded_images(batch, side, count=1), threads=arguments.threads,
                budget_s=arguments.budget_s,
            )  # fmt: skip
            for name, own in timings.items():
                good = name == "theirs" or speedup(own).value >= bar
                table.row(f"{size} {what}", batch, name, own, error=errors.get(name), good=good)
    return table.passed


if __name__ == "__main__":
    run(main)
