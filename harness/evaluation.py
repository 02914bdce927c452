"""Top-1 and top-5 of a model on a track's whole test split, one bit kept per image."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from harness import registry
from harness.checkpoints import file_sha256, load_model, load_weights, read_metadata
from harness.data import (
    AugmentedDataset,
    ImageDataset,
    Track,
    create_transform,
    get_track,
    input_spec,
    load_split,
    preprocessing_sha256,
)
from harness.deployment import deploy
from harness.errors import ReplivitError
from harness.paper import InputSpec
from harness.record import Conditions, Record, bits_of, make_record, new_run_id
from harness.statistics import wilson_interval

__all__ = ["Hits", "bits_of", "evaluate", "model_input", "variant_of"]

#: Forms in which a model can be evaluated: of those it is timed in, the ones for any batch size.
BACKENDS = ("eager", "deploy", "compile", "deploy+compile")
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
Size = tuple[int, int]


@dataclass(frozen=True)
class Subject:
    """A model and what its records must say of it."""

    model: nn.Module
    name: str
    paper: str | None
    image_size: Size
    input: InputSpec
    weights_sha256: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Hits:
    """One bit per image, `(N,)` bool: was the right class first, or among the first five."""

    top1: np.ndarray
    top5: np.ndarray
    seconds: float


def evaluate(
    module_or_name: nn.Module | str,
    track: str | Path | Track | ImageDataset,
    *,
    split: str = "test",
    root: Path | str | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    limit: int | None = None,
    weights: Path | str | None = None,
    run_id: str | None = None,
    dtype: str = "float32",
    backend: str = "eager",
    image_size: int | Size | None = None,
    workers: int | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Measure top-1 and top-5 in percent, each with its Wilson 95 % interval.

    Args:
        module_or_name: a variant's name (with `weights`, or the ones shipped for the track), or
            a module `(B, 3, H, W) -> (B, num_classes)`; it is left on its device, in its mode.
        track: a track, or whatever `load_split` takes, or a data set.
        split, root: as in `load_split`.
        device: "cpu", "cuda", "cuda:1", ...
        limit: only that many images, spread evenly over the split; noted in the conditions'
            options, so that a slice never passes for the whole.
        weights: file to load first.
        dtype: "float32", or "bfloat16" / "float16" for automatic mixed precision.
        backend: "eager"; "deploy" for the deployment form, whose outputs are the same to 1e-5 and
            which is up to twice as fast; "compile" or "deploy+compile".
        image_size: in pixels; the variant's own, or the track's for a foreign module.
        workers: loader processes; none for images kept in memory, else up to four.
        options: overrides of a variant's builder.
        name: what the records call a module that is no variant.
        progress: called with (images done, images in all).

    Returns:
        The records `top1` and, with more than five classes, `top5`. `detail` holds the bits
        (see `bits_of`), n, the data set's name and the throughput, loading included.

    Raises:
        ReplivitError: no data, no weights, a number of classes that does not fit, logits that
            are not finite, an image that cannot be decoded, a model that cannot be deployed.
    """
    if dtype not in DTYPES:
        raise ReplivitError(f"dtype {dtype!r} is unknown; it is {', '.join(DTYPES)}")
    if backend not in BACKENDS:
        raise ReplivitError(f"backend {backend!r} is unknown here; it is {', '.join(BACKENDS)}")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ReplivitError("batch size and limit must be at least 1")
    device = _device(device)
    dataset = track if isinstance(track, ImageDataset) else load_split(track, split, root)
    overrides = dict(options or {})
    if isinstance(module_or_name, str):
        subject = _variant_subject(module_or_name, dataset, weights, image_size, overrides)
    else:
        subject = _module_subject(module_or_name, dataset, weights, image_size, name)
    _check_classes(subject, dataset, getattr(subject.model, "num_classes", None))
    chosen = _spread(len(dataset), limit)
    if len(chosen) < len(dataset):
        overrides["limit"] = len(chosen)
    if dataset.split != "test":
        overrides["split"] = dataset.split
    started = datetime.now(timezone.utc)
    loader = _loader(subject, dataset, chosen, batch_size, workers, device)
    subject = _in_form(subject, backend)
    hits = _run(subject, dataset, loader, device, DTYPES[dtype], progress)
    conditions = Conditions(
        device=device.type,
        backend=backend,
        dtype=dtype,
        image_size=subject.image_size[0] if len(set(subject.image_size)) == 1 else None,
        num_classes=len(dataset.classes),
        track=dataset.track.name if dataset.track else dataset.name,
        data_fingerprint=dataset.fingerprint,
        weights_sha256=subject.weights_sha256,
        preprocessing_sha256=preprocessing_sha256(subject.input, subject.image_size),
        seed=subject.seed,
        options=overrides,
    )
    detail = {
        "data": dataset.name,
        "split": dataset.split,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "images_per_second": round(len(chosen) / hits.seconds, 1),
    }
    common = {
        "run_id": run_id or new_run_id(),
        "paper": subject.paper,
        "started": started,
        "duration_s": hits.seconds,
    }
    counted = {"top1": hits.top1}
    if len(dataset.classes) > 5:  # of five classes or fewer, top-5 is always right
        counted["top5"] = hits.top5
    return [
        _record(subject.name, metric, bits, conditions, detail, common)
        for metric, bits in counted.items()
    ]


def _record(
    name: str,
    metric: str,
    bits: np.ndarray,
    conditions: Conditions,
    detail: dict[str, Any],
    common: dict[str, Any],
) -> Record:
    right, count = int(bits.sum()), len(bits)
    low, high = wilson_interval(right, count)
    packed = base64.b64encode(np.packbits(bits).tobytes()).decode()
    return make_record(
        name, metric, 100 * right / count, conditions,
        interval=(100 * low, 100 * high), n=count, method="share of images; Wilson 95 %",
        detail={**detail, "n": count, "bits": packed}, **common,
    )  # fmt: skip


def _variant_subject(
    name: str,
    dataset: ImageDataset,
    weights: Path | str | None,
    image_size: int | Size | None,
    options: dict[str, Any],
) -> Subject:
    variant = registry.get_variant(name)
    track = dataset.track.name if dataset.track else None
    path = weights or variant.weights_file(track)
    if path is None:
        raise ReplivitError(
            f"{variant.name} ships no weights for {track or dataset.name}; name a file of weights"
        )
    model = load_model(variant.name, path, image_size=image_size, **options)
    seed = read_metadata(path).get("seed", "")
    return Subject(
        model, variant.name, variant.paper.key, _pair(image_size or variant.spec.image_size),
        input_spec(variant, track), file_sha256(path), int(seed) if seed.isdigit() else None,
    )  # fmt: skip


def _module_subject(
    model: nn.Module,
    dataset: ImageDataset,
    weights: Path | str | None,
    image_size: int | Size | None,
    name: str | None,
) -> Subject:
    """A module, named and fed as what it is: a variant, a model of timm, or anything else."""
    if weights is not None:
        load_weights(model, weights)
    variant = variant_of(model)
    spec, size = model_input(model, dataset.track, image_size)
    name = name or (variant.name if variant else type(model).__name__.lower())
    return Subject(
        model, name, variant.paper.key if variant else None, size, spec,
        file_sha256(weights) if weights else None,
    )  # fmt: skip


def variant_of(model: nn.Module) -> registry.Variant | None:
    """The variant a module was built as by `harness.build`, if it was."""
    cfg = getattr(model, "pretrained_cfg", None)
    known = cfg.get("architecture", "") if isinstance(cfg, Mapping) else ""
    return registry.get_variant(known) if known.startswith("replivit_") else None


def model_input(
    model: nn.Module, track: Track | None, image_size: int | Size | None = None
) -> tuple[InputSpec, Size]:
    """How images of `track` (None: foreign data) are given to a module; training and evaluation
    both ask here, so that they cannot differ.

    Raises:
        ReplivitError: no size was given and neither the module nor the track has one.
    """
    size = None
    if variant := variant_of(model):
        spec = input_spec(variant, track.name if track else None)
        size = model.pretrained_cfg["input_size"][1:]
    elif hasattr(model, "pretrained_cfg") and (track is None or track.canvas is None):
        spec, size = _timm_input(model)
    else:
        spec = (track or get_track("imagenet")).input
    size = image_size or size or (track.image_size if track else None)
    if size is None:
        raise ReplivitError("say the image_size: neither the module nor the data set has one")
    return spec, _pair(size)


def _timm_input(model: nn.Module) -> tuple[InputSpec, Size]:
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    fields = ("mean", "std", "interpolation", "crop_pct")
    return InputSpec(**{field: config[field] for field in fields}), config["input_size"][1:]


def _pair(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else tuple(size)


def _device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ReplivitError(f"device {device!r} is unknown; try cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ReplivitError("no CUDA device is available; use the device cpu")
    return device


def _check_classes(subject: Subject, dataset: ImageDataset, classes: int | None) -> None:
    if classes is not None and classes != len(dataset.classes):
        raise ReplivitError(
            f"{subject.name} has {classes} classes, but {dataset.name} has {len(dataset.classes)}"
        )


def _in_form(subject: Subject, backend: str) -> Subject:
    """The subject as a backend runs it; a deployed or compiled model is another one."""
    model = subject.model
    if "deploy" in backend:
        model = deploy(model, subject.image_size)
    if "compile" in backend:
        model = torch.compile(model)
    return replace(subject, model=model)


def _spread(count: int, limit: int | None) -> np.ndarray:
    """Indices of all images, or of `limit` spread evenly: folders are sorted by class."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def _loader(
    subject: Subject,
    dataset: ImageDataset,
    chosen: np.ndarray,
    batch_size: int,
    workers: int | None,
    device: torch.device,
) -> DataLoader:
    transform = create_transform(subject.input, subject.image_size)
    if workers is None:
        few = min(4, os.cpu_count() or 1, len(chosen) // batch_size)
        workers = 0 if dataset.pixels is not None else few
    return DataLoader(
        Subset(AugmentedDataset(dataset, transform, seed=0), chosen.tolist()),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the loader would draw its seed from the global one
    )


@torch.no_grad()  # not inference_mode: tables a module caches now must serve its training too
def _run(
    subject: Subject,
    dataset: ImageDataset,
    loader: DataLoader,
    device: torch.device,
    autocast: torch.dtype | None,
    progress: Callable[[int, int], None] | None,
) -> Hits:
    """Every image once, in order."""
    model = subject.model
    training, home = model.training, next((one.device for one in model.parameters()), device)
    model.eval().to(device)
    precision = torch.autocast(device.type, autocast) if autocast else nullcontext()
    ranks, done, total = [], 0, len(loader.dataset)
    tick = time.perf_counter()
    try:
        for images, labels in loader:
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            with precision:
                logits = model(images)
            _check_logits(logits, subject, dataset, done)
            ranks.append(_rank(logits.float(), labels))
            done += len(labels)
            if progress:
                progress(done, total)
        rank = torch.cat(ranks).cpu().numpy()
    finally:
        model.train(training).to(home)
    return Hits(rank < 1, rank < 5, time.perf_counter() - tick)


def _rank(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the right one `(B,)`; of equal logits the lower class does.

    Counting, since the order in which `topk` gives ties is left open: a model that answers the
    same for every class must not score.
    """
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(1)


def _check_logits(logits: Any, subject: Subject, dataset: ImageDataset, done: int) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ReplivitError(f"{subject.name} does not answer with logits (B, classes) in eval mode")
    _check_classes(subject, dataset, logits.shape[1])
    if not torch.isfinite(logits).all():
        raise ReplivitError(
            f"{subject.name} gives logits that are not finite, first in the batch from image {done}"
        )
