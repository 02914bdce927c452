"""Reformer against the fixtures: reversible stacks, the language model, the vision models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_tools import filled_state_dict, golden_cases, golden_input, load_golden
from reformer_tools import array, assert_gradients, assert_probed, crc, numbered, probe
from torch import nn

import harness
from harness.measurement.macs import count_macs
from harness.measurement.macs_fvcore import count_macs_fvcore, explain_gap
from harness.meta import on_meta
from harness.registry import get_variant
from reproductions.reformer.attention import LocalAttention, LSHAttention
from reproductions.reformer.chunked import chunked_attention
from reproductions.reformer.convert import (
    from_hugging_face,
    from_hugging_face_encoder,
    from_lucidrains,
)
from reproductions.reformer.hashing import hash_vectors, rotation_columns, sort_by_bucket
from reproductions.reformer.language_model import ReformerLM
from reproductions.reformer.layers import AxialPositions, FeedForward, PreNormAttention
from reproductions.reformer.model import set_rotations
from reproductions.reformer.reversible import ReversibleBlock, ReversibleStack
from reproductions.reformer.rules import PAPER
from reproductions.reformer.windows import Windows

both_ways = pytest.mark.parametrize("reversible", [True, False])


class FeedForwardAsAttention(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, valid=None, buckets=None):
        return self.inner(x), None


def lsh_layers(model: nn.Module) -> list[LSHAttention]:
    return [one for one in model.modules() if isinstance(one, LSHAttention)]


@both_ways
@pytest.mark.parametrize("case", golden_cases("reformer/reversible_ff_stack"))
def test_stack_of_feed_forwards(case, reversible):
    spec, expected = case["spec"], case["expected"]

    def part(ratio):
        return FeedForward(spec["dim"], ratio * spec["dim"], eps=1e-5)

    stack = ReversibleStack(
        (
            ReversibleBlock(FeedForwardAsAttention(part(spec["mult_f"])), part(spec["mult_g"]))
            for _ in range(spec["depth"])
        ),
        reversible,
    )

    def name(key: str) -> str:
        key = key.replace("irrev_blocks.", "blocks.").replace(".fn.w", ".fc")
        return key.replace(".f.", ".attention.inner.").replace(".g.", ".feed_forward.")

    filled = filled_state_dict(expected["fill_keys"])
    stack.load_state_dict({name(key): value for key, value in filled.items()})
    x = array(spec["x"]["seed"], spec["x"]["shape"]).requires_grad_()
    out = torch.cat(stack(*x.chunk(2, -1)), -1)
    (out * probe(out.shape)).sum().backward()
    assert_probed(out, expected["output"])
    assert_probed(x.grad, expected["grad_input"])
    assert_gradients(dict(stack.named_parameters()), expected["param_grads_sum_l2"], name)


@both_ways
@pytest.mark.parametrize("case", golden_cases("reformer/reversible_lsh_encoder"))
def test_encoder_of_lucidrains(case, reversible):
    spec, expected = case["spec"], case["expected"]
    dim = spec["dim"]

    def block():
        attention = LSHAttention(
            dim, spec["heads"], rounds=spec["n_hashes"], rules="lucidrains",
            chunk=spec["bucket_size"], out_bias=True, causal=spec.get("causal", False),
        )  # fmt: skip
        return ReversibleBlock(
            PreNormAttention(dim, attention, eps=1e-5),
            FeedForward(dim, spec["ff_mult"] * dim, eps=1e-5),
        )

    stack = ReversibleStack((block() for _ in range(spec["depth"])), reversible)
    assert sum(one.numel() for one in stack.parameters()) == expected["params"]
    stack.load_state_dict(from_lucidrains(filled_state_dict(expected["fill_keys"])))
    base, shape = spec["rotations"]["seed_base"], expected["rotations_shape"]
    set_rotations(stack, [array(base + i, shape)[None] for i in range(spec["depth"])])
    x = array(spec["x"]["seed"], spec["x"]["shape"]).requires_grad_()
    out = sum(stack(x, x)) / 2
    (out * probe(out.shape)).sum().backward()
    assert_probed(out, expected["output"])
    assert_probed(x.grad, expected["grad_input"])
    assert_gradients(
        dict(stack.named_parameters()), expected["param_grads_sum_l2"],
        lambda key: next(iter(from_lucidrains({key: None}))),
    )  # fmt: skip


@both_ways
@pytest.mark.parametrize("case", golden_cases("reformer/hf_reversible_stack"))
def test_encoder_of_transformers(case, reversible):
    spec, expected = case["spec"], case["expected"]
    dim, options = spec["hidden"], {"chunk": spec["chunk"], "causal": spec["causal"]}

    def block(kind):
        size = (dim, spec["heads"], spec["head_size"])
        attention = LocalAttention(*size, **options)
        if kind == "lsh":
            attention = LSHAttention(
                *size, rounds=spec["num_hashes"], num_buckets=spec["num_buckets"],
                rules="hugging_face", **options,
            )  # fmt: skip
        feed_forward = FeedForward(dim, spec["ff"], activation=spec["act"], eps=spec["ln_eps"])
        return ReversibleBlock(PreNormAttention(dim, attention, eps=spec["ln_eps"]), feed_forward)

    stack = ReversibleStack((block(kind) for kind in spec["attn_layers"]), reversible)
    stack.norm = nn.LayerNorm(2 * dim, eps=spec["ln_eps"])
    stack.load_state_dict(from_hugging_face_encoder(filled_state_dict(expected["state_dict"])))
    give_rotations(stack, spec)
    x = array(spec["hidden_states"]["seed"], (spec["B"], spec["T"], dim)).requires_grad_()
    out = stack.norm(torch.cat(stack.train()(x, x), -1))
    (out * probe(out.shape)).sum().backward()
    assert_probed(out, expected["output"])
    assert_probed(x.grad, expected["grad_input"])
    assert_gradients(
        dict(stack.named_parameters()), expected["param_grads_sum_l2"],
        lambda key: next(iter(from_hugging_face_encoder({key: None}))),
    )  # fmt: skip


def give_rotations(model: nn.Module, spec: dict) -> None:
    """Layer i of the whole stack, local ones counted, has seed base + i."""
    columns = rotation_columns(spec["num_buckets"])
    shape = (spec["heads"], spec["head_size"], spec["num_hashes"], columns)
    places = [i for i, kind in enumerate(spec["attn_layers"]) if kind == "lsh"]
    base = spec["rotations"]["seed_base"]
    set_rotations(model, [array(base + place, shape)[None] for place in places])


@pytest.mark.parametrize("case", golden_cases("reformer/reformer_lm_local_lsh"))
@pytest.mark.parametrize("chunked", [0, 48])
def test_language_model(case, chunked):
    spec, expected = case["spec"], case["expected"]
    model = ReformerLM(
        spec["vocab"], spec["hidden"], spec["heads"], spec["head_size"], spec["attn_layers"],
        spec["max_pos"], hidden=spec["ff"], positions="axial", axial_shape=spec["axial"]["shape"],
        axial_dims=spec["axial"]["dims"], chunk=spec["chunk"], local_chunk=spec["local_chunk"],
        rounds=spec["num_hashes"], num_buckets=spec["num_buckets"], rules="hugging_face",
        activation=spec["act"], eps=spec["ln_eps"], ff_chunk=chunked,
    ).eval()  # fmt: skip
    assert sum(one.numel() for one in model.parameters()) == expected["params"]
    model.load_state_dict(from_hugging_face(filled_state_dict(expected["state_dict"])))
    give_rotations(model, spec)
    seed, shape = spec["input_ids"]["seed"], (spec["B"], spec["T"])
    tokens = torch.from_numpy(np.random.RandomState(seed).randint(1, spec["vocab"], shape))
    checksums = []
    for layer in lsh_layers(model):
        layer.register_forward_hook(
            lambda _layer, _inputs, found: checksums.append(
                crc(numbered(found[1], spec["num_buckets"]))
            )
        )
    with torch.no_grad():
        logits = model(tokens)
    assert checksums == expected["buckets_crc32_per_lsh_layer"]
    assert_probed(logits, expected["logits"])
    last = torch.tensor(expected["last_position_first16"])
    torch.testing.assert_close(logits[:, -1, :16], last, rtol=1e-5, atol=1e-5)
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]
    loss = model.loss(tokens, targets, chunk_size=chunked)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    loss.backward()
    assert_gradients(
        dict(model.named_parameters()), expected["param_grads_sum_l2"],
        lambda key: next(iter(from_hugging_face({key: None}))),
    )  # fmt: skip


@pytest.mark.parametrize("case", golden_cases("reformer/axial_position"))
def test_axial_positions(case):
    spec, expected = case["spec"], case["expected"]
    table = AxialPositions(spec["shape"], spec["dims"])
    table.load_state_dict(filled_state_dict(expected["state_dict"]))
    found = table(spec["T"])
    assert_probed(found, expected["output"])
    torch.testing.assert_close(found[0, 17], torch.tensor(expected["row_17"]))


def test_benchmark_vit():
    fixture = load_golden("reformer/reformer_vit_tiny_patch16")
    state = filled_state_dict(fixture["state_dict"])
    model = harness.load_official("reformer_vit_tiny_patch16", state)
    assert sum(one.numel() for one in model.parameters()) == fixture["params"]
    (case,) = fixture["cases"]
    base, shape = case["spec"]["rotations"]["seed_base"], case["expected"]["rotations_shape"]
    set_rotations(model, [array(base + i, shape)[None] for i in range(12)])
    with torch.no_grad():
        assert_probed(model(golden_input(case["input_shape"])), case["expected"]["output"])


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_counts_of_the_benchmark(size):
    """Its MACs are printed sums: einsums with four digits, and norms."""
    printed = {"tiny": (5_272_552, 2_288_569_968), "small": (20_276_200, 6_649_761_120)}[size]
    variant = get_variant(f"reformer_vit_{size}_patch16")
    model = harness.build(variant.name).eval()
    assert sum(one.numel() for one in model.parameters()) == printed[0]
    assert variant.hook("paper_macs")(model, 224) == printed[1]


@pytest.mark.parametrize("name", ["reformer_vit_micro", "reformer_vit_tiny_patch16"])
def test_both_counters_see_the_same_products(name):
    """fvcore's surplus is what it counts for norms, and nothing else."""
    model = harness.build(name, depth=2)
    size = get_variant(name).spec.image_size
    macs = count_macs(model, size)
    gap = explain_gap(macs, count_macs_fvcore(model, size))
    assert [reason.operator for reason in gap.reasons] == ["layer_norm"]
    assert any("attention" in name for name in macs.by_operator)


@pytest.mark.parametrize(("size", "params"), [("tiny", 5_267_752), ("small", 20_266_600)])
def test_params_of_the_reversible_vit(size, params):
    with on_meta():
        model = harness.build(f"reformer_vit_{size}")
    assert sum(one.numel() for one in model.parameters()) == params


def test_rounds_recover_attention():
    """Union converges to full attention; multiplicity covers more and keeps a bias."""
    (case,) = load_golden("reformer/lsh_rounds_curve")["cases"]
    spec, expected = case["spec"], case["expected"]
    random, length = np.random.RandomState(spec["data_seed"]), spec["L"]
    centres = random.standard_normal((spec["clusters"], spec["d"]))
    labels = random.randint(0, spec["clusters"], length)
    noise = random.standard_normal((length, spec["d"]))
    query = torch.from_numpy((centres[labels] + spec["noise"] * noise).astype(np.float32))[None]
    value = torch.from_numpy(random.standard_normal((1, length, spec["d"])).astype(np.float32))
    key = PAPER.keys(query)
    scores = query @ key.mT
    scores[:, range(length), range(length)] = -5e4
    full = scores.softmax(-1) @ value
    for once, name in ((True, "paper_union_same_bucket"), (False, "window_with_multiplicity")):
        for rounds, error, _ in expected[name]:
            found = []
            for repeat in range(spec["repeats"]):
                seed = spec["rotation_seed_base"] + 10 * rounds + repeat
                rotations = array(seed, (1, 1, spec["d"], rounds, spec["n_buckets"] // 2))
                buckets = hash_vectors(query[None], rotations, spec["n_buckets"])
                windows = Windows(
                    length, spec["chunk"], rounds, sorted=sort_by_bucket(buckets),
                    same_bucket=once, union=once, self_penalty=-5e4,
                )  # fmt: skip
                out = chunked_attention(query, key, value, windows)
                found.append(float((out - full).norm() / full.norm()))
            assert np.mean(found) == pytest.approx(error, rel=0.02), (name, rounds)


@pytest.mark.parametrize("deployed", [False, True])
def test_what_is_hashed_is_rounded_as_torch_rounds_it(deployed, monkeypatch):
    """On a processor where other linear layers take another product, and in either form."""
    monkeypatch.setattr("harness.linear.mkl_holds_back", lambda: True)
    model = harness.build("reformer_vit_tiny_patch16", depth=2).eval()
    model = harness.deploy(model) if deployed else model
    hashed = [one for name, one in model.named_modules() if name.endswith("to_qk")]
    assert len(hashed) == 2
    x = torch.randn(8, 197, hashed[0].in_features)
    with torch.inference_mode():
        for layer in hashed:
            expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
            assert torch.equal(layer(x), expected)
