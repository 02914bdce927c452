"""Find vit_slim_micro: search `vit_micro`, keep 60 %, and write down what is kept.

    python -m reproductions.vit_slim.micro
    replivit train vit_slim_micro --recipe retrain_small --epochs 4 --seeds 0,1,2 --ship \\
        --init training/vit_slim_micro_start.safetensors

The first command (two epochs from the shipped `vit_micro`; it goes on where it was stopped)
writes `kept/vit_slim_micro.yaml`, which is the variant's shape, and the searched weights that the
second one starts from.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import harness
from harness import ReplivitError
from harness.checkpoints import save_weights
from harness.environment import home
from reproductions.vit_slim.files import write_kept
from reproductions.vit_slim.model import HERE
from reproductions.vit_slim.search_setup import SCALES, run_search
from reproductions.vit_slim.slimming import slim

BUDGET = 0.6
START = "vit_slim_micro_start.safetensors"


def find(epochs: int | None = None, seed: int = 0, budget: float = BUDGET) -> str:
    """Search, and write both files; returns what was done in words."""
    setting = replace(SCALES["small"], search_epochs=epochs)
    parent = harness.load_pretrained(setting.parent, setting.track)
    searched = run_search(setting, parent, seed)
    small = slim(searched.model, budget, budget)
    about = (
        f"What a search with {searched.value('images_seen'):,} images of {setting.track} (seed "
        f"{seed})\nleft of {setting.parent} at a budget of "
        f"{budget:g} for head dimensions and MLP channels.\nWritten by micro.py."
    )
    write_kept(small.kept, HERE / "kept" / "vit_slim_micro.yaml", about)
    start = home() / "training" / START
    save_weights(small, start, metadata={"variant": "vit_slim_micro", "track": setting.track})
    return f"{small.kept.head_dims.tolist()}\n{small.kept.hidden.tolist()}\nstart: {start}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, help="of the search; default the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=BUDGET)
    arguments = parser.parse_args()
    try:
        print(find(arguments.epochs, arguments.seed, arguments.budget))
    except (ReplivitError, ValueError) as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
