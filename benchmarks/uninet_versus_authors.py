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

import argparse
import contextlib
import importlib
import io
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import harness
from harness.errors import ReplivitError
from harness.measurement.side_by_side import time_models
from harness.measurement.yardstick import seeded_images
from reproductions.uninet.model import ARCHITECTURES

RELATIVE_ERROR = 1e-5
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


@torch.inference_mode()
def relative_error(model: nn.Module, reference: nn.Module, images: Tensor) -> float:
    """||model - reference|| / ||reference|| of the outputs."""
    wanted = reference(images)
    return float((model(images) - wanted).norm() / wanted.norm())


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--uninet", type=Path, required=True, help="the authors' checkout")
    parser.add_argument("sizes", nargs="*", default=["b0", "b1"], help=f"of {', '.join(SIZES)}")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1, help="one is timed by its CPU time")
    parser.add_argument("--budget-s", type=float, default=20.0, help="seconds per race")
    parser.add_argument("--training", action="store_true", help="training steps instead")
    arguments = parser.parse_args()
    passed = True
    try:
        theirs = load_theirs(arguments.uninet.resolve())
        for size in arguments.sizes:
            if size not in SIZES:
                raise ReplivitError(f"no size {size!r}; there are {', '.join(SIZES)}")
            models = build(size, theirs)
            side = models["ours"].image_size[0]
            probe = seeded_images(2, side, count=1)[0]
            errors = {name: relative_error(one, models["theirs"], probe)
                      for name, one in models.items()}  # fmt: skip
            bar = TRAINING_BAR if arguments.training else BAR
            if arguments.training:
                del models["deployed"]
                models = {name: TrainingStep(one) for name, one in models.items()}
            for batch in arguments.batch:
                images = seeded_images(batch, side, count=1)
                timings = time_models(
                    models, images, threads=arguments.threads, budget_s=arguments.budget_s
                )
                for name, own in timings.items():
                    if name == "theirs":
                        continue
                    low, high = (1 / bound for bound in reversed(own.ratio_interval))
                    same = errors[name] <= RELATIVE_ERROR
                    passed = passed and same and 1 / own.ratio >= bar
                    print(
                        f"{size} {'training' if arguments.training else 'inference':9} "
                        f"batch {batch:3} {name:9} {1e3 * own.median:8.2f} ms  "
                        f"{1 / own.ratio:5.2f}x theirs ({low:.2f} to {high:.2f}, "
                        f"{own.ratio_status}; bar {bar:g})  error {errors[name]:.0e}"
                        + ("" if same else "  NOT THE SAME FUNCTION")
                        + ("" if 1 / own.ratio >= bar else "  BELOW THE BAR"),
                        flush=True,
                    )
    except ReplivitError as error:
        sys.exit(f"error: {error}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
