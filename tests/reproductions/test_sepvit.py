"""SepViT: equal to the released classifier and backbone, in outputs, counts and initialisation."""

from __future__ import annotations

import pytest
import torch
from golden_tools import (
    assert_matches,
    filled_state_dict,
    golden_cases,
    golden_input,
    load_golden,
)
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.measurement.macs import count_macs
from harness.measurement.macs_fvcore import count_macs_fvcore
from harness.meta import on_meta
from reproductions.sepvit.complexity import block_costs, two_swin_blocks
from reproductions.sepvit.conventions import macs as authors_macs
from reproductions.sepvit.model import ARCHITECTURES, SepViT, SepViTPyramid
from reproductions.sepvit.windows import Windows

#: Measured with the released code: parameters, its own counter (fvcore), and torch's.
COUNTS = {
    "lite": (3_661_128, 0.573e9, 568_414_464),
    "tiny": (31_182_856, 4.533e9, 4_518_998_784),
    "small": (46_570_504, 7.476e9, 7_455_290_112),
    "base": (82_377_064, 13.082e9, 13_054_592_000),
}


def build_on_meta(name: str, **options) -> nn.Module:
    with on_meta():
        return harness.build(name, **options).eval()


def count(model: nn.Module) -> int:
    return sum(one.numel() for one in model.parameters())


def official(fixture: str) -> dict[str, torch.Tensor]:
    golden = load_golden(f"sepvit/{fixture}")
    return filled_state_dict(golden["state_dict"], golden["fill"])


@pytest.fixture(scope="module")
def filled() -> dict[str, SepViT]:
    """Lite and T under the fixtures' fill."""
    return {size: harness.load_official(f"sepvit_{size}", official(size))
            for size in ("lite", "tiny")}  # fmt: skip


@pytest.fixture(scope="module")
def stage_maps(filled) -> dict[str, list[torch.Tensor]]:
    """What leaves each stage for the fixtures' images."""
    images = golden_input([2, 3, 224, 224])
    with torch.no_grad():
        return {size: list(model.stage_maps(images)) for size, model in filled.items()}


def cases(fixture: str, *starts: str) -> list:
    return [one for one in golden_cases(f"sepvit/{fixture}") if one.id.startswith(starts)]


# outputs


@pytest.mark.parametrize("case", cases("lite", "logits"))
@torch.no_grad()
def test_logits_of_lite(filled, case):
    assert_matches(filled["lite"](golden_input(case["input_shape"])), case)


@pytest.mark.parametrize("size", ["lite", "tiny"])
@torch.no_grad()
def test_stages_and_head(filled, stage_maps, size):
    """Each stage's tokens, and the logits from the last of them."""
    model, maps = filled[size], stage_maps[size]
    for case in (one.values[0] for one in cases(size, "stage")):
        assert_matches(maps[int(case["name"][5])].flatten(1, 2), case)
    logits = model.forward_head(model.norm(maps[-1]))
    assert_matches(logits, cases(size, "logits_224")[0].values[0])


@pytest.mark.parametrize("case", cases("lite", "block") + cases("tiny", "block"))
@torch.no_grad()
def test_inside_of_a_block(filled, case):
    """Norms, both attention maps, tokens and outputs of a block that is fed with noise."""
    shape = case["input_shape"]
    size = "tiny" if shape[-1] == 384 else "lite"
    _, stage, block, what = case["name"].split("_", 3)
    side = round(shape[1] ** 0.5)
    module = filled[size].blocks[int(stage)][int(block)]
    x = golden_input(shape, case["input_seed"]).unflatten(1, (side, side))
    windows = module.windows(side, side)
    y = module.cut(x, windows)
    inside, between = module.attn.maps(y, windows)
    found = {
        "attn_in_after_norm1": lambda: y,
        "dsa_map": lambda: inside,
        "psa_map": lambda: between,
        "win_tokens_after_dsa": lambda: module.attn.depthwise(y, windows)[:, :, 0],
        "attn_out": lambda: module.attn(y, windows).flatten(1, 2),
        "block_out": lambda: module(x).flatten(1, 2),
    }
    assert_matches(found[what](), case)


@torch.no_grad()
def test_layers_around_the_attention(filled):
    model = filled["lite"]
    (embed,), (position,) = cases("lite", "patch_embed"), cases("lite", "peg")
    images = golden_input([2, 3, 224, 224]).permute(0, 2, 3, 1)
    assert_matches(model.patch_embeds[0](images).flatten(1, 2), embed.values[0])
    x = golden_input([2, 784, 64], 1).unflatten(1, (28, 28))
    assert_matches(model.pos_block[1](x).flatten(1, 2), position.values[0])


def test_gradients():
    (case,) = (one.values[0] for one in cases("lite", "grad"))
    model = harness.load_official("sepvit_lite", official("lite"), drop_path_rate=0.0).train()
    logits = model(golden_input(case["input_shape"]))
    loss = nn.functional.cross_entropy(logits, torch.tensor(case["extra"]["labels"]))
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    loss.backward()
    gradients = {name: float(one.grad.norm()) for name, one in model.named_parameters()}
    assert len(case["grad_l2"]) > 10
    for name, norm in case["grad_l2"].items():
        assert gradients[name] == pytest.approx(norm, rel=1e-4), name


@torch.no_grad()
def test_pyramid_of_the_dense_backbone():
    model = harness.load_official("sepvit_tiny", official("backbone_tiny"), features_only=True)
    maps = model(golden_input([2, 3, 160, 200]))
    assert len(maps) == 4
    for case in (one.values[0] for one in golden_cases("sepvit/backbone_tiny")):
        assert_matches(maps[int(case["name"][4])], case)


# discrete facts


def test_order_of_windows_and_tokens():
    (case,) = (one.values[0] for one in cases("lite", "window_partition"))
    tokens = torch.arange(784.0).view(1, 28, 28, 1)
    for side in (7, 14):
        expected = case[f"ws{side}"]
        cut = Windows.of_side(28, 28, side).split(tokens)[0, :, :, 0].long().tolist()
        assert len(cut) == expected.pop("num_windows")
        for name, values in expected.items():
            window, part = int(name.split("_")[1]), name.split("_")[2]
            chosen = cut[window][:16] if part.startswith("first") else cut[window][-8:]
            assert chosen == values


def test_window_counts_and_drop_path(filled):
    (counts,) = (one.values[0] for one in cases("lite", "window_counts"))
    (drop,) = (one.values[0] for one in cases("lite", "drop_path"))
    arch = ARCHITECTURES["lite"]
    assert arch.window_counts(224) == counts["result"]
    assert [list(arch.sides(stage)) for stage in range(4)] == counts["ws"]
    model = build_on_meta("sepvit_lite", drop_path_rate=0.2)
    blocks = [block for stage in model.blocks for block in stage]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx(drop["per_block"])
    assert [block.attn.has_token for block in blocks] == [
        number > 1 for stage in counts["result"] for number in stage
    ]
    assert {blocks[0].norm1.eps, blocks[0].norm2.eps, model.norm.eps} == {1e-6}
    assert {model.patch_embeds[0].norm.eps, blocks[0].attn.win_tokens_norm.eps} == {1e-5}


@pytest.mark.parametrize("fixture", ["lite", "tiny", "backbone_tiny"])
def test_names_shapes_and_counts_of_the_fixtures(fixture):
    golden = load_golden(f"sepvit/{fixture}")
    options = {"features_only": True} if fixture.startswith("backbone") else {}
    model = build_on_meta(f"sepvit_{fixture.split('_')[-1]}", **options)
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert ours == {name: shape for name, shape, _ in golden["state_dict"]}
    assert count(model) == golden["params"]
    counted, detail = count_macs(model, 224), golden["macs_detail"]
    assert counted.total == sum(detail.values()) - detail["layer_norm"]
    assert authors_macs(model, 224) == golden["macs_fvcore"]


def test_authors_counter_is_fvcore(filled):
    assert authors_macs(filled["lite"], 224) == count_macs_fvcore(filled["lite"], 224).total


@pytest.mark.parametrize("size", COUNTS)
def test_counts_of_all_sizes(size):
    params, fvcore, macs = COUNTS[size]
    model = build_on_meta(f"sepvit_{size}")
    assert (count(model), count_macs(model, 224).total) == (params, macs)
    assert authors_macs(model, 224) == pytest.approx(fvcore, abs=5e5)


def test_counts_of_the_ablation():
    """Without grouped attention, and with a stem that does not overlap."""
    plain = build_on_meta("sepvit_tiny", windows=((7,),) * 4)
    stem = build_on_meta("sepvit_tiny", stem_kernel=4)
    assert count(plain) / 1e6 == pytest.approx(32.079, abs=5e-4)
    assert count(stem) / 1e6 == pytest.approx(31.173, abs=5e-4)
    assert authors_macs(plain, 224) / 1e9 == pytest.approx(4.438, abs=5e-4)
    assert authors_macs(stem, 224) / 1e9 == pytest.approx(4.504, abs=5e-4)


@pytest.mark.parametrize(("size", "side"), [("tiny", 224), ("lite", 448), ("lite", 256)])
def test_formulas_equal_the_counter_in_every_block(size, side):
    counted = count_macs(build_on_meta(f"sepvit_{size}", image_size=side), side).modules.flat(4)
    costs = block_costs(ARCHITECTURES[size], side)
    for one in costs:
        name = f"blocks.{one.stage}.{one.block}"
        assert (counted[f"{name}.attn"], counted[name]) == (one.attention, one.total)
    if size == "tiny":
        attention = {(one.stage, one.block): one.attention for one in costs}
        assert attention[0, 0] == 168_935_424 and attention[1, 0] == 136_372_224
        assert attention[1, 1] == 176_558_592 and attention[2, 0] == 126_541_824
        assert attention[2, 1] == 145_108_992 and attention[3, 0] == 119_293_440


def test_one_block_is_half_of_two_of_swin():
    """Ratios measured with the released code, whose counter adds 5 per element of a norm."""
    arch = ARCHITECTURES["tiny"]
    ratios = {}
    for one in block_costs(arch, 224):
        (height, width), dim = arch.maps(224)[one.stage], arch.embed_dims[one.stage]
        tokens = one.windows if one.windows > 1 else 0
        # normalised: the map twice, window tokens before and between the attentions
        norms = 5 * dim * (2 * height * width + 2 * tokens)
        ratios[one.stage, one.block] = (one.total + norms) / two_swin_blocks(height, width, dim)
    places = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    expected = [0.536, 0.510, 0.566, 0.506, 0.532, 0.501]
    assert [ratios[one] for one in places] == pytest.approx(expected, abs=6e-4)


def test_initialisation_is_the_released_one():
    torch.manual_seed(0)
    model = harness.build("sepvit_lite")
    weights = {name: one.detach() for name, one in model.named_parameters()}
    assert not any(one.any() for name, one in weights.items() if name.endswith("win_tokens"))
    assert not any(one.any() for name, one in weights.items() if name.endswith("bias"))
    assert weights["blocks.3.0.mlp.fc1.weight"].std() == pytest.approx(0.02, rel=0.02)
    fan_out = 3 * 3 * 256
    assert weights["patch_embeds.3.proj.weight"].std() == pytest.approx(
        (2 / fan_out) ** 0.5, rel=0.02
    )
    assert weights["pos_block.3.proj.0.weight"].std() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert (weights["blocks.0.0.norm1.weight"] == 1).all()


# checkpoints


def test_checkpoint_of_another_network_is_refused():
    with pytest.raises(ReplivitError, match=r"no SepViT of the authors.*'patch_embeds.0.proj.wei"):
        harness.load_official("sepvit_lite", {"stem.weight": torch.zeros(1)})
    with pytest.raises(ReplivitError, match="it fits sepvit_lite"):
        harness.load_official("sepvit_tiny", official("lite"))


def test_backbone_of_a_whole_detector():
    """The dense code saves `state_dict` with a neck and heads around the backbone."""
    backbone = harness.build("sepvit_lite", features_only=True)
    state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    saved = {"meta": {}, "state_dict": {**state, "neck.fpn.weight": torch.zeros(1)}}
    ours = harness.load_official("sepvit_lite", saved, features_only=True)
    loaded = ours.state_dict()
    assert all(torch.equal(loaded[key], one) for key, one in backbone.state_dict().items())


def test_classifier_in_the_dense_backbone():
    """What a loose load does: tokens have no place, late attentions between windows stay new."""
    backbone = build_on_meta("sepvit_tiny", features_only=True)
    assert isinstance(backbone, SepViTPyramid)
    from harness.checkpoints import coverage

    found = coverage(backbone, build_on_meta("sepvit_tiny").state_dict())
    assert len(found.unexpected) == 6 and all("win_tokens" in key for key in found.unexpected)
    norms = [key for key in found.missing if key.startswith("norm_list")]
    assert (len(norms), len(found.missing)) == (8, 28)
    prefixes = {key.split(".attn")[0] for key in found.missing if key not in norms}
    assert prefixes == {f"blocks.{block}" for block in ("2.1", "2.3", "2.5", "3.0", "3.1")}
