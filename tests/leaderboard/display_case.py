"""Made-up papers and records for the leaderboard's tests: every state a cell can be in."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from harness.environment import Environment
from harness.paper import load_paper
from harness.record import METRICS, Conditions, Record, RecordStore
from harness.registry import Paper

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
EPYC, LAPTOP, GPU = "AMD EPYC 9R14 x2", "Intel Core i7-1260P x12", "AMD EPYC 9R14 x16 + NVIDIA H200"


def environment(machine: str = EPYC, **changes: Any) -> Environment:
    """An environment whose `machine` is the given text."""
    cpu, _, rest = machine.partition(" x")
    count, _, gpu = rest.partition(" + ")
    fields = {
        "replivit": "0.1.0", "python": "3.11.4", "packages": {"torch": "2.15.0", "timm": "1.0.31"},
        "system": "Linux 6.1", "cpu": cpu, "cpu_count": int(count), "memory_gib": 23.0,
        "gpu": gpu or None, "commit": "509bca1" + "0" * 33, "dirty": False, "code_sha256": "c" * 64,
    }  # fmt: skip
    return Environment(**{**fields, **changes})


def record(
    variant: str,
    metric: str,
    value: float | int | None,
    *,
    machine: str = EPYC,
    day: float = 0,
    conditions: dict[str, Any] | None = None,
    **fields: Any,
) -> Record:
    """One record, made on day `day`."""
    return Record(
        run_id="0" * 12,
        variant=variant,
        metric=metric,
        value=value,
        unit=METRICS[metric],
        conditions=Conditions(**(conditions or {})),
        environment=environment(machine),
        started=START + timedelta(days=day),
        duration_s=1.5,
        **fields,
    )


def timing(
    variant: str,
    ms: float,
    ratio: float,
    *,
    backend: str = "eager",
    spread: float = 0.02,
    threads: int = 1,
    device: str = "cpu",
    batch_size: int = 1,
    **fields: Any,
) -> list[Record]:
    """A latency record and its ratio, each with an interval of ± `spread`."""
    given = {"device": device, "backend": backend, "threads": threads, "batch_size": batch_size}
    return [
        record(
            variant, metric, value, conditions=given, n=12, method="ABBA rounds, bootstrap",
            interval=(value * (1 - spread), value * (1 + spread)), **fields,
        )
        for metric, value in (("latency", ms / 1e3), ("latency_ratio", ratio))
    ]  # fmt: skip


def trained(
    variant: str,
    seed: int | None,
    top1: float,
    *,
    track: str = "fashion_mini",
    day: float = 0,
    recipe: str = "small_track",
    **conditions: Any,
) -> Record:
    """The top-1 of one trained seed on 5,000 images."""
    given = {"track": track, "seed": seed, "data_fingerprint": "f" * 16, **conditions}
    return record(
        variant, "top1", top1, day=day, conditions=given, n=5000, method="Wilson",
        interval=(top1 - 0.6, top1 + 0.6), detail={"training": {"recipe": {"name": recipe}}},
    )  # fmt: skip


def make_paper(root: Path, key: str, **changes: Any) -> Paper:
    """A paper on disk with the given facts over harmless ones."""
    facts = {
        "key": key, "title": f"The paper {key}", "authors": ["A. Author", "B. Author"],
        "venue": "Some Conference", "year": 2022, "summary": "An idea.",
        "variants": {f"{key}_a": {"build": "model:a", "family": "hybrid"}},
    }  # fmt: skip
    directory = root / key
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "paper.yaml").write_text(yaml.safe_dump({**facts, **changes}), encoding="utf-8")
    return Paper(key, directory, f"made_up.{key}", load_paper(directory / "paper.yaml"))


def make_store(folder: Path, records: list[Record]) -> RecordStore:
    """A store that holds the records."""
    store = RecordStore(folder)
    store.append(records)
    return store


def make_case(root: Path, models: int = 22, machines: tuple[str, ...] = (EPYC, LAPTOP)) -> tuple:
    """A whole display case: papers, and a store with `models` ImageNet and 3 micro variants.

    One model runs out of memory, one is noisy, one contended, one has no record at all.
    """
    rng = np.random.default_rng(0)
    families = ("transformer", "hybrid", "cnn")
    names = [f"model_{families[i % 3][:5]}_{i:02d}" for i in range(models)]
    size = np.geomspace(3.4e6, 88e6, models) * rng.uniform(0.7, 1.4, models)
    variants, published, records = {}, [], []
    for i, name in enumerate(names):
        variants[name] = {"build": "model:a", "family": families[i % 3], "summary": "made up"}
        params, macs = int(size[i]), int(size[i] ** 1.05 * rng.uniform(60, 160))
        top1 = 60 + 5 * np.log10(macs / 1e6) + rng.normal(0, 1)
        published += [
            _printed(name, "top1", round(top1, 1), "%"),
            _printed(name, "params_m", round(params / 1e6, 1), "M"),
            _printed(name, "macs_g", round(macs * (1.1 if i % 9 == 4 else 1) / 1e9, 2), "G"),
            _printed(name, "latency_ms", 1.6, "ms", conditions="iPhone 12"),
        ]
        if i == models - 1:
            continue
        records += [record(name, "params", params), record(name, "macs", macs)]
        for machine in machines:
            records += _measured(i, name, params, macs, machine, rng)
    micro = {}
    for i, family in enumerate(families):
        name = f"tiny_{family[:5]}_micro"
        micro[name] = {
            "build": "model:a", "family": family, "track": "fashion_mini", "image_size": 32,
            "num_classes": 10,
        }  # fmt: skip
        records += [record(name, "params", 380_000 + 90_000 * i), record(name, "macs", 15_300_000)]
        records += timing(name, 2.1 + i, 0.06 + 0.02 * i)
        seeds = 1 if i == 2 else 3
        records += [trained(name, s, 88.4 + i + rng.normal(0, 0.2), day=s) for s in range(seeds)]
    big = make_paper(
        root / "papers", "large", variants=variants, published=published,
        experiments={"sweep": {"run": "experiments:sweep", "title": "A sweep"}},
    )  # fmt: skip
    small = make_paper(root / "papers", "tiny", variants=micro)
    return [big, small], make_store(root / "records", records)


def _measured(i: int, name: str, params: int, macs: int, machine: str, rng: Any) -> list[Record]:
    slow = 1.0 if machine == EPYC else 0.6
    ms = slow * macs / 1e9 * rng.uniform(18, 40) + 5
    if i == 3:
        reason = "the process was killed at 20.1 GiB"
        given = {"batch_size": 1, "threads": 1}
        return [
            record(name, metric, None, status="out_of_memory", reason=reason, conditions=given,
                   machine=machine)
            for metric in ("latency", "latency_ratio")
        ]  # fmt: skip
    status = {5: "noisy", 7: "contended"}.get(i, "ok")
    reason = {"noisy": "half-width 6 % after 40 rounds", "contended": "CPU pressure 64 %"}
    found = timing(
        name,
        ms,
        ms / (slow * 34),
        spread=0.08 if status == "noisy" else 0.015,
        machine=machine,
        status=status,
        reason=reason.get(status),
    )
    found += timing(
        name, 0.8 * ms, 0.8 * ms / (slow * 34), backend="deploy", machine=machine, spread=0.012
    )
    given = {"batch_size": 1, "threads": 1}
    for metric, factor in (("memory_inference", 1.3), ("memory_training", 9)):
        value = int(factor * params + 5e7)
        found.append(record(name, metric, value, conditions=given, machine=machine))
    return found


def _printed(name: str, metric: str, value: float, unit: str, **more: Any) -> dict[str, Any]:
    row = {"variant": name, "of": name, "metric": metric, "value": float(value), "unit": unit}
    return {**row, "source": "paper Table 1", "seen": True, **more}
