"""SepViT at other sizes and in other forms: padding, rectangles, pyramid, twins, deployment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import harness
from harness.measurement.macs import count_macs
from harness.meta import on_meta
from reproductions.sepvit.attention import SUMMARIES, SeparableAttention
from reproductions.sepvit.block import BlockOptions, SepViTBlock
from reproductions.sepvit.model import ARCHITECTURES
from reproductions.sepvit.windows import Windows


def build_on_meta(name: str, **options) -> nn.Module:
    with on_meta():
        return harness.build(name, **options).eval()


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """As after some training: nothing is zero or equal by initialisation."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for one in module.parameters():
            one.add_(0.2 * torch.randn_like(one))
    return module.eval()


def random_block(dim: int, side: int, count: int | None, **options) -> SepViTBlock:
    torch.manual_seed(0)
    return shaken(SepViTBlock(dim, 2, side, count, options=BlockOptions(**options)))


# windows


@pytest.mark.parametrize(
    ("height", "width", "side", "shift"),
    [(8, 8, 4, 0), (6, 10, 4, 0), (3, 5, 4, 0), (9, 4, 4, 2), (7, 7, 7, 3)],
)
def test_joining_undoes_splitting(height, width, side, shift):
    windows = Windows.of_side(height, width, side, shift)
    x = torch.randn(2, height, width, 6)
    cut = windows.split(x)
    assert cut.shape == (2, windows.count, side * side, 6)
    heads = cut.unflatten(-1, (3, 2)).permute(0, 3, 1, 2, 4)
    assert torch.equal(windows.join(heads), x)
    assert int(windows.real().sum()) == height * width
    tokens = torch.randn(1, windows.count, 1, 6)
    with_tokens = windows.split(x, tokens)
    assert torch.equal(with_tokens[:, :, :1], tokens.expand(2, -1, -1, -1))
    assert torch.equal(with_tokens[:, :, 1:], cut)


def test_shifted_windows_hold_neighbours_only():
    """Two tokens see each other if, after the roll, no border of the map runs between them."""
    windows = Windows.of_side(8, 8, 4, shift=2)
    places = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1)
    cut = windows.split(places[None])[0]  # (n, S, 2)
    distance = (cut[:, :, None] - cut[:, None]).abs().amax(-1)
    assert torch.equal(windows.visible(), distance < 4)


def test_padding_in_shifted_windows_leaves_every_query_a_key():
    windows = Windows.of_side(9, 6, 4, shift=2)
    visible, real = windows.visible(), windows.real()
    assert visible.any(-1).all()
    assert not (visible & real[:, :, None] & ~real[:, None, :]).any()


# masked padding


def naive_attention(attention: SeparableAttention, y: Tensor, windows: Windows) -> Tensor:
    """One image, window by window and slot by slot, with the real tokens alone: `(H, W, C)`."""
    heads, dim = attention.num_heads, y.shape[-1]
    split = lambda one: one.unflatten(-1, (heads, -1)).movedim(-2, 0)  # noqa: E731
    real, first = windows.real(), 1 if attention.has_token else 0
    after, summaries = [], []
    for window, y_window in enumerate(y):
        keep = torch.cat([torch.ones(first, dtype=torch.bool), real[window]])
        tokens = y_window[keep]
        q, k, v = (split(one) for one in attention.DSA_qkv(tokens).chunk(3, -1))
        weights = (q @ k.transpose(-2, -1) * (dim // heads) ** -0.5).softmax(-1)
        out = (weights @ v).movedim(0, -2).flatten(-2) + tokens
        summaries.append(out[0] if first else out.mean(0))
        full = torch.full((windows.size, dim), torch.nan)
        full[real[window]] = out[first:]
        after.append(full)
    after = torch.stack(after)
    t = F.gelu(attention.win_tokens_norm(torch.stack(summaries)))
    q, k = (split(one) for one in attention.PSA_qk(t).chunk(2, -1))
    scores = q @ k.transpose(-2, -1) * (dim // heads) ** -0.5  # (h, n, n)
    mixed = torch.zeros_like(after)
    for slot in range(windows.size):
        there = real[:, slot].nonzero()[:, 0]
        for window in there.tolist():
            weights = scores[:, window, there].softmax(-1)
            values = after[there, slot].unflatten(-1, (heads, -1))  # (m, h, d)
            total = torch.einsum("hm,mhd->hd", weights, values).flatten()
            mixed[window, slot] = total + after[window, slot]
    return attention.proj(windows.join(mixed[None, None])[0])


@pytest.mark.parametrize("summary", ["learned", "mean"])
@pytest.mark.parametrize("height,width", [(8, 8), (7, 9), (5, 12)])
@torch.no_grad()
def test_padding_has_no_influence(height, width, summary):
    """Attention with masks equals attention that never saw the padding."""
    count = Windows.of_side(height, width, 4).count
    block = random_block(16, 4, count, summary=summary)
    windows = block.windows(height, width)
    y = block.cut(torch.randn(1, height, width, 16), windows)
    expected = naive_attention(block.attn, y[0], windows)
    assert expected.isfinite().all()
    torch.testing.assert_close(block.attn(y, windows)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("summary", SUMMARIES)
@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(summary):
    block = random_block(16, 4, 6, summary=summary)
    windows = block.windows(7, 9)
    y = block.cut(torch.randn(2, 7, 9, 16), windows)
    expected = block.attn(y, windows)
    padding = ~windows.real()
    first = y.shape[2] - windows.size
    y[:, :, first:][:, padding] = 100 * torch.randn(2, int(padding.sum()), 16)
    torch.testing.assert_close(block.attn(y, windows), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dense_form_lets_padding_take_part_as_released():
    """The released backbone pads before the norm and masks nothing."""
    block = random_block(16, 4, None)
    x = torch.randn(1, 6, 6, 16)
    alone = block(F.pad(x, (0, 0, 0, 2, 0, 2)))[:, :6, :6]
    torch.testing.assert_close(block(x), alone)
    masked = random_block(16, 4, 4, summary="zero")
    masked.load_state_dict(block.state_dict())
    assert not torch.allclose(masked(x), block(x), rtol=1e-3)


@torch.no_grad()
def test_dense_form_keeps_the_pointwise_attention_of_a_single_window():
    block = random_block(16, 4, None)
    windows = block.windows(4, 4)
    _, between = block.attention_maps(torch.randn(2, 4, 4, 16))
    assert windows.count == 1 and torch.equal(between, torch.ones(2, 2, 1, 1))


# sizes


def test_published_sizes_derive_their_windows_from_the_map():
    arch = ARCHITECTURES["tiny"]
    assert arch.maps(224) == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert arch.window_counts(448)[2:] == [[16, 4] * 3, [4, 4]]
    assert arch.window_counts(192) == [[49], [16, 4], [4, 1] * 3, [1, 1]]
    assert arch.window_counts(256) == [[100], [25, 9], [9, 4] * 3, [4, 4]]
    for taken in (221, 223, (112, 448), (448, 112), (221, 224)):
        assert arch.window_counts(taken) == arch.window_counts(224)
    micro = ARCHITECTURES["micro"]
    assert micro.window_counts(32) == [[16, 4], [4, 1], [1]]


@pytest.mark.parametrize("size", [192, 256, (96, 160), 448])
@torch.no_grad()
def test_sizes_that_the_release_refuses(size):
    model = shaken(harness.build("sepvit_lite", num_classes=5, image_size=size))
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(1, 3, height, width)
    logits = model(images)
    assert logits.isfinite().all()
    changed = images.clone()
    changed[:, :, -8:, -8:] += 3  # the corner where the padding begins
    assert not torch.allclose(model(changed), logits, rtol=1e-3)


@torch.no_grad()
def test_a_network_for_224_takes_what_the_released_one_takes():
    model = shaken(harness.build("sepvit_lite", num_classes=5))
    wide = harness.build("sepvit_lite", num_classes=5, image_size=(112, 448)).eval()
    wide.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 112, 448)
    assert torch.equal(model(images), wide(images))
    assert model.blocks[2][1].windows(7, 28) == Windows.whole(7, 28)
    for side in (192, 225, 256, 448):
        with pytest.raises(ValueError, match=r"was built for 64 windows of 7x7 tokens.*image_size"):
            model(torch.randn(1, 3, side, side))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "whole number of pixels"),
        ({"image_size": 3, "stem_kernel": 4}, "images of at least 4x4 pixels, not 3"),
        ({"size": "huge"}, "no size 'huge'; there are lite, tiny"),
        ({"num_heads": (3, 2, 4, 8)}, "a width of 32 does not divide into 3 heads"),
        ({"depths": (1, 2)}, "stages do not agree: 4 embed_dims, 4 num_heads, 2 depths"),
        ({"windows": ((7,), (), (7,), (7,))}, "must be positive"),
        ({"mlp_ratio": -1.0}, "must be positive"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be in"),
        ({"attn_drop_rate": 2.0}, "attn_drop_rate must be in"),
        ({"summary": "median"}, "no summary 'median'; there are learned, zero, mean"),
        ({"token_init": "ones"}, "no token_init 'ones'; there are zeros, normal"),
        ({"shift": True}, "pointwise=False"),
        ({"out_indices": (0,)}, "they need features_only=True"),
        ({"out_indices": (4,), "features_only": True}, "stages, which are 0 to 3"),
        ({"out_indices": 3, "features_only": True}, "out_indices 3: a list of stages"),
        ({"windows": (7, 14, 14, 7)}, "windows of a stage must be positive whole numbers, not 7"),
        ({"windows": 7}, "windows must be a list of sides for each stage, not 7"),
        ({"depths": 3}, "depths must be positive whole numbers, not 3"),
        ({"embed_dims": (32, 64, 128, 256.0)}, "embed_dims must be positive whole numbers"),
        ({"stem_stride": 0}, "stem_kernel and stem_stride must be positive whole numbers"),
        ({"init_std": -0.02}, "init_std must be positive, not -0.02"),
        ({"drop_path_rate": "a lot"}, "drop_path_rate must be in"),
        ({"summary": "mean", "features_only": True}, "constant zeros"),
    ],
)
def test_wrong_arguments_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        build_on_meta("sepvit_lite", **options)


# the pyramid


@torch.no_grad()
def test_pyramid_takes_any_size_and_chooses_maps():
    import timm

    model = timm.create_model("replivit_sepvit_lite", features_only=True).eval()
    maps = model(torch.randn(1, 3, 90, 122))
    assert [list(one.shape) for one in maps] == [
        [1, 32, 23, 31], [1, 64, 12, 16], [1, 128, 6, 8], [1, 256, 3, 4]
    ]  # fmt: skip
    assert model.feature_info.channels() == [32, 64, 128, 256]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    late = harness.build("sepvit_lite", features_only=True, out_indices=(1, 3)).eval()
    late.load_state_dict(model.state_dict())
    chosen = late(torch.randn(1, 3, 64, 64))
    assert [one.shape[1] for one in chosen] == [64, 256]
    assert late.feature_info.channels() == [64, 256]


def test_dense_sizes_have_the_released_rates_of_stochastic_depth():
    for size, rate in (("tiny", 0.2), ("small", 0.3), ("base", 0.5)):
        model = build_on_meta(f"sepvit_{size}", features_only=True)
        assert model.blocks[3][1].drop_path.drop_prob == pytest.approx(rate)


# twins and ablations


def test_twins_cost_the_same():
    macs = [count_macs(build_on_meta(f"sepvit_micro{twin}"), 32).total
            for twin in ("", "_window", "_swin")]  # fmt: skip
    assert max(macs) / min(macs) < 1.001
    names = [key for key, _ in build_on_meta("sepvit_micro_swin").named_parameters()]
    assert not any("PSA" in key or "win_" in key for key in names)


@torch.no_grad()
def test_swin_twin_is_window_attention_with_shifts():
    """Shifted is unshifted on a rolled map, apart from what the border separates."""
    model = shaken(harness.build("sepvit_micro_swin"))
    plain, shifted = model.blocks[0]
    assert (plain.shift, shifted.shift) == (0, 2)
    assert [block.shift for block in model.blocks[2]] == [0]
    x = torch.randn(1, 16, 16, 32)
    out = shifted(x)
    shifted.shift = 0
    rolled = shifted(x.roll((-2, -2), (1, 2))).roll((2, 2), (1, 2))
    inner = slice(2, -2)
    torch.testing.assert_close(out[:, inner, inner], rolled[:, inner, inner])
    assert not torch.allclose(out, rolled)


@torch.no_grad()
def test_window_attention_alone_stays_in_its_window():
    block = random_block(16, 4, 4, pointwise=False)
    mixing = random_block(16, 4, 4)
    x = torch.randn(1, 8, 8, 16)
    other = x.clone()
    other[:, :4, :4] += 1
    assert torch.equal(block(x)[:, 4:], block(other)[:, 4:])
    assert not torch.allclose(mixing(x)[:, 4:], mixing(other)[:, 4:])


@torch.no_grad()
def test_summaries():
    torch.manual_seed(0)
    windows = Windows.of_side(8, 8, 4)
    a = torch.randn(2, 4, 16, 32)
    mean = SeparableAttention(32, 2, summary="mean").summaries(a, windows)[0]
    torch.testing.assert_close(mean, a.mean(2))
    convolution = SeparableAttention(32, 2, summary="convolution", window_size=16)
    torch.testing.assert_close(convolution.summaries(a, windows)[0], a.mean(2))  # starts as a mean
    shaken(convolution)
    kernel = convolution.win_conv.T.reshape(32, 1, 4, 4)
    maps = a.flatten(0, 1).transpose(1, 2).reshape(8, 32, 4, 4)
    expected = F.conv2d(maps, kernel, groups=32).view(2, 4, 32)
    torch.testing.assert_close(convolution.summaries(a, windows)[0], expected, rtol=1e-4, atol=1e-5)
    zero = random_block(32, 4, 4, summary="zero")
    assert not hasattr(zero, "win_tokens")
    assert torch.equal(
        zero.cut(torch.randn(1, 8, 8, 32), windows)[0, :, 0], zero.norm1.bias.expand(4, -1)
    )
    normal = SepViTBlock(32, 2, 4, 4, options=BlockOptions(token_init="normal"))
    assert normal.win_tokens.std() == pytest.approx(1, rel=0.3)


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    model = harness.build("sepvit_micro", drop_rate=0.2, attn_drop_rate=0.2)
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


# deployment


@pytest.mark.parametrize("size", [224, 192])
@torch.no_grad()
def test_deployed_form_is_equal_and_smaller(size):
    model = shaken(harness.build("sepvit_lite", num_classes=7, image_size=size))
    deployed = harness.deploy(model, image_size=size)
    images = torch.randn(1, 3, size, size)
    expected = model(images)
    assert (deployed(images) - expected).norm() <= 1e-5 * expected.norm()
    norms = sum(isinstance(one, nn.LayerNorm) for one in deployed.modules())
    assert norms == sum(isinstance(one, nn.LayerNorm) for one in model.modules())
    affine = [one for one in deployed.modules()
              if isinstance(one, nn.LayerNorm) and one.elementwise_affine]  # fmt: skip
    assert len(affine) == norms - 11 - 1  # second norms and the last one
    again = deployed(images)
    deployed.blocks[0][0].deploy_()  # twice changes nothing
    assert torch.equal(deployed(images), again)


@torch.no_grad()
def test_deployed_pyramid_drops_what_is_not_used():
    model = shaken(harness.build("sepvit_lite", features_only=True))
    deployed = harness.deploy(model, image_size=96)
    images = torch.randn(1, 3, 96, 96)
    for ours, expected in zip(deployed(images), model(images), strict=True):
        assert (ours - expected).norm() <= 1e-5 * expected.norm()
    assert not any(key.startswith(("head.", "norm.")) for key in deployed.state_dict())
