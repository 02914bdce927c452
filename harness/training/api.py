"""`train`: from a variant's name or a module to a trained model with records."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor, nn

from harness import data, registry
from harness.checkpoints import file_sha256, load_weights, save_weights
from harness.data import TRACKS, ImageDataset, Track, load_split
from harness.environment import capture, home
from harness.errors import ReplivitError
from harness.evaluation import evaluate as score
from harness.evaluation import model_input
from harness.record import Conditions, Record, make_record, new_run_id, read_records
from harness.registry import Variant
from harness.training.callbacks import Callback
from harness.training.context import Context
from harness.training.loading import Batches, Order
from harness.training.log import write_history
from harness.training.objective import CrossEntropy, Objective
from harness.training.recipe import Recipe, resolve_recipe
from harness.training.state import claim, state_sha256, write_whole
from harness.training.trainer import Trainer

WEIGHTS, WEIGHTS_EMA = "weights.safetensors", "weights_ema.safetensors"
RECORDS = "records.jsonl"
_DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
#: Recipe fields that do not change what comes out.
NOT_IDENTITY = {"name", "summary", "extends", "workers"}


@dataclass(frozen=True)
class TrainedModel:
    """What a run leaves.

    Attributes:
        model: the module in evaluation mode, on the device it was trained on.
        directory: the run's directory: weights, records, logs and checkpoint.
        weights: the weights' safetensors file.
        records: top1, top5, train_time, images_seen (empty on processes other than the main one).
        history: a row per epoch, as in `log.csv`.
    """

    model: nn.Module
    directory: Path
    weights: Path
    records: list[Record]
    history: list[dict[str, Any]]

    def value(self, metric: str) -> float | int | None:
        """The value of one of the records."""
        return next((one.value for one in self.records if one.metric == metric), None)


def train(
    variant: str | nn.Module,
    track: str,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    seed: int = 0,
    *,
    objective: Objective | None = None,
    callbacks: Sequence[Callback] = (),
    out: str | Path | None = None,
    init: str | Path | Mapping[str, Tensor] | None = None,
    freeze: Sequence[str] = (),
    hold_out: int = 0,
    epochs: int | None = None,
    device: str | None = None,
    root: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
    evaluate: bool = True,
    checkpoint_steps: int = 0,
    checkpoint_minutes: float = 5.0,
    quiet: bool = False,
) -> TrainedModel:
    """Train a model on a track's training split and score it on its test split.

    The run lives in a directory. The same call finds it again: a run that was killed goes on where
    its last checkpoint stands and ends, on a CPU, in the same bits; a finished one is read back.

    Args:
        variant: a variant's name, or a module (a method's own; trained in place).
        recipe: a `Recipe`, a recipe's name or file, or a mapping of single values over the recipe
            it `extends`, else over the default: the paper's own on its track, else the protocol.
        objective: what the method optimises; default the variant's own, else `CrossEntropy`. A
            new one for every run.
        out: the run's directory; default `training/<name>/<track>/seed<seed>-<digest>` at home.
        init: weights to start from, a file or a state dict; what does not fit (another head) stays
            as built, and the run says so.
        freeze: patterns (fnmatch) of parameters that stay as they are.
        hold_out: training images to leave out, for a search to look at (`harness.data.hold_out`).
        epochs: overrides the recipe's.
        device: "cpu" or "cuda"; default CUDA where there is one.
        root: where the data lie (else `REPLIVIT_DATA`, ...).
        image_size: input side(s) in pixels; default the variant's, for a module the track's.
        options: overrides of the variant's builder. For a module: what two of them may differ in
            though their weights start alike; it is part of what the run is found by.
        name: how records call a module; default its class.
        evaluate: whether to score the result.

    Raises:
        ReplivitError: unknown name, recipe or data; a directory that holds another run; a loss
            that is not finite; a disk that is full.
    """
    if seed < 0:
        raise ReplivitError(f"a seed is 0 or more, not {seed}")
    chosen = registry.get_variant(variant) if isinstance(variant, str) else None
    dataset = _training_images(str(track), root) if track in TRACKS else load_split(track, "train")
    if hold_out:
        dataset, _ = data.hold_out(dataset, hold_out)
    recipe = _recipe(recipe, chosen, track, dataset.track, epochs, device)
    if objective is None:
        objective = _default_objective(recipe, chosen)
    accelerator = _accelerator(recipe, device, objective)

    set_seed(seed)
    model = variant
    if chosen is not None:
        model = _build(chosen, len(dataset.classes), image_size, recipe, options)
    spec, size = model_input(model, dataset.track, image_size)
    note = _start_from(model, init) if init is not None else None
    _freeze(model, freeze)

    label = chosen.name if chosen else name or type(model).__name__.lower()
    identity = {
        "name": label,
        "options": dict(options or {}),
        "track": str(track),
        "data": dataset.fingerprint,
        "image_size": list(size),
        "recipe": recipe.model_dump(mode="json", exclude=NOT_IDENTITY),
        "seed": seed,
        "frozen": list(freeze),
        "initial_weights": state_sha256(model.state_dict()),
        "objective": objective.identity(),
        "callbacks": [own for one in callbacks if (own := one.identity()) is not None],
    }
    directory = Path(out) if out is not None else default_directory(label, identity)
    if accelerator.is_main_process:
        claim(directory, identity)
    accelerator.wait_for_everyone()

    order = Order(
        len(dataset), recipe, seed, accelerator.process_index, accelerator.num_processes
    )  # fmt: skip
    context = Context(
        model=model, recipe=recipe, accelerator=accelerator, seed=seed, track=str(track),
        num_classes=len(dataset.classes), image_size=size, input=spec,
        steps_per_epoch=order.steps, directory=directory, root=root, name=label,
        starts_trained=init is not None,
    )  # fmt: skip
    trainer = Trainer(
        context, Batches(dataset, order, spec, size, accelerator.device), objective, callbacks,
        checkpoint_steps=checkpoint_steps, checkpoint_minutes=checkpoint_minutes,
        quiet=quiet, note=note,
    )  # fmt: skip
    started = datetime.now(timezone.utc)
    trainer.run()
    special = {"starts_trained": init is not None, "frozen": list(freeze), "held_out": hold_out}
    records = _finish(trainer, identity, chosen, started, evaluate, special)
    return TrainedModel(context.model, directory, directory / WEIGHTS, records, trainer.history)


# before the run


@functools.lru_cache(maxsize=2)
def _training_images(track: str, root: str | Path | None) -> ImageDataset:
    """A track's training split; kept, since experiments train many small models in a row."""
    return load_split(track, "train", root=root)


def _default_objective(recipe: Recipe, variant: Variant | None) -> Objective:
    own = variant.hook("objective") if variant else None
    if own is not None:
        return own()
    if recipe.distillation != "none":
        raise ReplivitError(
            f"recipe {recipe.name} distils ({recipe.distillation}) and needs a teacher; give one, "
            "or set distillation=none"
        )
    return CrossEntropy()


def _recipe(
    recipe: Recipe | Mapping[str, Any] | str | Path | None,
    variant: Variant | None,
    track: str,
    about: Track | None,
    epochs: int | None,
    device: str | None,
) -> Recipe:
    protocol = dict(about.protocol) if about else {}
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and "epochs_gpu" in protocol:  # a longer protocol where it is affordable
        protocol["epochs"] = protocol["epochs_gpu"]
    found = resolve_recipe(recipe, variant, track, protocol)
    return found if epochs is None else found.changed(epochs=epochs)


def _accelerator(recipe: Recipe, device: str | None, objective: Objective) -> Accelerator:
    """An accelerator for this run alone: accelerate keeps the settings of the first one for the
    whole process, and refuses others, unless that state is dropped."""
    if device not in (None, "cpu", "cuda"):
        raise ReplivitError(f"device {device!r} is unknown; it is cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ReplivitError("no CUDA device is available; use --device cpu")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if recipe.mixed_precision == "fp16" and on_cpu:
        raise ReplivitError("fp16 needs a CUDA device, where losses are scaled; use bf16 or no")
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    AcceleratorState._reset_state(reset_partial_state=alone)
    unused = DistributedDataParallelKwargs(find_unused_parameters=objective.find_unused_parameters)
    return Accelerator(
        cpu=device == "cpu", mixed_precision=recipe.mixed_precision, kwargs_handlers=[unused]
    )


def _build(
    variant: Variant,
    num_classes: int,
    image_size: int | tuple[int, int] | None,
    recipe: Recipe,
    options: Mapping[str, Any] | None,
) -> nn.Module:
    settings = dict(options or {})
    if recipe.drop_path is not None:
        settings.setdefault("drop_path_rate", recipe.drop_path)
    return registry.build(variant.name, num_classes, image_size, **settings)


def _start_from(model: nn.Module, init: str | Path | Mapping[str, Tensor]) -> str:
    """Load what fits of `init`; returns a sentence about it."""
    coverage = load_weights(model, init, strict=False)
    if not coverage.matched:
        raise ReplivitError(f"nothing of the initial weights fits the model: {coverage}")
    return f"starts from {coverage}"


def _freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    names = dict(model.named_parameters())
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ReplivitError(f"freeze: {pattern!r} matches no parameter")
        for name in found:
            names[name].requires_grad_(False)


def default_directory(name: str, identity: Mapping[str, Any]) -> Path:
    """A directory of its own for every different run: `training/<name>/<track>/seed0-1f0c9a27`."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    track = Path(str(identity["track"])).name
    return home() / "training" / name / track / f"seed{identity['seed']}-{digest[:8]}"


# after the run


def _finish(
    trainer: Trainer,
    identity: Mapping[str, Any],
    variant: Variant | None,
    started: datetime,
    evaluate: bool,
    special: Mapping[str, Any],
) -> list[Record]:
    """Write weights, logs and records once; a finished run only reads them back."""
    context = trainer.context
    model = trainer.result()
    if not context.accelerator.is_main_process:
        context.accelerator.wait_for_everyone()
        return []
    weights, file = context.directory / WEIGHTS, context.directory / RECORDS
    records = list(read_records(file)) if file.exists() else []
    if not records or (evaluate and all(one.metric != "top1" for one in records)):
        write_history(context.directory, trainer.history)
        metadata = {
            "variant": context.name, "track": context.track, "seed": context.seed,
            "recipe": context.recipe.name, "commit": capture().commit,
        }  # fmt: skip
        save_weights(model, weights, metadata=metadata)
        if trainer.ema is not None and not context.recipe.ema_final:
            save_weights(trainer.ema.module, context.directory / WEIGHTS_EMA, metadata=metadata)
        records = _records(trainer, identity, variant, started, evaluate, special)
        write_whole(file, "".join(one.model_dump_json() + "\n" for one in records).encode())
    context.accelerator.wait_for_everyone()
    return records


def _records(
    trainer: Trainer,
    identity: Mapping[str, Any],
    variant: Variant | None,
    started: datetime,
    evaluate: bool,
    special: Mapping[str, Any],
) -> list[Record]:
    context, run_id = trainer.context, new_run_id()
    sha256 = file_sha256(context.directory / WEIGHTS)
    conditions = Conditions(
        device=context.device.type, threads=torch.get_num_threads(),
        batch_size=context.recipe.batch_size, dtype=_DTYPES[context.recipe.mixed_precision],
        image_size=context.side if isinstance(context.side, int) else None,
        num_classes=context.num_classes,
        track=context.track, data_fingerprint=identity["data"], weights_sha256=sha256,
        seed=context.seed, options=identity["options"],
    )  # fmt: skip
    paper = variant.paper.key if variant else None
    training = {
        "recipe": context.recipe.model_dump(mode="json", exclude={"extends"}),
        "objective": identity["objective"],
        "initial_weights": identity["initial_weights"],
        "images_seen": context.images_seen,
        "seconds": round(trainer.seconds, 3),
        **{key: value for key, value in special.items() if value},  # silent of what is usual
    }
    common = {
        "run_id": run_id, "paper": paper, "started": started, "duration_s": trainer.seconds,
        "detail": training,
    }  # fmt: skip
    records = [
        make_record(context.name, "train_time", trainer.seconds, conditions,
                    method="seconds of training steps, over all restarts", **common),
        make_record(context.name, "images_seen", context.images_seen, conditions,
                    method="training images shown", **common),
    ]  # fmt: skip
    if not evaluate:
        return records
    scored = score(
        context.model, context.track, root=context.root, device=context.device, run_id=run_id,
        image_size=context.side, options=identity["options"], name=context.name,
    )  # fmt: skip
    for one in scored:
        stamped = one.conditions.model_copy(update={"seed": context.seed, "weights_sha256": sha256})
        records.append(one.model_copy(update={
            "variant": context.name, "paper": paper, "conditions": stamped,
            "detail": {**one.detail, "training": training},
        }))  # fmt: skip
    return records
