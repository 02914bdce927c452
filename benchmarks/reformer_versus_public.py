"""Our LSH attention against the public PyTorch versions: equal weights, in turns, in one process.

The authors' code is JAX; two PyTorch versions are in use. Each is raced by the layer that has its
rules, forward and with the backward pass: with its projections, which are the same matrix products
on both sides, or without (`--bare`), attention alone. lucidrains' code is imported from your own
checkout (it needs `einops`), Hugging Face's from an installed `transformers` before 5:

    git clone https://github.com/lucidrains/reformer-pytorch
    python benchmarks/reformer_versus_public.py --lucidrains reformer-pytorch --transformers

Outputs are compared first, with the same rotations: a speed counts only for the same function. Peak
memory is measured with each layer in a process of its own. Passes when ours is at least 1.5 times
as fast and takes no more memory, everywhere.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from race import RELATIVE_ERROR, one_turn, run
from torch import Tensor, nn

from harness.errors import ReplivitError
from harness.statistics import paired_ratio
from reproductions.reformer.attention import LSHAttention
from reproductions.reformer.peaks import peak_bytes

FASTER = 1.5
#: (batch, length, width, heads, rounds, chunk, causal)
CASES = [
    (8, 1024, 256, 4, 1, 64, False),
    (8, 1024, 256, 4, 4, 64, False),
    (8, 1024, 256, 4, 4, 64, True),
    (1, 8192, 256, 4, 4, 64, True),
    (1, 16384, 256, 4, 8, 64, False),
]


def load_lucidrains(checkout: str) -> type[nn.Module]:
    """Their attention layer.

    Packages that it imports for other layers are replaced by empty ones.

    Raises:
        ReplivitError: not a checkout, or `einops` is missing.
    """
    if not (Path(checkout) / "reformer_pytorch/reformer_pytorch.py").is_file():
        raise ReplivitError(f"{checkout} is no checkout of reformer-pytorch")

    class Unused(nn.Module):
        def __init__(self, *_, **__) -> None:
            super().__init__()

    for package, name in (
        ("local_attention", "LocalAttention"),
        ("product_key_memory", "PKM"),
        ("axial_positional_embedding", "AxialPositionalEmbedding"),
    ):
        stand_in = types.ModuleType(package)
        setattr(stand_in, name, Unused)
        sys.modules[package] = stand_in
    sys.path.insert(0, str(checkout))
    try:
        from reformer_pytorch.reformer_pytorch import LSHSelfAttention
    except ImportError as error:
        raise ReplivitError(f"reformer-pytorch cannot be imported: {error}") from error
    return LSHSelfAttention


def pair_of_lucidrains(checkout: str, case: tuple, bare: bool) -> tuple[Callable, Callable]:
    """Their layer and ours as functions of `(B, L, C)`, with equal weights and rotations."""
    _, length, width, heads, rounds, chunk, causal = case
    torch.manual_seed(0)
    theirs = load_lucidrains(checkout)(
        width, heads=heads, bucket_size=chunk, n_hashes=rounds, causal=causal
    ).eval()
    ours = LSHAttention(
        width, heads, rounds=rounds, chunk=chunk, causal=causal, rules="lucidrains", out_bias=True
    ).eval()
    names = {"toqk": "to_qk", "tov": "to_v", "to_out": "to_out"}
    ours.load_state_dict(
        {
            f"{names[key.split('.')[0]]}.{key.split('.')[1]}": value
            for key, value in theirs.state_dict().items()
        }
    )
    if bare:
        _without(theirs, "toqk", "tov", "to_out")
        _without(ours, "to_qk", "to_v", "to_out")
    shape = (1, width // heads, rounds, length // chunk // 2)

    def with_rotations(x: Tensor) -> Tensor:
        ours.rotations = torch.randn(shape)[None]  # as theirs, anew in each pass
        return ours(x)[0]

    return theirs, with_rotations


def _without(layer: nn.Module, *projections: str) -> None:
    for name in projections:
        setattr(layer, name, nn.Identity())


def pair_of_transformers(_: str, case: tuple, bare: bool) -> tuple[Callable, Callable]:
    """Their attention (without its output projection) and ours, with equal weights and rotations.

    Raises:
        ReplivitError: no `transformers` with a Reformer is installed.
    """
    try:
        from transformers import ReformerConfig
        from transformers.models.reformer.modeling_reformer import LSHSelfAttention
    except ImportError as error:
        raise ReplivitError(f"transformers cannot be imported: {error}") from error
    _, length, width, heads, rounds, chunk, causal = case
    torch.manual_seed(0)
    buckets = 2 * length // chunk
    after = 0 if causal else 1
    config = ReformerConfig(
        hidden_size=width, num_attention_heads=heads, attention_head_size=width // heads,
        num_hashes=rounds, num_buckets=buckets, lsh_attn_chunk_length=chunk, is_decoder=causal,
        lsh_num_chunks_before=1, lsh_num_chunks_after=after, max_position_embeddings=length,
        lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = LSHSelfAttention(config).eval()
    from reproductions.reformer.rules import HUGGING_FACE

    ours = LSHAttention(
        width, heads, rounds=rounds, chunk=chunk, causal=causal, num_buckets=buckets,
        rules=HUGGING_FACE.changed(after=after),
    ).eval()  # fmt: skip
    ours.to_qk.weight.data = theirs.query_key.weight.data
    ours.to_v.weight.data = theirs.value.weight.data
    _without(ours, "to_out")
    if bare:
        _without(theirs, "query_key", "value")
        _without(ours, "to_qk", "to_v")
    shape = (heads, width // heads, rounds, buckets // 2)

    def with_rotations(x: Tensor) -> Tensor:
        ours.rotations = torch.randn(shape)[None]
        return ours(x)[0]

    return (lambda x: theirs(x, num_hashes=rounds).hidden_states), with_rotations


PAIRS = {"lucidrains": pair_of_lucidrains, "transformers": pair_of_transformers}


def work_of(run: Callable, x: Tensor, training: bool) -> Callable[[], object]:
    """A pass, or a pass and its backward."""

    def work() -> None:
        with torch.set_grad_enabled(training):
            out = run(x)
        if training:
            out.sum().backward()

    return work


def prepare(
    peer: str, checkout: str, case: tuple, bare: bool, mine: bool, training: bool
) -> Callable:
    """One side of a race alone, for the measuring of its memory."""
    x = torch.randn(*case[:3], requires_grad=training)
    return work_of(PAIRS[peer](checkout, case, bare)[mine], x, training)


@torch.no_grad()
def relative_error(theirs: Callable, ours: Callable, x: Tensor) -> float:
    """||ours - theirs|| / ||theirs|| with the rotations of one seed."""
    torch.manual_seed(1)
    wanted = theirs(x)
    torch.manual_seed(1)
    return float((ours(x) - wanted).norm() / wanted.norm())


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lucidrains", help="a checkout of lucidrains/reformer-pytorch")
    parser.add_argument("--transformers", action="store_true", help="race Hugging Face's, too")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each race")
    parser.add_argument("--cases", type=int, nargs="*", help=f"of 0 to {len(CASES) - 1}")
    parser.add_argument("--bare", action="store_true", help="without the layers' projections")
    parser.add_argument("--no-memory", action="store_true")
    arguments = parser.parse_args()
    peers = ["lucidrains"] * bool(arguments.lucidrains) + ["transformers"] * arguments.transformers
    if not peers:
        parser.error("nobody to race: give --lucidrains or --transformers")
    torch.set_num_threads(1)
    passed = True
    cases = CASES if arguments.cases is None else [CASES[index] for index in arguments.cases]
    for peer, case in itertools.product(peers, cases):
        theirs, ours = PAIRS[peer](arguments.lucidrains, case, arguments.bare)
        x = torch.randn(*case[:3])
        error = relative_error(theirs, ours, x)
        for training in (False, True):
            x = x.detach().requires_grad_(training)
            works = (work_of(theirs, x, training), work_of(ours, x, training))
            for work in works:
                work()
            rounds = [one_turn(works, number)[0] for number in range(arguments.rounds)]
            seconds = np.array(rounds).T
            ratio = paired_ratio(*seconds)
            line, good = "", ratio.value >= FASTER and error <= RELATIVE_ERROR
            if not arguments.no_memory:
                jobs = [
                    {"peer": peer, "checkout": arguments.lucidrains, "case": case,
                     "bare": arguments.bare, "mine": mine, "training": training}
                    for mine in (False, True)
                ]  # fmt: skip
                peaks = peak_bytes(prepare, jobs)
                good = good and peaks[1] <= peaks[0]
                line = f"  {peaks[1] / 1e6:6.0f} MB, theirs {peaks[0] / 1e6:6.0f} MB"
            passed = passed and good
            low, high = ratio.interval
            batch, length, _, _, rounds, _, causal = case
            print(
                f"{peer:12} {batch}x{length} {rounds} rounds {'causal ' if causal else ''}"
                f"{'step' if training else 'forward':8} {1e3 * seconds[1].min():8.1f} ms  "
                f"{ratio.value:5.2f}x ({low:.2f} to {high:.2f}){line}  error {error:.0e}"
                + ("" if good else "  FAILED"),
                flush=True,
            )
    return passed


if __name__ == "__main__":
    run(main)
