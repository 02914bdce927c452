"""Small trained weights into a paper's directory, with the records that vouch for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness import registry
from harness.checkpoints import save_weights
from harness.data import TRACKS
from harness.errors import ReplivitError
from harness.evaluation import evaluate
from harness.record import Record, new_run_id
from harness.training.api import TrainedModel
from harness.training.state import write_whole

LIMIT = 2_000_000  # bytes: a checkout must stay small


def ship(
    variant: str, track: str, runs: Sequence[TrainedModel], root: str | Path | None = None
) -> tuple[Path, Path]:
    """Write the first run's weights as float16 and the records of all runs beside them.

    The first run, not the best one: choosing by the test score would flatter it. The file is
    evaluated again as it is shipped, after the cast. Nothing is replaced unless all went well.

    Returns:
        `weights/<variant>_<track>.safetensors` and `<same>.records.jsonl` of the paper.

    Raises:
        ReplivitError: data that are no track, no scored runs, builder options, or over 2 MB.
    """
    if track not in TRACKS:
        raise ReplivitError(f"weights ship for a track ({', '.join(TRACKS)}), not for {track}")
    if not runs or any(run.value("top1") is None for run in runs):
        raise ReplivitError("only runs that were evaluated can be shipped")
    found = registry.get_variant(variant)
    defaults = registry.default_options(found)
    for run in runs:
        options = run.records[0].conditions.options
        if any(name not in defaults or defaults[name] != options[name] for name in options):
            raise ReplivitError("a model built with options of its own cannot be shipped: declare "
                                "it as a variant first")  # fmt: skip
    draft = runs[0].directory / "shipped.safetensors"
    trained = runs[0].records[0]
    metadata = {
        "variant": found.name, "track": track, "seed": trained.conditions.seed,
        "recipe": trained.detail["recipe"]["name"], "commit": trained.environment.commit,
    }  # fmt: skip
    save_weights(runs[0].model, draft, half=True, metadata=metadata)
    size = draft.stat().st_size
    if size > LIMIT:
        raise ReplivitError(
            f"{found.name} takes {size / 1e6:.2f} MB as float16; at most {LIMIT / 1e6:g} MB ship"
        )
    shipped = evaluate(found.name, track, root=root, weights=draft, run_id=new_run_id())
    shipped = [
        one.model_copy(update={"detail": {**one.detail, "shipped": True}}) for one in shipped
    ]
    weights = found.paper.directory / "weights" / f"{found.name}_{track}.safetensors"
    records = weights.with_suffix(".records.jsonl")
    lines = [_plain(one).model_dump_json() + "\n" for run in runs for one in run.records]
    lines += [one.model_dump_json() + "\n" for one in shipped]
    write_whole(weights, draft.read_bytes())
    write_whole(records, "".join(lines).encode())
    return weights, records


def _plain(record: Record) -> Record:
    """Without options that say no more than the variant's own defaults."""
    conditions = record.conditions.model_copy(update={"options": {}})
    return record.model_copy(update={"conditions": conditions})
