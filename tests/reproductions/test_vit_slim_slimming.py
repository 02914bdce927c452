"""Slimming in general: any timm ViT, any budget, tokens, files, deployment, bad input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from vit_slim_tools import filled

import harness
from harness import ReplivitError
from harness.checkpoints import read_state_dict
from harness.export import export
from reproductions.vit_slim.files import load_slim, read_kept, save_slim, write_kept
from reproductions.vit_slim.masks import compress, learned_scores, make_searchable
from reproductions.vit_slim.selection import Kept, Scores, choose, constant_scores, random_scores
from reproductions.vit_slim.slimming import BiasOnly, SlimLinear, magnitude_scores, slim, slim_to


def searched(**options) -> torch.nn.Module:
    """A small timm ViT with masks, all of whose weights and masks mean something."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}
    distilled = options.pop("distilled", False)
    kind = timm.models.deit.VisionTransformerDistilled if distilled else None
    kind = kind or timm.models.VisionTransformer
    model = make_searchable(kind(num_classes=5, **(sizes | options))).eval()
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.2 * torch.randn_like(one))
        for layer, block in enumerate(model.blocks):
            block.attn.patch_zeta.add_(torch.randn_like(block.attn.patch_zeta) - layer)
    return model


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))

KINDS = {
    "plain": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 3},
    "no bias": {"qkv_bias": False},
    "scales": {"init_values": 0.3, "pre_norm": True},
    "odd": {"num_heads": 2, "mlp_ratio": 2.6, "no_embed_class": True},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("rule", ["released", "paper"])
@torch.no_grad()
def test_slimmed_is_masked_on_any_vit(options, rule):
    model = searched(**options)
    budgets = (0.45, 0.35, 0.7)
    masked = copy.deepcopy(model)
    kept = compress(masked, *budgets, rule)
    expected = masked(IMAGES)
    assert not kept.all_tokens
    for mode in ("exact", "masked"):
        small = slim(model, *budgets, mode=mode, token_rule=rule)
        torch.testing.assert_close(small(IMAGES), expected, rtol=1e-4, atol=1e-5)
    drop = slim(model, *budgets, mode="drop", token_rule=rule)
    assert drop(IMAGES).shape == expected.shape
    assert not torch.allclose(drop(IMAGES), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_pooled_models_slim_but_keep_their_tokens():
    model = searched(class_token=False, global_pool="avg")
    small = slim(model, 0.5, 0.5)
    compress(model, 0.5, 0.5)
    torch.testing.assert_close(small(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"class token alone.*'avg'"):
        slim(model, 0.5, 0.5, 0.5)
    compress(model, 0.5, 0.5, 0.5)
    masked = slim(model, 0.5, 0.5, 0.5, mode="masked")
    torch.testing.assert_close(masked(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_training_and_inference_compute_the_same():
    small = slim(searched(), 0.45, 0.35, 0.7)
    with torch.enable_grad():
        taught = small.train()(IMAGES)
        taught.square().sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in small.parameters())
    torch.testing.assert_close(small.eval()(IMAGES), taught.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("held_back", [True, False])
@torch.inference_mode()
def test_odd_widths_on_either_kind_of_processor(held_back, monkeypatch):
    monkeypatch.setattr("harness.linear.mkl_holds_back", lambda: held_back)
    layer, x = SlimLinear(384, 691), torch.randn(2, 197, 384)
    out, expected = layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert (out.stride(1) == 696) != held_back  # MKL's rows lie apart, oneDNN does not mind
    assert torch.allclose(out, expected, atol=1e-5)


@torch.no_grad()
def test_soft_slimming_is_the_soft_network():
    """With everything kept and tokens at one, the folded weights are the soft masks."""
    model = searched()
    for block in model.blocks:
        block.attn.patch_zeta.fill_(20.0)
    small = slim(model, 1.0, 1.0, soft=True)
    torch.testing.assert_close(small(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    binary = slim(model, 1.0, 1.0)
    assert not torch.allclose(binary(IMAGES), model(IMAGES), rtol=1e-2)


@torch.no_grad()
def test_soft_values_outlast_the_binary_masks():
    model = searched()
    wanted = slim(model, 0.5, 0.5, soft=True)(IMAGES)
    compress(model, 0.5, 0.5)
    assert torch.equal(slim(model, 0.5, 0.5, soft=True)(IMAGES), wanted)


def test_what_a_search_froze_is_retrained():
    model = searched()
    for name, one in model.named_parameters():
        one.requires_grad_("zeta" in name or "norm" in name)
    assert all(one.requires_grad for one in slim(model, 0.5, 0.5).parameters())


@torch.no_grad()
def test_models_of_half_precision_are_cut_alike():
    """NumPy has no bfloat16; ranks do not need it."""
    model = searched()
    half = copy.deepcopy(model).bfloat16()
    small = slim(half, 0.5, 0.5)
    assert {one.dtype for one in small.parameters()} == {torch.bfloat16}
    wanted = slim(half.float(), 0.5, 0.5).kept
    assert small.kept.head_dims.tolist() == wanted.head_dims.tolist()
    assert slim(half.bfloat16(), scores=magnitude_scores(half)).kept.hidden.sum() > 0


@torch.no_grad()
def test_what_keeps_nothing_adds_its_bias():
    model = searched()
    for block in model.blocks[:2]:
        block.attn.zeta.fill_(-9)
        block.mlp.zeta.fill_(-9)
    small = slim(model, 0.5, 0.5)
    assert isinstance(small.blocks[0].attn, BiasOnly) and isinstance(small.blocks[1].mlp, BiasOnly)
    compress(model, 0.5, 0.5)
    torch.testing.assert_close(small(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_budgets_are_nested():
    """One sorted list serves all budgets."""
    scores = learned_scores(filled("deit_tiny"))
    larger = choose(scores, 1.0, 1.0, 1.0)
    assert larger.head_dims.sum() == 2304 and larger.all_tokens
    for budget in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
        smaller = choose(scores, budget, budget, budget)
        for kind in ("attention", "mlp", "tokens"):
            pairs = zip(getattr(smaller, kind), getattr(larger, kind), strict=True)
            assert all((few <= many).all() for few, many in pairs)
        assert smaller.head_dims.sum() == 2304 - int((1.0 - budget) * 2304)
        larger = smaller


def test_the_two_token_rules():
    table = np.array([[3, 1, 2], [1, 3, 2], [3, 1, 2]], dtype=float)
    ones = (np.ones((1, 1)),) * 3
    scores = Scores(ones, (np.ones(1),) * 3, tuple(table), (1, 1))
    released = choose(scores, 1.0, 1.0, 0.3)  # keeps the three 3s
    assert np.stack(released.tokens).tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0]]
    paper = choose(scores, 1.0, 1.0, 0.3, "paper")
    assert np.stack(paper.tokens).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="no token rule 'both'; there are released, paper"):
        choose(scores, token_rule="both")


def test_other_rankings():
    model = searched()
    learned = learned_scores(model)
    uniform = random_scores(learned, 0)
    for seed in (-1, "a", 0.5):
        with pytest.raises(ValueError, match=f"number from 0 on, not {seed!r}"):
            random_scores(learned, seed)
    one, two = choose(uniform, 0.5, 0.5), choose(random_scores(learned, 1), 0.5, 0.5)
    assert one.head_dims.sum() == two.head_dims.sum() == 48
    assert any((a != b).any() for a, b in zip(one.mlp, two.mlp, strict=True))
    with torch.no_grad():
        model.blocks[2].mlp.fc1.weight[7].zero_()
        model.blocks[2].mlp.fc2.weight[:, 7].zero_()
        model.blocks[1].attn.qkv.weight.view(3, 3, 8, 24)[:, 2, 5].zero_()
        model.blocks[1].attn.proj.weight[:, 2 * 8 + 5].zero_()
    size = magnitude_scores(model)
    assert size.mlp[2][7] == 0 == size.attention[1][2, 5]
    assert sum((one == 0).sum() for one in (*size.mlp, *size.attention)) == 2
    plain = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=5
    )
    small = slim(plain, 0.5, 0.5, scores=magnitude_scores(plain))
    assert small.kept.hidden.sum() == 4 * 96 // 2


@torch.no_grad()
def test_the_search_form_deploys_to_plain_layers():
    model = filled("deit_micro")
    model.pretrained_cfg = {"input_size": (3, 56, 56)}
    deployed = harness.deploy(model)
    assert not any("zeta" in name for name, _ in deployed.named_parameters())
    images = torch.randn(2, 3, 56, 56)
    expected = model(images)
    assert (deployed(images) - expected).norm() <= 1e-5 * expected.norm()
    with pytest.raises(ValueError, match="no masks"):
        slim(deployed)


@torch.no_grad()
def test_files_are_smaller_and_come_back(tmp_path):
    torch.manual_seed(0)
    model = harness.build("vit_slim_micro_search")
    for one in model.parameters():
        one.add_(0.1 * torch.randn_like(one))
    small = slim(model, 0.5, 0.5, 0.7).eval()
    save_slim(small, tmp_path / "small.safetensors")
    model.kept, model.token_mode = small.kept, "exact"
    save_slim(model, tmp_path / "large.safetensors")
    sizes = [(tmp_path / f"{one}.safetensors").stat().st_size for one in ("small", "large")]
    assert sizes[0] < 0.6 * sizes[1]
    images = torch.randn(2, 3, 32, 32)
    again = load_slim(tmp_path / "small.safetensors")
    assert torch.equal(again(images), small(images))
    assert again.kept.num_tokens.tolist() == small.kept.num_tokens.tolist()
    harness.checkpoints.save_weights(model, tmp_path / "plain.safetensors")
    with pytest.raises(ReplivitError, match="was not written by save_slim"):
        load_slim(tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="what slim made of a variant"):
        save_slim(searched(), tmp_path / "no.safetensors")
    assert set(read_state_dict(tmp_path / "small.safetensors")) == set(small.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"kept": None, "attention": 0.5, "mlp": 0.4, "seed": 3},
        {"kept": None, "tokens": 0.6, "mode": "drop"},
        {"num_classes": 3, "image_size": 48},
    ],
)
@torch.no_grad()
def test_files_of_another_shape_than_the_variants_come_back(tmp_path, options):
    """Also where the weights alone cannot tell: dropped tokens leave no trace in them."""
    small = harness.build("vit_slim_micro", **options)
    save_slim(small, tmp_path / "small.safetensors")
    again = load_slim(tmp_path / "small.safetensors")
    assert again.kept.as_dict() == small.kept.as_dict()
    images = torch.randn(2, 3, *small.pretrained_cfg["input_size"][1:])
    assert torch.equal(again(images), small(images))


@torch.no_grad()
def test_exports_with_dropped_tokens(tmp_path):
    small = slim(searched(depth=2), 0.45, 0.35, 0.7).eval()
    assert export(small, tmp_path / "small.pt2", 32).relative_error <= 1e-5


@torch.no_grad()
def test_exports_to_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    small = slim(searched(depth=2), 0.45, 0.35, 0.7).eval()
    found = export(small, tmp_path / "small.onnx", 32)
    assert found.size < 400_000


def test_kept_sets_as_a_file(tmp_path):
    kept = slim(searched(), 0.45, 0.35, 0.7).kept
    path = tmp_path / "kept.yaml"
    write_kept(kept, path, "from a test\nof two lines")
    again = read_kept(path)
    for kind in ("dims", "mlp", "tokens"):
        for one, two in zip(getattr(kept, kind), getattr(again, kind), strict=True):
            assert (one == two).all()
    assert path.read_text().startswith("# from a test\n# of two lines\n")
    for broken in ("heads: 3", "[1, 2]", "", path.read_text().replace("'", "'zz", 1)):
        (tmp_path / "broken.yaml").write_text(broken)
        with pytest.raises(ReplivitError, match="does not say what is kept"):
            read_kept(tmp_path / "broken.yaml")
    with pytest.raises(ReplivitError, match="cannot be read"):
        read_kept(tmp_path / "missing.yaml")
    with pytest.raises(ReplivitError, match="3 cannot be read as kept sets"):
        harness.build("vit_slim_micro", kept=3)


BAD = [
    ({"attention": 0.0}, r"the budget for attention must lie in \(0, 1\], not 0.0"),
    ({"mlp": 1.2}, r"the budget for mlp must lie in \(0, 1\], not 1.2"),
    ({"tokens": -0.1}, r"the budget for tokens must lie in \(0, 1\], not -0.1"),
    ({"attention": float("nan")}, r"must lie in \(0, 1\], not nan"),
    ({"attention": True}, r"must lie in \(0, 1\], not True"),
    ({"attention": "0.7"}, r"must lie in \(0, 1\], not '0.7'"),
    ({"mlp": 1e-18}, "keeps none of the 384 for mlp"),
    ({"mode": "fast"}, "no mode 'fast' for dropped tokens; there are exact, drop, masked"),
    ({"token_rule": "x"}, "no token rule 'x'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_budgets_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        slim(searched(), **options)


def test_what_cannot_be_slimmed_says_why():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    make = lambda **options: timm.models.VisionTransformer(**sizes, **options)  # noqa: E731
    with pytest.raises(ValueError, match="has no masks"):
        slim(make())
    with pytest.raises(ValueError, match="no masks"):
        slim(slim(searched()))
    with pytest.raises(ValueError, match="timm's VisionTransformer, not into a ResNet"):
        make_searchable(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="qk_norm"):
        make_searchable(make(qk_norm=True))
    with pytest.raises(ValueError, match="patch dropout"):
        make_searchable(make(patch_drop_rate=0.5))
    with pytest.raises(ValueError, match="not into Block/Attention/GluMlp"):
        make_searchable(make(mlp_layer=timm.layers.GluMlp))
    with pytest.raises(ValueError, match="not into SearchBlock"):
        make_searchable(searched())
    parallel = make(block_fn=timm.models.vision_transformer.ParallelThingsBlock)
    with pytest.raises(ValueError, match="not into ParallelThingsBlock/NoneType/NoneType"):
        make_searchable(parallel)
    resnet, scores = timm.create_model("resnet18"), constant_scores(2, (3, 8), 96, 17)
    with pytest.raises(ValueError, match="not into a ResNet"):
        slim(resnet, scores=scores)
    with pytest.raises(ValueError, match="not into a ResNet"):
        magnitude_scores(resnet)
    with pytest.raises(ValueError, match="not into SlimBlock"):
        magnitude_scores(slim(searched()))
    with pytest.raises(ValueError, match="exclude each other"):
        make_searchable(make(), head_search=True, uniform_search=True)
    kept = slim(searched(), 0.5, 0.5).kept
    with pytest.raises(ValueError, match="of another network"):
        slim_to(make(), kept)
    with pytest.raises(ValueError, match="soft slimming needs"):
        slim_to(make(), choose(constant_scores(2, (3, 8), 96, 17)), soft=True)


def test_kept_tokens_belong_to_an_image_size():
    all_kept = harness.build("vit_slim_micro", image_size=48)
    assert len(all_kept.kept.tokens[0]) == 145
    kept = slim(searched(), 0.5, 0.5, 0.5).kept
    with pytest.raises(ValueError, match="chosen among 17, this image size has 145"):
        kept.with_tokens(145)
    skipping = [np.array(one) for one in (kept.tokens[0], *kept.tokens[1:])]
    skipping[0] = ~kept.tokens[1]
    odd = Kept(kept.attention, kept.mlp, tuple(skipping), kept.heads)
    with pytest.raises(ValueError, match="a layer before it has dropped"):
        slim_to(searched(), odd)
