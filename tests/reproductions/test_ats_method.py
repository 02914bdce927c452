"""ATS as a method: what it promises for any image, batch, limit, model, and in training."""

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from golden_tools import filled_state_dict, load_golden
from timm.models.vision_transformer import VisionTransformer

import harness
from harness.meta import on_meta
from harness.training import read_recipe
from reproductions.ats import sampling
from reproductions.ats.model import CHOICES, insert_ats


def small_model(stages=(1, 2, 3), tokens=1.0, mode="paper", layout="auto", **options):
    """A ViT of 16 patches whose attention is far from uniform."""
    torch.manual_seed(0)
    settings = {"num_classes": 5, "embed_dim": 24, "depth": 4, "num_heads": 3} | options
    model = VisionTransformer(img_size=16, patch_size=4, **settings)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.25 * torch.randn_like(one))
    return insert_ats(model, stages, tokens, mode, layout).eval()


def images(count=6, side=16, seed=1, dtype=torch.float32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )


def counts_of(model, x):
    return [(stage >= 0).sum(1).tolist() for stage in model.forward_with_tokens(x)[1]]


# ---- the samples ---------------------------------------------------------------------------------


def nearest_by_hand(scores: list[float], limit: int) -> list[int]:
    """The definition: for each midpoint the first token whose CDF is nearest; how often each."""
    total, cdf = sum(scores), []
    for one in scores:
        cdf.append((cdf[-1] if cdf else 0) + one / total)
    hits = [0] * len(scores)
    for k in range(1, limit + 1):
        distances = [abs((2 * k - 1) / (2 * limit) - one) for one in cdf]
        hits[distances.index(min(distances))] += 1
    return hits


@pytest.mark.parametrize("limit", [1, 2, 7, 16, 40])
def test_counting_samples_is_the_nearest_search(limit):
    generator = torch.Generator().manual_seed(limit)
    scores = torch.rand(50, 16, generator=generator).double() ** 3
    ours = sampling.sample_counts(sampling.cumulative(scores), limit)
    assert ours.tolist() == [nearest_by_hand(row, limit) for row in scores.tolist()]
    assert ours.sum(1).tolist() == [limit] * 50
    hit = sampling.sampled(scores, limit)
    assert torch.equal(hit, ours > 0)


def test_padding_behind_an_image_changes_no_sample():
    scores = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(scores, (0, 5))
    assert torch.equal(sampling.sampled(padded, 12)[:, :16], sampling.sampled(scores, 12))
    assert not sampling.sampled(padded, 12)[:, 16:].any()


def test_one_token_with_all_the_significance_is_hit_alone():
    scores = torch.zeros(1, 16)
    scores[0, 5] = 1
    assert sampling.sampled(scores, 16).sum() <= 2  # its neighbour may reach half-way to it
    assert sampling.sampled(scores, 16)[0, 5]


def test_temperature_lowers_and_raises_the_number_of_tokens():
    logits = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    means = [
        sampling.sampled((logits / temperature).softmax(1), 64).sum(1).float().mean().item()
        for temperature in (0.1, 0.25, 0.5, 1, 2, 4)
    ]
    assert means == sorted(means) and means[0] < 0.3 * means[-1]


@torch.inference_mode()
def test_uniform_scores_lose_exactly_one_token_in_the_released_mode():
    """Uniform attention and equal values: every patch is the same, and one can never be hit."""
    torch.manual_seed(0)
    parent = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    parent.pos_embed.zero_()  # not `pos_embed="none"`: older timm then leaves the class token out
    model = insert_ats(parent, stages=[0, 1], mode="released").eval()
    picture = torch.ones(1, 3, 16, 16)
    assert counts_of(model, picture) == [[15], [14]]


@pytest.mark.parametrize("limit", [1, 3, 16])
@pytest.mark.parametrize("mode", CHOICES)
@torch.inference_mode()
def test_no_image_keeps_more_than_the_limit(mode, limit):
    if mode == "tokenreduction" and limit == 1:
        limit = 2  # its grid has one sample fewer
    counts = counts_of(small_model(tokens=limit, mode=mode), images())
    assert all(1 <= count <= limit for stage in counts for count in stage)
    if mode == "topk":
        assert counts == [[limit] * 6] * 3
    elif limit == 16:
        assert len(set(counts[-1])) > 1, "the number of tokens must depend on the image"


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("mode", CHOICES)
@torch.inference_mode()
def test_what_is_no_number_stays_none(mode, layout):
    model = small_model(mode=mode, tokens=12, layout=layout)
    x = images(3)
    x[1] = torch.nan
    assert model(x).isnan().all(1).tolist() == [False, True, False]


def test_limits_belong_to_the_stages_they_were_given_with():
    assert small_model((3, 1), (4, 9)).ats.limits == {1: 9, 3: 4}
    assert small_model((3, 1), 0.5, "tokenreduction").ats.limits == {1: 9, 3: 5}
    assert small_model(2, np.int64(5)).ats.limits == {2: 5}
    assert small_model((1, 2), np.float32(0.5)).ats.limits == {1: 8, 2: 8}


@torch.inference_mode()
def test_tokens_only_disappear():
    _, kept = small_model().forward_with_tokens(images())
    for before, after in pairwise(kept):
        for own, left in zip(before.tolist(), after.tolist(), strict=True):
            assert set(left) - {-1} <= set(own) - {-1}


# ---- alone or in any batch -----------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_same_result_alone_and_in_any_batch(layout):
    model, x = small_model(layout=layout).double(), images(9, dtype=torch.float64)
    logits, kept = model.forward_with_tokens(x)
    assert len({tuple(row) for row in (kept[-1] >= 0).tolist()}) > 1
    for chosen in ([0], [3], [8, 2], [5, 1, 7, 4]):
        some, own = model.forward_with_tokens(x[chosen])
        torch.testing.assert_close(some, logits[chosen], rtol=1e-10, atol=1e-12)
        for left, right in zip(own, kept, strict=True):
            for row, image in zip(left, chosen, strict=True):
                assert row[row >= 0].tolist() == right[image][right[image] >= 0].tolist()


@torch.inference_mode()
def test_deit_keeps_the_same_tokens_of_an_image_in_any_batch():
    """Float32 and real sizes: attention and choice are done image by image, on equal shapes."""
    fixture = load_golden("ats/deit_ti_drop")
    state = filled_state_dict(fixture["state_dict"], skip=("*out_zero_mask",))
    model = harness.load_official("ats_deit_ti", state)
    x = images(5, side=224, seed=3)
    together, kept = model.forward_with_tokens(x)
    for image in range(5):
        alone, own = model.forward_with_tokens(x[image : image + 1])
        for left, right in zip(own, kept, strict=True):
            assert left[0].tolist() == right[image][right[image] >= 0].tolist()
        torch.testing.assert_close(alone[0], together[image], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("mode", CHOICES)
@pytest.mark.parametrize("stages", [(0, 1, 2, 3), (1, 3), (2,)])
def test_layouts_agree(mode, stages):
    packed = small_model(stages, 12, mode, "packed").double()
    padded = small_model(stages, 12, mode, "padded").double()
    x = images(dtype=torch.float64)
    ours, theirs = packed.forward_with_tokens(x), padded.forward_with_tokens(x)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-10, atol=1e-12)
    assert all(torch.equal(left, right) for left, right in zip(ours[1], theirs[1], strict=True))
    assert len(ours[1]) == len(stages)


@torch.inference_mode()
def test_exported_and_captured_shapes_compute_the_same():
    """With shapes from the limits alone, as an exported program has them."""
    model, x = small_model(tokens=10), images()
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), model(x))
    torch.testing.assert_close(program(images(seed=2)), model(images(seed=2)))


@torch.inference_mode()
def test_what_timm_models_may_have():
    """Layer scale, query and key norms, register tokens, a norm in front: all at once."""
    options = {"init_values": 0.5, "qk_norm": True, "reg_tokens": 2, "pre_norm": True}
    packed = small_model(tokens=9, layout="packed", **options).double()
    padded = small_model(tokens=9, layout="padded", **options).double()
    x = images(dtype=torch.float64)
    torch.testing.assert_close(packed(x), padded(x), rtol=1e-10, atol=1e-12)
    full, dense = (small_model(mode="topk", tokens=16, **options) for _ in range(2))
    dense.__class__ = VisionTransformer
    torch.testing.assert_close(full(images()), dense(images()))


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_nothing_dropped_is_the_dense_network(layout):
    """Top-k of all patches keeps all: what is left of ATS is timm's own network."""
    model = small_model(mode="topk", layout=layout)
    dense = copy.deepcopy(model)
    dense.__class__ = VisionTransformer
    torch.testing.assert_close(model(images()), dense(images()))


@torch.inference_mode()
def test_distilled_deit_keeps_both_its_tokens():
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, num_classes=5)
    model = insert_ats(model, tokens=0.5).eval()
    logits, kept = model.forward_with_tokens(images(2, 64))
    assert logits.shape == (2, 5) and len(kept) == 9
    assert all(0 <= int(stage.max()) < 16 for stage in kept)


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["paper", "topk"])
def test_gradients_of_a_batch_are_those_of_its_images(mode):
    model = small_model(tokens=10, mode=mode).double().train()
    x, target = images(dtype=torch.float64), torch.arange(6) % 5
    loss = torch.nn.functional.cross_entropy(model(x), target, reduction="sum")
    together = torch.autograd.grad(loss, list(model.parameters()))
    alone = [torch.zeros_like(one) for one in model.parameters()]
    for image, label in zip(x.split(1), target.split(1), strict=True):
        loss = torch.nn.functional.cross_entropy(model(image), label)
        for total, one in zip(
            alone, torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            total += one
    for left, right in zip(together, alone, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)
    assert all(one.any() for one in together)


def test_gradients_pass_through_what_was_kept_and_not_through_the_choice():
    """Against differences of the loss where the choice stays the same."""
    model = small_model(tokens=10).double().train()
    x = images(2, dtype=torch.float64)
    weight = model.blocks[2].attn.qkv.weight
    (gradient,) = torch.autograd.grad(model(x).square().sum(), weight)
    with torch.no_grad():
        place, step = (5, 7), 1e-6
        before = counts_of(model, x)
        weight[place] += step
        high = model(x).square().sum()
        weight[place] -= 2 * step
        low = model(x).square().sum()
        assert counts_of(model, x) == before
    assert float((high - low) / (2 * step)) == pytest.approx(float(gradient[place]), rel=1e-5)


def test_stochastic_depth_drops_images_not_tokens():
    model = small_model(drop_path_rate=0.9).train()
    torch.manual_seed(0)
    features = model.forward_features(images(64))
    assert features.isfinite().all() and features.std() > 0
    model.eval()
    assert torch.equal(model(images()), model(images()))


@pytest.mark.parametrize("mode", ["released", "released_keepshape"])
def test_released_modes_train_too(mode):
    model = small_model(mode=mode).train()
    model(images()).square().sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in model.parameters())
    assert model.blocks[3].mlp.fc1.weight.grad.any()


def test_recipe_of_the_second_implementation():
    recipe = read_recipe("imagenet", harness.get_variant("ats_deit_s"))
    assert (recipe.epochs, recipe.warmup_epochs, recipe.batch_size) == (30, 20, 512)
    assert recipe.peak_lr == pytest.approx(1e-3 * 512 / 1024) and recipe.optimizer == "adamw"


def test_copies_and_pickles_sample_alike():
    model = small_model(tokens=9)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images()), model(images()))
        assert other.ats == model.ats


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 65}, "tokens must be 1 to 64, the image's patches, not 65"),
        ({"tokens": 0}, "tokens must be 1 to 64, the image's patches, not 0"),
        ({"tokens": 1.5}, r"a fraction of the tokens lies in \(0, 1\], not 1.5"),
        ({"tokens": [8, 4]}, "2 token limits for 4 stages"),
        ({"stages": [2, 6]}, "there is no block 6: stages are 0 to 5"),
        ({"stages": [-1]}, "there is no block -1: stages are 0 to 5"),
        ({"stages": []}, "at least one"),
        ({"stages": [2, 2]}, "different blocks"),
        ({"stages": 6}, "there is no block 6: stages are 0 to 5"),
        ({"stages": [2.5]}, r"there is no block 2\.5: stages are 0 to 5"),
        ({"stages": "abc"}, "there is no block 'a': stages are 0 to 5"),
        ({"tokens": True}, r"a fraction of the tokens lies in \(0, 1\], not True"),
        ({"tokens": "half"}, r"a fraction of the tokens lies in \(0, 1\], not 'half'"),
        ({"tokens": None}, r"a fraction of the tokens lies in \(0, 1\], not None"),
        ({"mode": "tokenreduction", "tokens": 0.1}, r"at least 2, not \[7, 1, 1, 1\]"),
        ({"mode": "best"}, "no ATS mode 'best'; there are paper, tokenreduction"),
        ({"layout": "nested"}, "no layout 'nested'"),
        ({"mode": "released", "tokens": 0.5}, "limit at all 64 patches only"),
    ],
)
def test_bad_settings_name_the_limit(options, message):
    with on_meta(), pytest.raises(ValueError, match=message):
        harness.build("ats_micro", **options)


def test_models_it_does_not_go_into():
    with on_meta():
        pooled = VisionTransformer(embed_dim=24, depth=2, num_heads=3, global_pool="avg")
        bare = VisionTransformer(
            embed_dim=24, depth=2, num_heads=3, class_token=False, global_pool="avg"
        )
        parallel = VisionTransformer(
            embed_dim=24, depth=2, num_heads=3,
            block_fn=timm.models.vision_transformer.ParallelScalingBlock,
        )  # fmt: skip
        resnet = timm.create_model("resnet18")
    with pytest.raises(ValueError, match=r"needs a class token .*\(class token: False"):
        insert_ats(bare)
    with pytest.raises(
        ValueError, match=r"must classify by it \(class token: True, pooling: 'avg'"
    ):
        insert_ats(pooled)
    with pytest.raises(ValueError, match="not into ParallelScalingBlock"):
        insert_ats(parallel)
    with pytest.raises(ValueError, match="timm's VisionTransformer, not into ResNet"):
        insert_ats(resnet)
    with on_meta(), pytest.raises(ValueError, match="not into EfficientFormer"):
        harness.build("ats_micro", base="efficientformer_micro")
