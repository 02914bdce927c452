"""Reformer against the fixtures: hashing, and LSH, local and full attention in four forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from golden_tools import filled_state_dict, golden_cases, load_golden
from reformer_tools import array, assert_probed, crc, numbered, probe

from reproductions.reformer.attention import LocalAttention, LSHAttention, shared_qk_attention
from reproductions.reformer.chunked import attention_maps, chunked_attention
from reproductions.reformer.hashing import (
    buckets_hugging_face,
    buckets_trax,
    factorised,
    hash_vectors,
    rotation_columns,
    sort_by_bucket,
    total_buckets,
)
from reproductions.reformer.rules import HUGGING_FACE, LUCIDRAINS, PAPER, TRAX_V2
from reproductions.reformer.windows import Windows


def cases(name: str, *functions: str) -> list:
    return [one for one in golden_cases(name) if one.values[0]["function"] in functions]


def plain(buckets) -> list[int]:
    return [buckets] if isinstance(buckets, int) else list(buckets)


@pytest.mark.parametrize("case", cases("reformer/lsh_hash", "hf_hash"))
def test_buckets_and_permutations_of_transformers(case):
    spec, expected = case["spec"], case["expected"]
    vectors, buckets = array(spec["vectors"]["seed"], spec["vectors"]["shape"]), spec["num_buckets"]
    batch, heads, length, width = vectors.shape
    shape = (1, heads, width, spec["num_hashes"], rotation_columns(buckets))
    valid = None
    if "mask_last" in spec:
        valid = torch.ones(batch, length, dtype=torch.bool)
        valid[:, -spec["mask_last"] :] = False
    found = hash_vectors(vectors, array(spec["rotations"]["seed"], shape), buckets, valid)
    total = total_buckets(buckets, padded=valid is not None)
    assert numbered(found, total).flatten(2).tolist() == expected["buckets"]
    ordered = sort_by_bucket(found)
    assert ordered.sticker[0].tolist() == expected["sorted_idx_b0h0"]
    assert ordered.undo[0].tolist() == expected["undo_sort_b0h0"]
    assert crc(ordered.sticker) == expected["sorted_crc32"]
    assert crc(ordered.undo) == expected["undo_crc32"]


@pytest.mark.parametrize("case", golden_cases("reformer/lsh_hash_lucidrains"))
def test_buckets_of_lucidrains(case):
    spec = case["spec"]
    vectors = array(spec["vecs"]["seed"], spec["vecs"]["shape"])
    rows = len(vectors) if spec.get("per_head") else 1
    shape = (1, rows, vectors.shape[-1], spec["n_hashes"], spec["n_buckets"] // 2)
    rotations = array(spec["rotations"]["seed"], shape)
    found = hash_vectors(vectors[None], rotations, spec["n_buckets"])[0]
    assert numbered(found, spec["n_buckets"]).flatten(1).tolist() == case["expected"]["buckets"]


@pytest.mark.parametrize("case", cases("reformer/lsh_hash_trax", "t1_hash", "t2_hash"))
def test_buckets_of_the_authors(case):
    spec, buckets = case["spec"], case["spec"]["n_buckets"]
    if spec.get("factorize_hash"):
        buckets = factorised(buckets)
    vectors = array(spec["vecs"]["seed"], spec["vecs"]["shape"])
    rotations = array(spec["rotations"]["seed"], spec["rotations"]["shape"])
    found = hash_vectors(vectors[None, None], rotations[None, None], buckets)[0, 0]
    if case["function"] == "t1_hash":
        found = numbered(found, total_buckets(buckets)).flatten()
    assert found.tolist() == case["expected"]["buckets"]


def test_automatic_numbers_of_buckets():
    for name, rule, key in (
        ("lsh_hash", buckets_hugging_face, "num_buckets"),
        ("lsh_hash_trax", buckets_trax, "n_buckets"),
    ):
        (case,) = (one for one in load_golden(f"reformer/{name}")["cases"] if "grid" in one["spec"])
        found = [plain(rule(*row)) for row in case["spec"]["grid"]]
        assert found == [plain(one) for one in case["expected"][key]]


@pytest.mark.parametrize("case", golden_cases("reformer/lsh_attention_paper"))
def test_attention_of_the_paper(case):
    """Tokens that see only themselves included, whose rounding is that of the authors' code."""
    spec, expected = case["spec"], case["expected"]
    query = array(spec["qk"]["seed"], spec["qk"]["shape"]).requires_grad_()
    value = array(spec["v"]["seed"], spec["qk"]["shape"]).requires_grad_()
    rotations = array(spec["rotations"]["seed"], spec["rotations"]["shape"])[None, None]
    buckets = hash_vectors(query[None, None], rotations, spec["n_buckets"])
    assert numbered(buckets, spec["n_buckets"]).flatten().tolist() == expected["buckets"]
    length, once = len(query), not spec["allow_duplicate_attention"]
    windows = Windows(
        length, length // spec["n_bins"], spec["n_hashes"], sorted=sort_by_bucket(buckets),
        causal=True, same_bucket=not spec["attend_across_buckets"], union=once,
        self_penalty=PAPER.self_penalty,
    )  # fmt: skip
    key = PAPER.keys(query)
    out = chunked_attention(query[None], key[None], value[None], windows)[0]
    (out * probe(out.shape)).sum().backward()
    assert_probed(out, expected["output"])
    torch.testing.assert_close(out[0], torch.tensor(expected["row0"]), rtol=1e-6, atol=1e-6)
    assert_probed(query.grad, expected["grad_qk"])
    assert_probed(value.grad, expected["grad_v"])


@pytest.mark.parametrize("case", golden_cases("reformer/lsh_attention_trax_v2"))
def test_attention_of_the_authors_later_code(case):
    spec, expected = case["spec"], case["expected"]
    tokens = array(spec["x"]["seed"], spec["x"]["shape"])
    width, d_qk, d_v = tokens.shape[1], spec["d_qk"], spec["d_v"]
    rules = TRAX_V2.changed(before=spec["n_chunks_before"], after=spec["n_chunks_after"])
    layer = LSHAttention(
        width, 1, d_qk, rounds=spec["n_hashes"], num_buckets=spec["n_buckets"], rules=rules,
        causal=spec["causal"], chunk=spec["chunk_len"],
    ).eval()  # fmt: skip
    shapes = {"to_qk": (width, d_qk), "to_v": (width, d_v), "to_out": (d_v, width)}
    for seed, (name, shape) in zip(spec["weights"]["seeds"], shapes.items(), strict=True):
        weight = array(seed, shape) / np.float32(math.sqrt(shape[0]))
        getattr(layer, name).weight.data = weight.T.contiguous()
    layer.rotations = array(spec["rotations"]["seed"], spec["rotations"]["shape"])[None, None]
    out, buckets = layer(tokens[None])
    total = total_buckets(spec["n_buckets"])
    assert numbered(buckets[0, 0], total).flatten().tolist() == expected["buckets"]
    assert_probed(out[0], expected["output"])


def hf_layer(spec: dict, expected: dict) -> torch.nn.Module:
    options = {"causal": spec["causal"], "chunk": spec["chunk"]}
    size = (spec["hidden"], spec["heads"], spec["head_size"])
    before, after = spec.get("before", 1), spec.get("after", 0)
    names = {"query_key": "to_qk", "query": "to_q", "key": "to_k", "value": "to_v"}
    state = {
        f"{names[key.split('.')[0]]}.weight": one
        for key, one in filled_state_dict(expected["state_dict"]).items()
    }
    if "to_q.weight" in state:
        layer = LocalAttention(*size, before=before, after=after, **options)
    else:
        rules = HUGGING_FACE.changed(before=before, after=after)
        layer = LSHAttention(
            *size, rounds=spec["num_hashes"], num_buckets=spec["num_buckets"], rules=rules,
            **options,
        )  # fmt: skip
        columns = rotation_columns(spec["num_buckets"])
        shape = (spec["heads"], spec["head_size"], spec["num_hashes"], columns)
        if "torch_manual_seed" in spec:
            torch.manual_seed(spec["torch_manual_seed"])
            layer.rotations = torch.randn(shape)[None]
        else:
            layer.rotations = array(spec["rotations"]["seed"], shape)[None]
    inner = spec["heads"] * spec["head_size"]  # the fixture ends before the output projection
    layer.to_out = torch.nn.Identity() if inner != spec["hidden"] else layer.to_out
    if inner == spec["hidden"]:
        state["to_out.weight"] = torch.eye(inner)
    layer.load_state_dict(state)
    return layer.eval()


@pytest.mark.parametrize(
    "case", golden_cases("reformer/hf_lsh_attention") + golden_cases("reformer/hf_local_attention")
)
def test_attention_of_transformers(case):
    spec, expected = case["spec"], case["expected"]
    layer = hf_layer(spec, expected)
    shape = (spec["B"], spec["T"], spec["hidden"])
    tokens = array(spec["hidden_states"]["seed"], shape).requires_grad_()
    out, buckets = layer(tokens)
    (out * probe(out.shape)).sum().backward()
    assert_probed(out, expected["output"])
    assert_probed(tokens.grad, expected["grad_hidden"])
    assert (buckets is not None) == ("buckets_crc32" in expected)
    if buckets is None:
        return
    found = numbered(buckets, total_buckets(spec["num_buckets"]))
    assert found[0, 0].tolist() == expected["buckets_b0h0"]
    assert crc(found) == expected["buckets_crc32"]
    with torch.no_grad():
        query = layer.heads(layer.to_qk(tokens))
        key = layer.rules.keys(query)
        inside, _ = attention_maps(query.flatten(0, 1), key.flatten(0, 1), layer.windows(buckets))
    inside = inside.unflatten(0, (spec["B"], spec["heads"]))
    assert_probed(inside, expected["attention_probs"])


@pytest.mark.parametrize("case", golden_cases("reformer/lsh_attention_lucidrains"))
def test_attention_of_lucidrains(case):
    spec, expected = case["spec"], case["expected"]
    query = array(spec["qk"]["seed"], spec["qk"]["shape"]).requires_grad_()
    value = array(spec["v"]["seed"], spec["qk"]["shape"]).requires_grad_()
    if case["function"] == "lr_full":
        out = shared_qk_attention(query[None], value[None], LUCIDRAINS, spec["causal"])[0]
    else:
        rotations = array(spec["rotations"]["seed"], expected["rotations_shape"])[None]
        length, total = query.shape[1], query.shape[1] // spec["bucket_size"]
        buckets = hash_vectors(query[None], rotations, total)
        found = numbered(buckets[0], total).flatten(1)
        assert found[0].tolist() == expected["buckets_0"]
        assert crc(found) == expected["buckets_crc32"]
        windows = Windows(
            length, spec["bucket_size"], spec["n_hashes"], sorted=sort_by_bucket(buckets),
            causal=spec["causal"], same_bucket=not spec["attend_across_buckets"],
            union=not spec["allow_duplicate_attention"], self_penalty=LUCIDRAINS.self_penalty,
            hidden=LUCIDRAINS.hidden,
        )  # fmt: skip
        key = LUCIDRAINS.keys(query)
        out = chunked_attention(query, key, value, windows)
        assert_probed(attention_maps(query, key, windows)[1], expected["dense_attn"])
    (out * probe(out.shape)).sum().backward()
    assert_probed(out, expected["output"])
    assert_probed(query.grad, expected["grad_qk"])
    assert_probed(value.grad, expected["grad_v"])
