"""DynamicViT's two forms, dropping and masking, against each other; its rivals and other bases."""

import numpy as np
import pytest
import torch
from torch import nn

import harness
from harness.meta import on_meta
from reproductions.dynamicvit.model import dynamicvit_micro
from reproductions.dynamicvit.predictor import RandomOrder


def trained(**options) -> nn.Module:
    """A micro model as after some training: no layer is too small to matter."""
    torch.manual_seed(0)
    model = dynamicvit_micro(10, 32, **options).eval()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.05 * torch.randn_like(one))
    return model


def images(batch: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_masked_training_form_is_the_dropping_form():
    """Noise that forces the evaluation's choice: what is masked there is gone here."""
    model, x = trained(), images()
    logits, kept = model.forward_with_tokens(x)
    noise = [torch.stack([one := torch.full((4, 64), -1e4).scatter(1, places, 1e4), -one], dim=-1)
             for places in kept]  # fmt: skip
    output = model.forward_train(x, noise)
    assert output.decisions.sum(dim=2).round().tolist() == [list(model.keep_counts())] * 4
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=2e-5)
    last = output.mask.nonzero()[:, 1].view(4, -1)
    assert torch.equal(last, kept[-1].sort(dim=1).values)


@torch.no_grad()
def test_keeping_everything_is_the_dense_network():
    x = images()
    model = trained(keep_ratio=1.0)
    logits, kept = model.forward_with_tokens(x)
    torch.testing.assert_close(model.dense()(x), logits, rtol=1e-4, atol=1e-5)
    assert [one.shape[1] for one in kept] == [64, 64, 64]


@torch.no_grad()
def test_dense_network_is_vit_micro():
    model = trained()
    plain = harness.build("vit_micro").eval()
    state = model.dense().state_dict()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(images()), model.dense()(images()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_kept_tokens_shrink_and_are_places_of_the_grid():
    model = trained(keep_ratio=[0.9, 0.5, 0.1])
    _, kept = model.forward_with_tokens(images())
    assert model.keep_counts() == (57, 32, 6) and model.keep_counts(48) == (129, 72, 14)
    for before, after in zip([torch.arange(64).expand(4, -1), *kept], kept, strict=False):
        assert all(set(b.tolist()) <= set(a.tolist()) for a, b in zip(before, after, strict=True))
    assert all(len(set(row.tolist())) == 6 for row in kept[-1])
    assert kept[-1][0].tolist() != kept[-1][1].tolist(), "the choice depends on the image"


@pytest.mark.parametrize("scorer", ["random", "attention"])
@torch.no_grad()
def test_rivals_keep_as_many_tokens_without_a_predictor(scorer):
    model, x = trained(scorer=scorer), images()
    assert [key for key, _ in model.named_parameters() if "predictor" in key] == []
    logits, kept = model.forward_with_tokens(x)
    assert [one.shape[1] for one in kept] == [44, 31, 21]
    assert torch.equal(model(x), logits)
    torch.testing.assert_close(model(x[2:3]), logits[2:3], rtol=1e-4, atol=1e-5)
    output = model.train().forward_train(x)
    assert output.decisions.sum(dim=2).tolist() == [[44, 31, 21]] * 4
    assert (output.decisions[:, 1:] <= output.decisions[:, :-1]).all()
    other = model.forward_train(x).decisions
    assert torch.equal(output.decisions, other) == (scorer == "attention")


@torch.no_grad()
def test_class_attention_is_the_blocks_own():
    block = trained().blocks[2]
    x = torch.randn(2, 9, 64)
    q, k, _ = (one.unflatten(-1, (4, 16)).transpose(1, 2) for one in block.attn.qkv(x).chunk(3, -1))
    weights = (q @ k.transpose(-2, -1) / 4).softmax(-1).mean(1)[:, 0, 1:]
    torch.testing.assert_close(block.attn.class_attention(x), weights)


def test_random_order_is_fixed_in_evaluation_only():
    order, tokens = RandomOrder(9, seed=1), torch.zeros(2, 9, 4)
    assert torch.equal(order.eval()(tokens), RandomOrder(9, seed=1).eval()(tokens))
    assert not torch.equal(order(tokens), RandomOrder(9, seed=2).eval()(tokens))
    assert not torch.equal(order.train()(tokens)[0], order(tokens)[1])


@pytest.mark.parametrize("name", ["lvvit_s", "swin_t", "convnext_t"])
@torch.no_grad()
def test_other_bases_at_another_size_and_deployed(name):
    torch.manual_seed(0)
    model = harness.build(f"dynamicvit_{name}_k07", num_classes=5, image_size=64).eval()
    for one in model.parameters():
        one.add_(0.05 * torch.randn_like(one))
    x = torch.randn(2, 3, 64, 64)  # two images: where the released Swin fails
    logits, kept = model.forward_with_tokens(x)
    assert logits.isfinite().all() and [one.shape[1] for one in kept] == list(model.keep_counts())
    torch.testing.assert_close(model(x[:1]), logits[:1], rtol=1e-3, atol=1e-4)
    deployed = harness.deploy(model, 64)
    assert (deployed(x) - logits).norm() <= 1e-5 * logits.norm()
    dense = model.dense()
    state = dense.state_dict()
    assert not any("predictor" in key or "fast" in key for key in state)
    rebuilt = harness.build(f"dynamicvit_{name}_k07", 5, 64, pruning_loc=[]).eval()
    rebuilt.load_state_dict(state)
    assert torch.equal(rebuilt(x), dense(x)) and not torch.allclose(dense(x), logits)


@pytest.mark.parametrize("name", ["micro", "lvvit_s_k07", "swin_t_k07", "convnext_t_k07"])
@torch.no_grad()
def test_without_classes_the_features_are_the_answer(name):
    with on_meta():
        model = harness.build(f"dynamicvit_{name}", num_classes=0, image_size=64).eval()
        x = torch.empty(2, 3, 64, 64)
        assert model(x).shape == (2, model.num_features)
        model.reset_classifier(5)
        assert model(x).shape == (2, 5)
        model.reset_classifier(0)
        assert model(x).shape == (2, model.num_features)


def test_numbers_of_numpy_are_numbers():
    model = dynamicvit_micro(10, 32, np.float64(0.5), [np.int64(2), np.int64(4)])
    assert model.keep_ratios == (0.5, 0.25) and model.pruning_loc == (2, 4)


@torch.no_grad()
def test_two_speeds_with_everything_slow_is_the_dense_network():
    for name in ("swin_t", "convnext_t"):
        torch.manual_seed(0)
        model = harness.build(f"dynamicvit_{name}_k07", 5, 64, keep_ratio=[1.0] * 3).eval()
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(model(x), model.dense()(x), rtol=1e-4, atol=1e-5)
