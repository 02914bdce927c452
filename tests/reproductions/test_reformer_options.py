"""Reformer's randomness, which must repeat; its options; bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from reformer_tools import array
from torch import nn

import harness
from reproductions.reformer.attention import FullAttention, LocalAttention, LSHAttention
from reproductions.reformer.convert import from_hugging_face, from_hugging_face_encoder
from reproductions.reformer.hashing import (
    buckets_hugging_face,
    buckets_lucidrains,
    draw_rotations,
    hash_vectors,
)
from reproductions.reformer.language_model import ReformerLM, reformer_lm
from reproductions.reformer.layers import AxialPositions, FeedForward, PreNormAttention
from reproductions.reformer.model import benchmark_vit, fitting_chunk, reformer_vit
from reproductions.reformer.reversible import ReversibleBlock, ReversibleStack
from reproductions.reformer.rules import RULES, get_rules
from reproductions.reformer.windows import Windows


def small_stack(reversible: bool, depth: int = 3, rate: float = 0.1, chunk_size: int = 0):
    torch.manual_seed(0)

    def block(index):
        attention = LSHAttention(16, 2, chunk=8, attn_drop=rate, rotation_seed=index)
        if index == 1:
            attention = LocalAttention(16, 2, chunk=8, attn_drop=rate, causal=True)
        drop = nn.Dropout(rate)
        feed_forward = FeedForward(16, 32, chunk_size=chunk_size, drop_rate=rate)
        return ReversibleBlock(PreNormAttention(16, attention, drop), feed_forward)

    return ReversibleStack((block(index) for index in range(depth)), reversible).double().train()


@pytest.mark.parametrize("chunk_size", [0, 12])
def test_gradients_with_dropout_are_those_of_an_ordinary_stack(chunk_size):
    """New rotations, dropout in attention, tokens and feed-forward: all of it repeats."""
    found = []
    for reversible in (True, False):
        stack = small_stack(reversible, chunk_size=chunk_size)
        x = array(7, (2, 32, 16)).double().requires_grad_()
        torch.manual_seed(5)
        first, second = stack(x, x)
        state = torch.get_rng_state()
        (first * second.cos()).sum().backward()
        assert torch.equal(torch.get_rng_state(), state), "the backward pass draws nothing anew"
        grads = [one.grad for one in stack.parameters()]
        found.append([first.detach(), second.detach(), x.grad, *grads])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


def test_dropout_is_random_and_decided_by_torchs_state():
    stack, x = small_stack(True), array(7, (2, 32, 16)).double()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(torch.cat(stack(x, x)))
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])


def test_a_reversible_stack_keeps_no_activations():
    """What autograd saves does not grow with depth; of an ordinary stack it does."""

    def saved(depth: int, reversible: bool) -> int:
        stack, x = small_stack(reversible, depth), array(7, (2, 32, 16)).double()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda one: (sizes.append(one.numel()), one)[1], lambda one: one
        ):
            stack(x, x)
        return sum(sizes)

    assert saved(1, True) == saved(6, True)
    assert saved(6, False) > 5 * saved(1, False)


def test_mixed_precision_is_repeated_in_the_backward_pass():
    grads = []
    for reversible in (True, False):
        stack = small_stack(reversible, rate=0.0).float()
        x = array(7, (2, 32, 16)).requires_grad_()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            first, second = stack(x, x)
        (first.float() * second.float().cos()).sum().backward()
        grads.append(x.grad)
    assert (grads[0] - grads[1]).norm() <= 2e-2 * grads[1].norm()


@pytest.mark.parametrize("mixed", [True, False])
def test_precision_is_that_of_the_forward_pass(mixed):
    """Wherever `backward` is called: what is computed again must be what was computed."""
    x, grads = array(7, (2, 32, 16)).requires_grad_(), []
    for in_backward in (True, False):
        stack = small_stack(True).float()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = torch.cat(stack(x, x)).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_backward):
            grads.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("causal", [True, False])
def test_full_attention_in_sections_is_the_same(causal, monkeypatch):
    torch.manual_seed(0)
    layer, x = FullAttention(12, 2, causal=causal).eval(), array(3, (2, 21, 12))
    valid = torch.ones(2, 21, dtype=torch.bool)
    valid[0, 15:] = False
    whole = layer(x, valid)[0]
    monkeypatch.setattr("reproductions.reformer.attention.DENSE_BIAS", 5 * 21)
    torch.testing.assert_close(layer(x, valid)[0], whole)


def test_evaluation_is_fixed_by_its_seed():
    x, kept = array(3, (1, 32, 12)), []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        layer = LSHAttention(12, 2, chunk=8, rotation_seed=seed).eval()
        kept.append(layer(x)[0])
    assert torch.equal(kept[0], kept[1]) and not torch.allclose(kept[0], kept[2])


def test_more_rounds_come_nearer_to_full_attention():
    layer = LSHAttention(32, 2, chunk=8, rules="paper").eval()
    full = FullAttention(32, 2, rules="paper").eval()
    full.load_state_dict(layer.state_dict())
    x, errors = 2 * array(3, (2, 64, 32)), []
    with torch.no_grad():
        for rounds in (1, 4, 16, 64):
            layer.eval_rounds = rounds
            errors.append(float((layer(x)[0] - full(x)[0]).norm() / full(x)[0].norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


class OutputAlone(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


@pytest.mark.parametrize("rules", ["trax_v2", "paper"])
def test_a_program_takes_any_batch(rules):
    """Rows and chunks go through in blocks, whose number may not be written into a program."""
    model = OutputAlone(LSHAttention(8, 2, chunk=4, rules=rules)).eval()
    batch, x = torch.export.Dim("batch", min=1, max=2**31 - 1), array(1, (5, 32, 8))
    with torch.no_grad():
        wanted = model(x)
        program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(program(x), wanted)


# options, and bad input


OPTIONS = [
    {"axial": True}, {"ff_chunk": 5}, {"rules": "paper"}, {"qkv_bias": True},
    {"patch_size": 8, "chunk": 5},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_the_vision_model(options):
    torch.manual_seed(0)
    model = harness.build("reformer_vit_micro", **options).eval()
    images = array(0, (2, 3, 32, 32))
    with torch.no_grad():
        plain = model(images)
        assert plain.shape == (2, 10) and plain.isfinite().all()
        if "ff_chunk" in options:
            torch.manual_seed(0)
            whole = harness.build("reformer_vit_micro").eval()
            torch.testing.assert_close(plain, whole(images))


def test_rounds_can_be_changed_later():
    torch.manual_seed(0)
    model = harness.build("reformer_vit_micro", eval_rounds=2).eval()
    torch.manual_seed(0)
    other = harness.build("reformer_vit_micro", eval_rounds=8).eval()
    images = array(0, (2, 3, 32, 32))
    with torch.no_grad():
        before = model(images)
        model.set_rounds(eval_rounds=8)
        assert torch.equal(model(images), other(images)) and not torch.equal(before, model(images))
        for wrong in ({"rounds": 0}, {"eval_rounds": -1}):
            with pytest.raises(ValueError, match="at least one round"):
                model.set_rounds(**wrong)
        assert torch.equal(model(images), other(images)), "a refused change changes nothing"


def test_a_new_head_is_where_the_network_is():
    model = harness.build("reformer_vit_micro", depth=1).double()
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.float64
    assert model(array(0, (1, 3, 32, 32)).double()).shape == (1, 3)


def test_buckets_of_transformers_depend_on_its_positions():
    """Above 2 max(sqrt(positions / chunk), chunk) there are two factors."""
    options = {"dim": 16, "num_heads": 2, "layers": ("lsh",), "chunk": 8, "rules": "hugging_face"}
    axial = {"positions": "axial", "axial_shape": (16, 16), "axial_dims": (8, 8)}
    for more in ({"max_length": 256}, axial):
        (layer,) = (one for one in ReformerLM(10, **options, **more).modules()
                    if isinstance(one, LSHAttention))  # fmt: skip
        assert layer.buckets_for(64) == 16 and layer.buckets_for(128) == (4, 8)
    assert buckets_hugging_face(128, 8, max_positions=4096) == 32


def test_old_checkpoints_of_transformers_hold_constants():
    layer = "encoder.layers.0.attention.self_attention."
    names = [f"{layer}{one}mask_value_float{bits}" for one in ("", "self_") for bits in (16, 32)]
    weight = {f"{layer}query_key.weight": torch.zeros(1)}
    state = {**weight, **dict.fromkeys(names, torch.zeros(()))}
    found = from_hugging_face({f"reformer.{key}": one for key, one in state.items()})
    assert list(found) == ["stack.blocks.0.attention.attention.to_qk.weight"]
    inner = {key.removeprefix("encoder."): one for key, one in state.items()}
    assert list(from_hugging_face_encoder(inner)) == ["blocks.0.attention.attention.to_qk.weight"]


def test_stochastic_depth_is_replayed():
    grads = []
    for reversible in (True, False):
        torch.manual_seed(0)
        options = {"drop_path_rate": 0.5, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
        model = harness.build("reformer_vit_micro", reversible=reversible, **options).train()
        torch.manual_seed(1)
        model(array(0, (4, 3, 32, 32))).square().sum().backward()
        grads.append(torch.cat([one.grad.flatten() for one in model.parameters()]))
    assert (grads[0] - grads[1]).norm() <= 1e-4 * grads[1].norm()


def test_the_chunk_fits_the_number_of_patches():
    assert [fitting_chunk(one) for one in (196, 64, 576, 1024, 49)] == [14, 8, 24, 32, 8]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LSHAttention(12, 2, num_buckets=7), "even"),
        (lambda: LSHAttention(12, 2, num_buckets=(4, 3)), "even"),
        (lambda: LSHAttention(12, 2, num_buckets=4.0), "even"),
        (lambda: LSHAttention(12, 2, eval_rounds=0), "at least one round"),
        (lambda: LSHAttention(12, 0), "into 0 heads"),
        (lambda: LSHAttention(12, 2)(torch.zeros(1, 0, 12)), "empty sequence"),
        (lambda: LSHAttention(12, 2)(torch.zeros(1, 8, 12), torch.ones(1, 7)), r"must be \(1, 8\)"),
        (lambda: reformer_lm(10, 8, dim=16).loss(*2 * [torch.zeros(1, 8).long()], -1), "not -1"),
        (lambda: draw_rotations(4, 1, 8, sharing="nobody"), "known: example_head, head, all"),
        (lambda: LSHAttention(12, 5), "width 12 does not divide into 5 heads"),
        (lambda: LSHAttention(12, 2, rounds=0), "at least one round"),
        (lambda: LSHAttention(12, 2, chunk=0), "at least one token"),
        (lambda: LSHAttention(12, 2, attn_drop=1.0), "dropout"),
        (lambda: buckets_lucidrains(24, 8), "even"),
        (lambda: get_rules("tensor2tensor"), "known: paper, trax_v2, hugging_face, lucidrains"),
        (lambda: Windows(10, 4), "chunk 4 does not divide length 10"),
        (lambda: Windows(8, 4, before=-1), "below 0"),
        (lambda: AxialPositions((4, 4), (8, 8))(17), "17 is longer than the axial grid 4x4 = 16"),
        (lambda: AxialPositions((4, 4), (8,)), "one width per axis"),
        (lambda: reformer_lm(10, 8, dim=16)(torch.zeros(1, 9, dtype=torch.long)), "9 is longer"),
        (lambda: ReformerLM(10, layers=("lsh", "sparse")), "lsh, local, full"),
        (lambda: ReformerLM(10, positions="axial", axial_shape=(4, 4), axial_dims=(8, 8)), "256"),
        (lambda: FeedForward(8, 8, activation="swish"), "known: relu, gelu"),
        (lambda: reformer_vit(10, 30, patch_size=16), "multiple of 16"),
        (lambda: reformer_vit(10, 32, patch_size=0), "patch_size must be a whole number from 1 on"),
        (lambda: reformer_vit(10, 32, embed_dim=0), "embed_dim must be a whole number from 1 on"),
        (lambda: benchmark_vit(10, 32, depth=-1), "depth must be a whole number from 1 on, not -1"),
        (lambda: reformer_vit(10, 32, mlp_ratio=0), "mlp_ratio must be positive"),
        (lambda: reformer_vit(10, 32, drop_path_rate=1.5), r"must be in \[0, 1\), not 1.5"),
        (lambda: reformer_vit(10, 32, before=-1), "must not be below 0"),
        (lambda: reformer_vit(10, 32, rounds=1.5), "at least one round of hashing, not 1.5"),
        (
            lambda: hash_vectors(torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 3, 1, 2), 8),
            "4 columns",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(build, words):
    with pytest.raises(ValueError, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_all_rules_run_on_both_directions():
    x = array(3, (2, 64, 16))
    for name, causal in itertools.product(RULES, (True, False)):
        layer = LSHAttention(16, 2, chunk=16, rules=name, causal=causal).train()
        out, buckets = layer(x)
        assert out.shape == x.shape and out.isfinite().all() and buckets.dtype == torch.int16


def test_more_buckets_than_a_short_number_holds():
    layer = LSHAttention(8, 1, chunk=2, rounds=1, rules="paper").eval()
    x = array(3, (1, 40_000, 8))
    buckets = layer(x)[1]
    assert buckets.dtype == torch.int32 and buckets.min() >= 0 and buckets.max() > 32_767
