"""Candidates per second of the training-free search: ours against the authors' code.

The authors' modules are imported from your own checkout of their repository:

    git clone https://github.com/decemberzhou/TF_TAS
    python benchmarks/tf_tas_versus_authors.py --authors TF_TAS --candidates 20

Both score the same random subnets of one supernet with the same weights, in one process, in
alternation; CPU time is compared, and the scores must agree. A candidate costs what it costs in a
search: counting its parameters, slicing, scoring. The released search also reads a batch of images
for every candidate, to use its shape; here the batch is in memory, in its favour.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from race import one_turn, run
from torch import nn

from harness.errors import ReplivitError
from harness.statistics import paired_ratio
from reproductions.autoformer.space import Config, Space, get_space
from reproductions.autoformer.supernet import Supernet
from reproductions.tf_tas.scoring import DssScorer

BAR = 5.0
RELATIVE_ERROR = 1e-4


def authors_scorer(checkout: Path, space: Space) -> tuple[nn.Module, Callable[[Config], float]]:
    """Their supernet, with its own random weights, and their scoring of one configuration.

    Raises:
        ReplivitError: `checkout` is not their repository.
    """
    if not (checkout / "model" / "autoformer_space.py").is_file():
        raise ReplivitError(f"{checkout} is no checkout of the authors' code")
    sys.path.insert(0, str(checkout.resolve()))
    from lib.training_free import compute_indicators
    from model.autoformer_space import Vision_TransformerSuper

    torch.manual_seed(0)
    supernet = Vision_TransformerSuper(
        img_size=224, patch_size=16, embed_dim=space.super_dim, depth=space.super_depth,
        num_heads=space.super_heads, mlp_ratio=space.super_ratio, qkv_bias=True,
        drop_path_rate=0.1, gp=True, num_classes=1000, max_relative_position=14,
        relative_position=True, change_qkv=True, abs_pos=True,
    )  # fmt: skip
    batch = 64  # the released default; only its shape is used
    loader = [(torch.zeros(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.long))]

    def score(config: Config) -> float:
        given = {
            "layer_num": config.depth,
            "embed_dim": [config.embed_dim] * config.depth,
            "mlp_ratio": list(config.mlp_ratios),
            "num_heads": list(config.num_heads),
        }
        supernet.get_sampled_params_numel(given)
        supernet.eval()
        with torch.no_grad():
            supernet.set_sample_config(given)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            found = compute_indicators.find_indicators(
                supernet, loader, ("random", 1, 1000), torch.device("cpu")
            )
        return found["dss"]

    return supernet, score


def warm_up(scorer: DssScorer, space: Space) -> float:
    """Score one subnet for each pair of dimension and heads; returns the CPU seconds.

    After that, the nuclear norm of every weight slice is known: thousands of candidates share them.
    """
    tick = time.process_time()
    depth = max(space.depths)
    for dim in space.embed_dims:
        for heads in space.num_heads:
            scorer(Config(depth, dim, space.mlp_ratios[:1] * depth, (heads,) * depth))
    return time.process_time() - tick


def race(
    space: Space, checkout: Path, candidates: int, seed: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """CPU seconds `(N, 2)` and scores `(N, 2)` of the candidates: theirs, ours; our warm-up."""
    theirs, their_score = authors_scorer(checkout, space)
    ours = Supernet(space, num_classes=1000, image_size=224)
    ours.load_state_dict(theirs.state_dict())
    scorer = DssScorer(ours)

    def our_score(config: Config) -> float:
        scorer.params(config)
        return scorer(config)

    rng = random.Random(seed)
    configs = [space.sample(rng) for _ in range(candidates)]
    their_score(configs[0])
    once = warm_up(scorer, space)
    seconds, scores = np.zeros((candidates, 2)), np.zeros((candidates, 2))
    for row, config in enumerate(configs):
        works = [partial(their_score, config), partial(our_score, config)]
        seconds[row], scores[row] = one_turn(works, row)
    return seconds, scores, once


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", type=Path, required=True, help="checkout of their repository")
    parser.add_argument("--space", default="t", choices=("t", "s", "b"))
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    seconds, scores, once = race(
        get_space(arguments.space), arguments.authors, arguments.candidates, arguments.seed
    )
    error = float(np.max(np.abs(scores[:, 1] / scores[:, 0] - 1)))
    ratio = paired_ratio(seconds[:, 0], seconds[:, 1])
    theirs, ours = np.median(seconds, axis=0)
    good = ratio.interval[0] >= BAR and error <= RELATIVE_ERROR
    print(f"CPU seconds per candidate of space {arguments.space}: theirs {theirs:.3f}, ours "
          f"{ours:.3f}; {ratio.value:.1f}x as many per second (95 % interval "
          f"{ratio.interval[0]:.1f} to {ratio.interval[1]:.1f}); once per search, for the norms of "
          f"all slices, {once:.1f}; largest relative difference of scores "
          f"{error:.1e}; {'ok' if good else 'BELOW THE BAR'}")  # fmt: skip
    return good


if __name__ == "__main__":
    run(main)
