"""Reformer's method against itself: dense oracles, padding, replayed randomness, bad input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from reformer_tools import array
from torch import is_tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reproductions.reformer.attention import (
    FullAttention,
    LocalAttention,
    LSHAttention,
    shared_qk_attention,
)
from reproductions.reformer.chunked import attention_maps, chunked_attention
from reproductions.reformer.hashing import (
    draw_rotations,
    hash_vectors,
    sort_by_bucket,
)
from reproductions.reformer.rules import PAPER, TRAX_V2
from reproductions.reformer.windows import Windows


def times_visible(windows: Windows) -> torch.Tensor:
    """How often each query sees each key `(R, L, L)`, written out pair by pair."""
    rows, rounds, length = windows.sorted.order.shape
    count = torch.zeros(rows, length, length, dtype=torch.float64)
    order, buckets = windows.sorted.order.long(), windows.sorted.buckets
    per_round, chunk = windows.per_round, windows.chunk
    for row, at, step in itertools.product(
        range(rows), range(rounds * per_round), range(-windows.before, windows.after + 1)
    ):
        other = (at + step) % (rounds * per_round)
        own, near = ((one // per_round, one % per_round) for one in (at, other))
        queries = order[row, own[0], own[1] * chunk : (own[1] + 1) * chunk]
        keys = order[row, near[0], near[1] * chunk : (near[1] + 1) * chunk]
        seen = torch.ones(chunk, chunk, dtype=torch.bool)
        if windows.same_bucket:
            ids = buckets[row, own[0], own[1] * chunk : (own[1] + 1) * chunk]
            others = buckets[row, near[0], near[1] * chunk : (near[1] + 1) * chunk]
            seen = (ids[:, None] == others[None]) & (own[0] == near[0])
        if windows.causal:
            seen = seen & (keys[None] <= queries[:, None])
        if windows.valid is not None:
            seen = seen & windows.valid[row, keys][None]
        count[row, queries[:, None], keys[None]] += seen.double()
    return count


def oracle(query, key, value, windows: Windows) -> torch.Tensor:
    """Dense attention with weights N exp(s), or exp(s) where N > 0; itself only if nobody else."""
    count = times_visible(windows)
    if windows.union:
        count = count.clamp_max(1)
    length = query.shape[1]
    alone = torch.eye(length, dtype=torch.bool)
    others = count.masked_fill(alone, 0)
    weight = others * (query @ key.mT).exp()
    weight = torch.where((others.sum(-1, keepdim=True) == 0) & alone, 1.0, weight)
    return weight / weight.sum(-1, keepdim=True) @ value


def random_case(rounds=3, length=48, chunk=8, buckets=6, rows=2, hashed=True, **options):
    query, value = array(0, (rows, length, 6)).double(), array(1, (rows, length, 5)).double()
    rotations = draw_rotations(6, rounds, buckets, heads=rows, seed=2)
    found = sort_by_bucket(hash_vectors(query[None], rotations, buckets))
    found = found if hashed else None
    windows = Windows(length, chunk, rounds, sorted=found, self_penalty=-1e5, **options)
    return query, PAPER.keys(query), value, windows


@pytest.mark.parametrize("union", [True, False])
@pytest.mark.parametrize("same_bucket", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("before", "after"), [(1, 0), (1, 1), (0, 0), (2, 1)])
def test_attention_is_dense_attention_on_visible_pairs(union, same_bucket, causal, before, after):
    """Every switch, in float64, also pairs that only the ring between rounds makes visible."""
    query, key, value, windows = random_case(
        union=union, same_bucket=same_bucket, causal=causal, before=before, after=after
    )
    found = chunked_attention(query, key, value, windows)
    wanted = oracle(query, key, value, windows)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("options", [{"before": 3, "after": 2}, {"before": 1, "after": 1}])
@pytest.mark.parametrize("rounds", [1, 2])
def test_windows_wider_than_a_round(options, rounds):
    """Two chunks a round: the ring brings the same chunk, and the same token, more than once."""
    query, key, value, windows = random_case(
        rounds=rounds, length=16, chunk=8, union=True, **options
    )
    found = chunked_attention(query, key, value, windows)
    torch.testing.assert_close(found, oracle(query, key, value, windows), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rules", [{"union": True, "same_bucket": True}, {}, {"causal": True}])
def test_gradients_are_those_of_the_dense_oracle(rules):
    query, _, value, windows = random_case(after=1, **rules)
    weights = array(5, (2, 48, 5)).double()
    found = []
    for attention in (chunked_attention, oracle):
        q, v = query.clone().requires_grad_(), value.clone().requires_grad_()
        (attention(q, PAPER.keys(q), v, windows) * weights).sum().backward()
        found.append((q.grad, v.grad))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_fused_and_plain_kernels_agree():
    """Equal widths take torch's kernel, others ours; dropout of rate 0 is no dropout."""
    query, key, value, windows = random_case(causal=True)
    narrow = chunked_attention(query, key, value, windows)
    wide = chunked_attention(query, key, F.pad(value, (0, 1)), windows)
    torch.testing.assert_close(wide[..., :5], narrow, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_mixed_precision_does_not_reach_the_scores(rate):
    """The backward pass computes them again, outside of autocast: both must be the same."""
    query, key, value, windows = random_case(causal=True)
    inputs = [one.float().requires_grad_() for one in (query, key, value)]
    found = []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = chunked_attention(*inputs, windows, dropout=rate, seed=3)
        found.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for plain, ours in zip(*found, strict=True):
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["full", "local", "hugging_face", "lucidrains"])
def test_dense_attention_in_half_precision(kind, causal, valid):
    """float16 ends at 65504: a first token sees itself, padding is not seen."""
    torch.manual_seed(0)
    options = {"causal": causal, "chunk": 16}
    layer = {
        "full": lambda: FullAttention(12, 2, **options),
        "local": lambda: LocalAttention(12, 2, **options),
        "hugging_face": lambda: LSHAttention(12, 2, rules="hugging_face", **options),
        "lucidrains": lambda: FullAttention(12, 2, rules="lucidrains", **options),
    }[kind]().eval()
    x, mask = array(3, (2, 11, 12)), torch.ones(2, 11, dtype=torch.bool)
    mask[0, 7:] = False
    mask = mask if valid else None
    with torch.no_grad():
        wanted, half = layer(x, mask)[0], layer.half()(x.half(), mask)[0].float()
    torch.testing.assert_close(half, wanted, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"union": True, "causal": True},
        {"same_bucket": True, "causal": True},
        {"before": 2, "after": 1},
        {"length": 16, "before": 3, "after": 2},  # windows wider than a round
        {"rounds": 1, "hashed": False, "after": 1},
    ],
)
@pytest.mark.parametrize("elements", [1, 700, 1300])
def test_blocks_of_rows_rounds_and_chunks_change_nothing(options, elements, monkeypatch):
    query, key, value, windows = random_case(**{"rows": 3, **options})
    inputs = [one.clone().requires_grad_() for one in (query, key, value)]
    whole = chunked_attention(*inputs, windows)
    grads = torch.autograd.grad(whole.square().sum(), inputs)
    monkeypatch.setattr("reproductions.reformer.blocks.ROW_ELEMENTS", elements)
    monkeypatch.setattr("reproductions.reformer.windows.BIAS_ELEMENTS", 1)
    parts = chunked_attention(*inputs, windows)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(parts.square().sum(), inputs), grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


class Written(TorchDispatchMode):
    """Counts the elements of all new tensors, and of the largest; views are free."""

    total = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in tree_leaves(args) if is_tensor(one)}
        for one in filter(is_tensor, tree_leaves(found)):
            if one.untyped_storage().data_ptr() not in given:
                self.total += one.numel()
                self.largest = max(self.largest, one.numel())
        return found


@pytest.mark.parametrize("rules", [{"union": True, "same_bucket": True}, {"union": True}, {}])
def test_work_grows_like_the_length(rules, monkeypatch):
    """Also where the biases are made chunk by chunk: no chunk may touch the whole sequence."""
    monkeypatch.setattr("reproductions.reformer.windows.BIAS_ELEMENTS", 1)
    work = []
    for length in (32, 128):
        query, key, value, windows = random_case(length=length, causal=True, rows=1, **rules)
        with Written() as written:
            chunked_attention(query, key, value, windows)
        work.append(written.total)
    assert work[1] < 1.1 * 4 * work[0]


@pytest.mark.parametrize("union", [False, True])
def test_memory_does_not_grow_with_the_rounds(union, monkeypatch):
    """Of a long sequence, one round at a time is gathered, forward and backward."""
    monkeypatch.setattr("reproductions.reformer.blocks.ROW_ELEMENTS", 1)
    monkeypatch.setattr("reproductions.reformer.windows.BIAS_ELEMENTS", 1)
    query, key, value, windows = random_case(rounds=4, length=64, rows=1, union=union)
    inputs = [one.clone().requires_grad_() for one in (query, key, value)]
    with Written() as written:
        chunked_attention(*inputs, windows).sum().backward()
    neighbours = windows.before * windows.chunk
    assert written.largest <= (windows.length + neighbours) * query.shape[-1]


def test_shared_bias_of_inner_chunks_changes_nothing(monkeypatch):
    query, key, value, windows = random_case(length=64, after=1)
    quick = chunked_attention(query, key, value, windows)
    assert any(shared for *_, shared in windows.blocks(2, slice(0, 8), query.device))
    monkeypatch.setattr("reproductions.reformer.windows.SHARED_BIAS_CHUNKS", 10**9)
    assert not any(shared for *_, shared in windows.blocks(2, slice(0, 8), query.device))
    slow = chunked_attention(query, key, value, windows)
    torch.testing.assert_close(quick, slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("union", [True, False])
def test_a_copy_from_the_round_before_is_no_second_self(union):
    """Its bucket hides it: a token alone weighs the same in all rounds, wherever it is sorted."""
    query, key, value, windows = random_case(
        rounds=3, length=16, buckets=2, causal=True, same_bucket=True, union=union
    )
    copies = windows.sorted.places[:, :, 0]  # of token 0: first chunk after a last chunk
    assert ((copies < 8) & (copies.roll(1, 1) >= 8)).any()
    found = chunked_attention(query.float(), key.float(), value.float(), windows)
    penalty = torch.full((3,), -1e5 - math.log(3) * union)
    factor = (penalty - penalty.logsumexp(0)).exp().sum()
    torch.testing.assert_close(found[:, 0], factor * value[:, 0].float(), rtol=1e-6, atol=0)


def test_order_of_rounds_does_not_matter_to_the_union():
    query, key, value, windows = random_case(rounds=4, union=True, same_bucket=True)
    turned = type(windows.sorted)(*(one.flip(1) for one in vars(windows.sorted).values()))
    other = Windows(**{**vars(windows), "sorted": turned})
    found = (chunked_attention(query, key, value, one) for one in (windows, other))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_one_chunk_is_full_attention():
    query, key, value, windows = random_case(rounds=1, length=16, chunk=16, before=0)
    full = shared_qk_attention(query[None], value[None], TRAX_V2)[0]
    found = chunked_attention(query, key, value, windows)
    torch.testing.assert_close(found, full, rtol=1e-9, atol=1e-9)


def test_maps_add_up_and_give_the_output():
    query, key, value, windows = random_case(union=True)
    inside, whole = attention_maps(query, key, windows)
    assert inside.shape == (2, 18, 8, 16) and whole.shape == (2, 48, 48)
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 48).double())
    torch.testing.assert_close(whole @ value, chunked_attention(query, key, value, windows))


@pytest.mark.parametrize("vectors", [torch.zeros(1, 1, 4, 3), torch.ones(1, 1, 4, 3)])
def test_ties_go_to_the_first_bucket(vectors):
    rotations = torch.tensor([[1.0, -1.0, 1.0]]).expand(3, 3).reshape(1, 1, 3, 1, 3)
    projected = vectors @ rotations[0, 0, :, 0]
    wanted = torch.cat([projected, -projected], -1).argmax(-1)
    assert hash_vectors(vectors, rotations, 6)[:, :, 0].tolist() == wanted.tolist()


# lengths that do not fit


def ragged_oracle(layer: LSHAttention, x: torch.Tensor) -> torch.Tensor:
    """LSH attention of an odd length, by a dense matrix over chunks of which the last is short."""
    query, value = layer.heads(layer.to_qk(x)), layer.heads(layer.to_v(x))
    batch, heads, length, _ = query.shape
    padded = length + -length % layer.multiple
    buckets = hash_vectors(query, layer.rotations, layer.buckets_for(padded))
    found = sort_by_bucket(buckets)
    per_round = padded // layer.chunk
    chunk_of = found.places.long() // layer.chunk
    code = chunk_of + torch.arange(layer.rounds)[:, None] * per_round
    ids = torch.empty_like(found.buckets)
    ids.scatter_(-1, found.order.long(), found.buckets)
    count = torch.zeros(batch * heads, length, length, dtype=x.dtype)
    for one, other, step in itertools.product(
        range(layer.rounds), range(layer.rounds), range(-layer.rules.before, layer.rules.after + 1)
    ):
        target = (code[:, one, :, None] + step) % (layer.rounds * per_round)
        seen = target == code[:, other, None, :]
        if layer.rules.same_bucket:
            seen = seen & (one == other) & (ids[:, one, :, None] == ids[:, one, None, :])
        count += seen
    if layer.causal:
        count = count.tril()
    if layer.rules.count == "union":
        count = count.clamp_max(1)
    alone = torch.eye(length, dtype=torch.bool)
    count = count.masked_fill(alone, 0)
    query, value = query.flatten(0, 1), value.flatten(0, 1)
    weight = count * (query @ layer.rules.keys(query).mT).exp()
    weight = torch.where((count.sum(-1, keepdim=True) == 0) & alone, 1.0, weight)
    out = weight / weight.sum(-1, keepdim=True) @ value
    return layer.merged(out.unflatten(0, (batch, heads)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rules", ["paper", "trax_v2", "lucidrains"])
@pytest.mark.parametrize("length", [29, 32, 17])
def test_odd_lengths_equal_a_ragged_last_chunk(causal, rules, length):
    """Also three chunks, of which lucidrains' rules cannot make an even number of buckets."""
    layer = LSHAttention(12, 2, rounds=2, chunk=8, rules=rules, causal=causal).double().eval()
    buckets = layer.buckets_for(length + -length % layer.multiple)
    layer.rotations = draw_rotations(6, 2, buckets, heads=2, seed=0)
    x = array(3, (2, length, 12)).double()
    torch.testing.assert_close(layer(x)[0], ragged_oracle(layer, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["lsh", "local", "full"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_of_the_caller_is_not_seen(kind, causal):
    """Whatever stands in masked positions changes nothing for the others."""
    torch.manual_seed(0)
    kinds = {"lsh": LSHAttention, "local": LocalAttention, "full": FullAttention}
    layer = kinds[kind](12, 2, chunk=8, causal=causal).double().eval()
    x = array(3, (2, 40, 12)).double()
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, 33:], valid[1, 21:] = False, False
    other = torch.where(valid[..., None], x, 100.0)
    first, second = (layer(one, valid)[0][valid] for one in (x, other))
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


def test_local_attention_of_an_odd_length_is_that_of_the_dense_mask():
    torch.manual_seed(0)
    layer = LocalAttention(12, 2, chunk=8, causal=True, before=1).double().eval()
    x = array(3, (1, 21, 12)).double()
    query, key, value = (layer.heads(one(x)) for one in (layer.to_q, layer.to_k, layer.to_v))
    place = torch.arange(21)
    near = torch.isin(place[:, None] // 8 - place[None, :] // 8, torch.tensor([0, 1]))
    near &= place[None, :] <= place[:, None]
    wanted = layer.merged(F.scaled_dot_product_attention(query, key, value, near))
    torch.testing.assert_close(layer(x)[0], wanted, rtol=1e-9, atol=1e-9)
