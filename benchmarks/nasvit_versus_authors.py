"""NASViT: ours against the authors' code, extracted networks and training step, in alternation.

The authors' modules are imported from your own checkout of their repository (needs `yacs`):

    git clone https://github.com/facebookresearch/NASViT
    python benchmarks/nasvit_versus_authors.py --authors NASViT
    python benchmarks/nasvit_versus_authors.py --authors NASViT f208 --batch 8 --only eval

Both get the same weights and images; logits and losses are compared first, since a speed counts
only for the same function. An extracted network has to run at least 1.3 times as fast as the
authors' in its dense form and in its deployment form. A training step, of the largest network, the
smallest and two random ones, has to be no slower; teachers are replaced by fixed answers on both
sides.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from race import Table, check_names, passes, race_parser, relative_error, run, speedup, take_turns
from torch import Tensor, nn

import harness
from harness.errors import ReplivitError
from harness.measurement.yardstick import seeded_images
from harness.training import cross_entropy
from reproductions.nasvit.gradients import combine, take_gradients
from reproductions.nasvit.losses import adaptive_divergence, soft_targets
from reproductions.nasvit.named import named_configs
from reproductions.nasvit.space import Config

BARS = {"eval": 1.3, "step": 1.0}
#: What a step trains beside the largest network.
BESIDE = ("min", "f421", "f757")
Call = Callable[[], object]


def import_authors(checkout: Path) -> types.SimpleNamespace:
    """Their model factory, loss and optimizer wrapper.

    Raises:
        ReplivitError: `checkout` is not their repository.
    """
    if not (checkout / "misc" / "constrain_opt.py").is_file():
        raise ReplivitError(f"{checkout} is no checkout of the authors' repository")
    if str(checkout.resolve()) not in sys.path:
        sys.path.insert(0, str(checkout.resolve()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from misc.config import _C
        from misc.constrain_opt import Constraint
        from misc.loss_ops import AdaptiveLossSoft
        from models.model_factory import create_model
    return types.SimpleNamespace(
        config=_C, create=create_model, Constraint=Constraint, Loss=AdaptiveLossSoft
    )


def their_supernet(authors: types.SimpleNamespace) -> nn.Module:
    """Their supernet with layer scales that let the transformer branches matter."""
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it prints itself
        warnings.simplefilter("ignore")
        net = authors.create(authors.config, arch="attentive_nas_dynamic_model")
    with torch.no_grad():
        for name, one in net.named_parameters():
            if "rescale_" in name:
                one.normal_(1, 0.1)
            if name.endswith("point_linear.bn.bn.weight"):
                one.fill_(0.5)
    return net


def set_theirs(net: nn.Module, config: Config) -> nn.Module:
    """Set a configuration in the authors' words."""
    net.set_active_subnet(**{key: value if isinstance(value, int) else list(value)
                             for key, value in config.as_dict().items()})  # fmt: skip
    return net


def evaluation(name: str, batch: int, checkout: Path) -> tuple[dict[str, Call], float]:
    """Calls to time, and our relative error."""
    config = named_configs()[name]
    theirs = their_supernet(import_authors(checkout))
    net = harness.load_official("nasvit_supernet", theirs.state_dict())
    models = {"theirs": copy.deepcopy(set_theirs(theirs, config).get_active_subnet()).eval()}
    models["dense"] = net.extract(config).eval()
    models["deployed"] = harness.deploy(models["dense"], 224)
    images = seeded_images(batch, config.resolution, count=1)[0]
    theirs = models["theirs"]
    error = max(relative_error(models[one], theirs, images) for one in ("dense", "deployed"))
    return passes(models, images), error


def training_step(name: str, batch: int, checkout: Path) -> tuple[dict[str, Call], float]:
    """Calls to time, and the largest relative difference of the losses. `name` is not used: a step
    trains the largest network and those of `BESIDE`."""
    authors = import_authors(checkout)
    theirs = their_supernet(authors).train()
    ours = harness.load_official("nasvit_supernet", theirs.state_dict()).train()
    configs = [named_configs()[one] for one in BESIDE]
    largest = named_configs()["max"]
    images = seeded_images(batch, 224, count=1)[0]
    target = soft_targets([torch.randn(batch, 1000) for _ in range(2)])
    loss = authors.Loss(alpha_min=-1.0, alpha_max=1.0)
    wrapped = authors.Constraint(theirs.parameters(), torch.optim.AdamW, lr=1e-6, weight_decay=0.0)
    wrapped.proj_student = False
    parameters = [one for one in ours.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def step_theirs() -> Tensor:
        logits, _ = set_theirs(theirs, largest)(images)
        losses = [cross_entropy(logits, target)]
        losses[0].backward()
        wrapped.first_step(zero_grad=True)
        answers = logits.clone().detach()
        for config in configs:
            output, _ = set_theirs(theirs, config)(images)
            losses.append(loss(output, answers))
            losses[-1].backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        wrapped.second_step(zero_grad=True)
        return torch.stack(losses).detach()

    @torch.inference_mode(False)
    @torch.enable_grad()
    def step_ours() -> Tensor:
        logits = ours.set_config(largest)(images)
        losses = [cross_entropy(logits, target)]
        losses[0].backward()
        held, answers = take_gradients(parameters), logits.detach()
        for config in configs:
            output = ours.set_config(config)(images)
            losses.append(adaptive_divergence(output, answers).loss.mean())
            losses[-1].backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        made = combine(held, [one.grad for one in parameters])
        for one, gradient in zip(parameters, made, strict=True):
            one.grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).detach()

    wanted, found = step_theirs(), step_ours()
    return {"theirs": step_theirs, "ours": step_ours}, float((found / wanted - 1).abs().max())


def main() -> bool:
    parser = race_parser(__doc__, budget_s=60.0)
    parser.add_argument("networks", nargs="*", default=["min", "f421"],
                        help=", ".join(named_configs()))  # fmt: skip
    parser.add_argument("--only", choices=("eval", "step"), help="default: both")
    arguments = parser.parse_args()
    check_names(arguments.networks, named_configs(), "network")
    races = []
    if arguments.only != "step":
        pairs = itertools.product(arguments.networks, arguments.batch)
        races += [("eval", evaluation, name, batch) for name, batch in pairs]
    if arguments.only != "eval":  # batch norms need two
        races.append(("step", training_step, "step", max(2, arguments.batch[-1])))
    table = Table()
    for what, race, network, batch in races:
        calls, error = race(network, batch, arguments.authors)
        for name, own in take_turns(calls, arguments).items():
            ours = name != "theirs"
            table.row(
                network, batch, name, own, error=error if ours else None,
                good=not ours or speedup(own).value >= BARS[what],
            )  # fmt: skip
    return table.passed


if __name__ == "__main__":
    run(main)
