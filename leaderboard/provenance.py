"""Where a number came from, as text: conditions, machine, code, and the command to repeat it."""

from __future__ import annotations

import hashlib
import json
import shlex

from harness.data import get_track
from harness.errors import ReplivitError
from harness.record import METRICS, Record
from harness.registry import get_variant

GROUPS = {
    "params": "params", "params_trainable": "params", "params_paper": "params",
    "macs": "macs", "macs_fvcore": "macs", "macs_paper": "macs",
    "latency": "latency", "latency_ratio": "latency", "first_call": "latency",
    "memory_inference": "memory", "memory_training": "memory",
}  # fmt: skip


def record_id(record: Record) -> str:
    """A short stable name of a record: the start of the SHA-256 of its line."""
    return hashlib.sha256(record.model_dump_json().encode()).hexdigest()[:16]


def remeasure_command(record: Record) -> str:
    """The command line that measures this record's cell again."""
    given = record.conditions
    if record.metric == "experiment":
        words = ["replivit", "run", record.variant, "--scale", str(record.detail.get("scale"))]
        options = record.detail.get("options")
        for key, value in options.items() if isinstance(options, dict) else ():
            words += ["--set", f"{key}={value}"]
    elif record.metric in GROUPS:
        words = ["replivit", "measure", record.variant, "--metrics", GROUPS[record.metric]]
        if GROUPS[record.metric] in ("latency", "memory"):
            words += ["--device", given.device, "--batch-size", str(given.batch_size or 1)]
            words += ["--backend", given.backend, "--dtype", given.dtype]
            words += ["--threads", str(given.threads)] if given.threads else []
    elif given.seed is not None or record.metric in ("train_time", "images_seen"):
        words = ["replivit", "train", record.variant, "--track", given.track or "imagenet"]
        words += ["--seed", str(given.seed or 0), *_recipe_words(record)]
    else:
        words = ["replivit", "evaluate", record.variant, "--track", given.track or "imagenet"]
        words += ["--limit", str(given.options["limit"])] if "limit" in given.options else []
        words += ["--device", given.device] if given.device != "cpu" else []
        words += ["--dtype", given.dtype] if given.dtype != "float32" else []
        words += ["--backend", given.backend] if given.backend != "eager" else []
    return shlex.join(words)


def _recipe_words(record: Record) -> list[str]:
    """The recipe of a training, and what it changed, where today's default is another one."""
    from harness.training.recipe import read_recipe, resolve_recipe  # slow, and seldom needed

    told = record.detail.get("recipe") or (record.detail.get("training") or {}).get("recipe")
    if not isinstance(told, dict):
        return []
    track = record.conditions.track or "imagenet"
    try:
        variant = get_variant(record.variant)
        base = resolve_recipe(None, variant, track, get_track(track).protocol)
        words = []
        if told.get("name") != base.name:
            base, words = read_recipe(told["name"], variant), ["--recipe", told["name"]]
    except (ReplivitError, KeyError):  # of a variant or a recipe that is no longer there
        return []
    known = base.model_dump(mode="json", exclude={"name", "summary", "extends", "workers"})
    for key, value in told.items():
        if key in known and known[key] != value:
            words += ["--set", f"{key}={json.dumps(value)}"]
    return words


def facts(record: Record) -> list[tuple[str, str]]:
    """Label and text of everything that produced a record, in reading order."""
    given, where = record.conditions, record.environment
    commit = where.commit[:12] if where.commit else "not a checkout"
    versions = ", ".join(f"{name} {text}" for name, text in where.packages.items())
    size = f"{given.image_size} px" if given.image_size else None
    value = None if record.value is None else f"{record.value:,} {record.unit}"
    if record.interval:
        value += f" ({record.interval[0]:.6g} to {record.interval[1]:.6g})"
    found = [
        ("value", None if record.metric == "experiment" else value),
        ("status", f"{record.status}: {record.reason}" if record.reason else record.status),
        ("method", record.method),
        ("independent units (n)", record.n),
        ("track", given.track),
        ("seed", given.seed),
        ("weights SHA-256", given.weights_sha256),
        ("data fingerprint", given.data_fingerprint),
        ("preprocessing SHA-256", given.preprocessing_sha256),
        ("input", size),
        ("setting", _setting(record)),
        ("machine", f"{where.machine}, {where.memory_gib:g} GiB, {where.system}"),
        ("software", f"replivit {where.replivit}, Python {where.python}, {versions}"),
        ("CUDA", where.cuda),
        ("commit", commit + (" with uncommitted changes" if where.dirty else "")),
        ("code SHA-256", where.code_sha256[:16]),
        ("measured", f"{record.started:%Y-%m-%d %H:%M} UTC, took {record.duration_s:.3g} s"),
        ("record", record_id(record)),
    ]
    return [(label, str(text)) for label, text in found if text not in (None, "")]


def _setting(record: Record) -> str:
    given = record.conditions
    parts = [given.device, given.backend, given.dtype]
    parts += [f"batch {given.batch_size}"] if given.batch_size else []
    parts += [f"{given.threads} threads"] if given.threads else []
    parts += [f"{key}={value}" for key, value in given.options.items()]
    return ", ".join(parts)


def unit_of(metric: str) -> str:
    """The unit that records of a metric carry."""
    return METRICS.get(metric, "")
