"""AutoFormer's networks: equal to the authors', as a supernet and as dense subnets."""

from __future__ import annotations

import functools
import random

import pytest
import torch
import torch.nn.functional as F
from golden_tools import (
    assert_matches,
    fill_value,
    filled_state_dict,
    golden_cases,
    golden_input,
    load_golden,
)

import harness
from harness.errors import ReplivitError
from harness.meta import on_meta
from reproductions.autoformer.attention import Grid
from reproductions.autoformer.convert import resize_positions
from reproductions.autoformer.counting import complexity_of, params_of
from reproductions.autoformer.space import (
    AUTOFORMER_B,
    AUTOFORMER_B8,
    AUTOFORMER_S,
    AUTOFORMER_T,
    MICRO,
    PUBLISHED,
    SPACES,
    Config,
    Space,
)
from reproductions.autoformer.subnet import Subnet
from reproductions.autoformer.supernet import Supernet, qkv_rows, slice_state

FIXTURES = ("autoformer/supernet_t", "autoformer/supernet_s")
CASES = [case for name in FIXTURES for case in golden_cases(name)]


def of_kind(kind: str) -> list:
    return [case for case in CASES if case.values[0]["kind"] == kind]


def space_of(case: dict) -> Space:
    """The fixtures of the small space have dimensions from 320 on."""
    wide = case["extra"]["config"]["embed_dim"] >= 320
    return AUTOFORMER_S if wide else AUTOFORMER_T


@functools.cache
def value_of(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode(False):  # it may be asked for inside, and wanted for gradients later
        return torch.from_numpy(fill_value(key, shape)).float()


def official(space: Space, build: dict | None = None) -> Supernet:
    """A supernet with the fixtures' weights; `build` in the authors' words."""
    build = dict(build or {})
    image_size = build.pop("img_size", 224)
    options = {"global_pool" if key == "gp" else key: value for key, value in build.items()}
    with on_meta():  # weights are not drawn only to be replaced
        net = Supernet(space, 1000, image_size, **options)
    net.grid = Grid(net.grid.size, space.max_distance)
    state = {key: value_of(key, tuple(one.shape)) for key, one in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    return net.eval()


# ---- against the authors' numbers ----------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("case", of_kind("logits"))
def test_logits_params_and_official_counter(case):
    """The sliced supernet and the extracted subnet; both counts by formula and by the modules."""
    net = official(space_of(case), case["extra"].get("build"))
    config = Config.of(case["extra"]["config"])
    images = golden_input(case["input_shape"])
    logits = net.set_config(config)(images)
    assert_matches(logits, case)
    dense = net.extract()
    if "published" in case["name"]:
        assert torch.equal(dense(images), logits), "bit for bit"
    else:
        torch.testing.assert_close(dense(images[:1]), logits[:1], rtol=1e-5, atol=1e-5)
    assert sum(one.numel() for one in dense.parameters()) == case["params"]
    assert net.params_of(config) == case["params"]
    assert net.complexity_of(config) == case["get_complexity"]


@pytest.mark.parametrize("name", FIXTURES)
def test_state_dict_is_the_authors(name):
    fixture = load_golden(name)
    space = SPACES[fixture["harness"]["size"].lower()]
    net = Supernet(space)
    assert [[key, list(one.shape), "float32"] for key, one in net.state_dict().items()] == (
        fixture["state_dict"]
    )
    assert sum(one.numel() for one in net.parameters()) == fixture["params"]


@torch.inference_mode()
@pytest.mark.parametrize("case", of_kind("features"))
def test_features_of_every_part(case):
    net = official(AUTOFORMER_T).set_config(Config.of(case["extra"]["config"]))
    seen = {}
    for name in case["expect"]["features"]:
        module = net.get_submodule("patch_embed_super" if name == "patch_embed" else name)
        keep = lambda _, inputs, output, name=name: seen.__setitem__(name, output)  # noqa: E731
        module.register_forward_hook(keep)
    net(golden_input(case["input_shape"]))
    expected_all = case["expect"]["features"]
    assert seen.keys() == expected_all.keys() and len(seen) >= 5
    for name, expected in expected_all.items():
        assert_matches(seen[name], expected)


@pytest.mark.parametrize("case", of_kind("qkv_rows"))
def test_qkv_rows_interleave_and_its_bias_does_not(case):
    size, heads = case["extra"]["super_embed_dim"], case["extra"]["num_heads"]
    dim, expected = case["extra"]["embed_dim"], case["expect"]
    rows = torch.arange(3 * size)[:, None].expand(-1, size)
    assert qkv_rows(rows, 64 * heads, dim)[:, 0].tolist() == expected["weight_rows"]
    assert qkv_rows(rows, 64 * heads, dim).shape[1] == expected["n_columns"]
    space = AUTOFORMER_T if size == 256 else AUTOFORMER_S
    config = Config(1, dim, (3.5,), (heads,))
    kept = slice_state({"blocks.0.attn.qkv.bias": torch.arange(3 * size)}, space, config)
    bias = kept["blocks.0.attn.qkv.bias"].tolist()
    assert [bias[0], bias[-1], len(bias)] == expected["bias_rows"]


@pytest.mark.parametrize("case", of_kind("rpe_index"))
def test_relative_positions_of_every_pair(case):
    """The marks of a key pick the two entries that the authors' (N, N) tables name."""
    side = case["extra"]["grid"]
    grid, length = Grid((side, side), 14), 30
    found = {"v": [], "h": []}
    for query in range(1 + side * side):
        # entries reached by each key: one for its row, one for its column, or the class token's
        entries = (grid.entries[query] * grid.marks.long())[:, : 2 * side]
        vertical = entries[:, :side].sum(1)
        horizontal = (entries[:, side:] - length * grid.marks[:, side : 2 * side].long()).sum(1)
        found["v"].append(vertical)
        found["h"].append(horizontal)
    for axis in "vh":
        table = torch.stack(found[axis])
        assert list(table.shape) == case["expect"]["shape"][:2]
        assert int(table.sum()) == case["expect"][f"sum_{axis}"]
        for query in case["extra"]["queries"]:
            assert table[query].tolist() == case["expect"][f"rows_{axis}"][str(query)]
    class_pairs = torch.cat((grid.entries[:, -1], grid.entries[0, : 2 * side]))
    assert set(class_pairs.tolist()) == {0, length, 2 * length}


@pytest.mark.parametrize("case", of_kind("grad"))
def test_gradients_reach_exactly_the_slices(case):
    net = official(AUTOFORMER_T, case["extra"]["build"]).train().requires_grad_()
    net.set_config(Config.of(case["extra"]["config"]))
    logits = net(golden_input(case["input_shape"]))
    loss = F.cross_entropy(logits, torch.tensor(case["extra"]["targets"]))
    loss.backward()
    assert loss.item() == pytest.approx(case["expect"]["loss"], rel=2e-5)
    parameters, expected = dict(net.named_parameters()), case["expect"]["grads"]
    assert len(expected) > 40
    for name, wanted in expected.items():
        gradient = parameters[name].grad
        if wanted is None:
            assert gradient is None, name
            continue
        assert float(gradient.double().norm()) == pytest.approx(wanted["l2"], rel=2e-5), name
        assert gradient.numel() == wanted["numel"]
        if not name.endswith("qkv.bias"):  # the keys' bias has gradients of rounding size only
            assert int(gradient.count_nonzero()) == wanted["nonzero"], name


@pytest.mark.parametrize("case", of_kind("rates"))
def test_drop_rates(case):
    net = Supernet(AUTOFORMER_T, **case["extra"]["build"])
    net.set_config(Config.of(case["extra"]["config"]))
    expected = case["expect"]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in net.blocks]
    assert rates == pytest.approx(expected["drop_path"], abs=1e-8)
    assert net.dropout == pytest.approx(expected["sample_dropout"])
    assert net.blocks[0].dropout == pytest.approx(expected["block0_sample_dropout"])
    assert net.blocks[0].attn_dropout == expected["block0_sample_attn_dropout"]
    idle = [index >= net.config.depth for index in range(len(net.blocks))]
    assert idle == expected["identity"] and len(net.active_blocks()) == net.config.depth


@pytest.mark.parametrize("case", of_kind("params_table"))
def test_counts_by_formula(case):
    configs = [Config.of(one) for one in case["extra"]["configs"]]
    space = AUTOFORMER_S if configs[0].embed_dim >= 320 else AUTOFORMER_T
    found = [[params_of(space, one), complexity_of(space, one)] for one in configs]
    assert found == case["expect"]["params_and_complexity"] and len(found) == 20


@pytest.mark.parametrize("case", of_kind("sample_configs"))
def test_draws_follow_the_released_order(case):
    space = AUTOFORMER_S if 320 in case["extra"]["choices"]["embed_dim"] else AUTOFORMER_T
    for seed, expected in case["expect"]["configs"].items():
        rng = random.Random(int(seed))
        assert [space.sample(rng) for _ in expected] == [Config.of(one) for one in expected]


def test_published_subnets_have_the_printed_sizes():
    sizes = {key: params_of(SPACES[key], PUBLISHED[key]) for key in PUBLISHED}
    assert sizes == {"t": 5_867_944, "s": 22_891_432, "b": 53_691_688}
    complexities = {key: complexity_of(SPACES[key], PUBLISHED[key]) / 1e9 for key in PUBLISHED}
    assert complexities == pytest.approx({"t": 1.344, "s": 4.892, "b": 11.237}, abs=5e-4)


def test_macs_of_the_parts_that_are_not_reorganised():
    """Convolution and linears as fvcore counts the authors'; the relative terms cost less."""
    from harness.measurement.macs import count_macs

    case = of_kind("logits")[0].values[0]
    theirs = case["macs_fvcore"]["by_op"]
    count = count_macs(harness.build("autoformer_t").eval(), 224)
    dense = sum(
        one for operator, one in count.by_operator.items() if "addmm" in operator
        or "convolution" in operator
    )  # fmt: skip
    assert dense == theirs["conv"] + theirs["linear"]
    assert count.total < case["macs_fvcore"]["total"]


# ---- properties of ours --------------------------------------------------------------------------


def filled(net: torch.nn.Module) -> torch.nn.Module:
    state = {key: torch.from_numpy(fill_value(key, tuple(one.shape))).float()
             for key, one in net.state_dict().items()}  # fmt: skip
    net.load_state_dict(state)
    return net.eval()


@torch.inference_mode()
@pytest.mark.parametrize("options", [
    {}, {"scale": True}, {"global_pool": False}, {"relative_position": False},
    {"absolute_position": False}, {"pre_norm": False}, {"qkv_bias": False},
])  # fmt: skip
def test_every_draw_equals_its_extraction(options):
    net, rng = filled(Supernet(MICRO, 10, 32, **options)), random.Random(1)
    images = golden_input([2, 3, 32, 32])
    for config in (MICRO.smallest(), MICRO.largest(), MICRO.full(), MICRO.sample(rng)):
        dense = net.set_config(config).extract()
        torch.testing.assert_close(dense(images), net(images), rtol=1e-5, atol=1e-6)
        assert type(dense) is Subnet and dense.config == config
        assert sum(one.numel() for one in dense.parameters()) == net.params_of(config)
        changed = net.blocks[0].fc1.bias.clone()
        dense.blocks[0].fc1.bias.add_(1)
        assert torch.equal(net.blocks[0].fc1.bias, changed), "the copy is independent"


def reference_attention(attention, x, grid_size, max_distance):
    """The definition, with (N, N, d) tensors."""
    height, width = grid_size
    place = torch.arange(height * width)
    length = 2 * max_distance + 2

    def table(position):
        index = []
        for part in (place // width, place % width):
            distance = (part[None] - part[:, None]).clamp(-max_distance, max_distance)
            index.append(F.pad(distance + max_distance + 1, (1, 0, 1, 0)))
        assert position.embeddings_table_v.shape[0] == length
        return position.embeddings_table_v[index[0]] + position.embeddings_table_h[index[1]]

    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).view(batch, tokens, 3, attention.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    logits = q @ k.mT + torch.einsum("bhnd,nmd->bhnm", q, table(attention.rel_pos_embed_k))
    weights = (logits * attention.head_dim**-0.5).softmax(-1)
    moved = torch.einsum("bhnm,nmd->bhnd", weights, table(attention.rel_pos_embed_v))
    return attention.proj((weights @ v + moved).transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (32, 48), (16, 64)])
def test_attention_is_its_definition_on_any_grid(size):
    """Rectangles too, with true rows and columns, and distances that are clamped."""
    net = filled(Subnet(MICRO, MICRO.smallest(), 10, size))
    attention, grid = net.blocks[1].attn, net.grid
    x = golden_input([2, 1 + grid.size[0] * grid.size[1], 48])
    expected = reference_attention(attention, x, grid.size, MICRO.max_distance)
    torch.testing.assert_close(attention(x, grid), expected, rtol=1e-5, atol=1e-5)


def test_spaces_have_the_stated_extent():
    """Stated with three or four digits, which is all that can be asked."""
    assert AUTOFORMER_T.candidates == pytest.approx(1.057e9, rel=1e-3)
    assert AUTOFORMER_S.candidates == pytest.approx(7.71e13, rel=1e-3)
    assert AUTOFORMER_B.candidates == pytest.approx(1.01e13, rel=1e-2)
    assert AUTOFORMER_B8.candidates == pytest.approx(6.25e15, rel=1e-3)
    for space, low, high in (
        (AUTOFORMER_T, 5.366, 10.517), (AUTOFORMER_S, 13.057, 34.790),
        (AUTOFORMER_B, 41.688, 76.882), (AUTOFORMER_B8, 39.793, 76.882),
    ):  # fmt: skip
        assert params_of(space, space.smallest()) / 1e6 == pytest.approx(low, abs=1e-3)
        assert params_of(space, space.largest()) / 1e6 == pytest.approx(high, abs=1e-3)


# ---- checkpoints and bad input -------------------------------------------------------------------


@torch.inference_mode()
def test_official_supernet_becomes_supernet_or_published_subnet():
    case = of_kind("logits")[0].values[0]
    fixture = load_golden(FIXTURES[0])
    state = {"model": filled_state_dict(fixture["state_dict"])}
    images = golden_input(case["input_shape"])
    subnet = harness.load_official("autoformer_t", state)
    assert_matches(subnet(images), case)
    supernet = harness.load_official("autoformer_supernet_t", state)
    assert_matches(supernet.set_config(PUBLISHED["t"])(images), case)
    again = harness.load_official("autoformer_t", subnet.state_dict())
    assert torch.equal(again(images), subnet(images))


def test_checkpoint_of_another_supernet_is_refused():
    state = filled_state_dict(load_golden(FIXTURES[0])["state_dict"])
    with pytest.raises(ReplivitError, match="dimension 256 and depth 14; the supernet of "
                       "AutoFormer-S has 448 and 14"):  # fmt: skip
        harness.load_official("autoformer_s", state)
    with pytest.raises(ReplivitError, match="fits autoformer_supernet_t"):
        harness.load_official("autoformer_supernet_s", state)
    with pytest.raises(ReplivitError, match="no official checkpoint"):
        harness.load_official("autoformer_t", {"weight": torch.zeros(2)})


@torch.inference_mode()
def test_positions_can_be_resampled_for_another_size():
    state = filled(Supernet(MICRO, 10, 32)).state_dict()
    larger = Supernet(MICRO, 10, 48)
    larger.load_state_dict(resize_positions(state, (12, 12)))
    assert torch.equal(larger.pos_embed[:, 0], state["pos_embed"][:, 0])
    assert larger.eval()(golden_input([1, 3, 48, 48])).isfinite().all()
    same = resize_positions(state, (8, 8))
    torch.testing.assert_close(same["pos_embed"], state["pos_embed"])
    with pytest.raises(ValueError, match="square grid"):
        resize_positions({"pos_embed": torch.zeros(1, 7, 4)}, (8, 8))


@pytest.mark.parametrize(("config", "message"), [
    (Config(11, 192, (4,) * 11, (3,) * 11), "depth 11 is outside AutoFormer-T; .* 12, 13, 14"),
    (Config(12, 200, (4,) * 12, (3,) * 12), "embed_dim 200 .* 192, 216, 240"),
    (Config(12, 192, (3,) * 12, (3,) * 12), "mlp_ratio 3 .* 3.5, 4"),
    (Config(12, 192, (4,) * 12, (5,) * 12), "num_heads 5 .* 3, 4"),
])  # fmt: skip
def test_outside_the_space(config, message):
    with pytest.raises(ValueError, match=message):
        AUTOFORMER_T.check(config)
    assert not AUTOFORMER_T.contains(config) and AUTOFORMER_T.contains(AUTOFORMER_T.smallest())


@pytest.mark.parametrize(("config", "message"), [
    ({"depth": 15, "embed_dim": 192, "num_heads": 3, "mlp_ratio": 4}, "depth 15 .* 1 to 14"),
    ({"depth": 12, "embed_dim": 300, "num_heads": 3, "mlp_ratio": 4}, "embed_dim 300 .* 1 to 256"),
    ({"depth": 12, "embed_dim": 192, "num_heads": 5, "mlp_ratio": 4}, "num_heads 5 .* 1 to 4"),
    ({"depth": 12, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 5}, "mlp_ratio 5 .* at most 4"),
    ({"depth": 2, "embed_dim": 192, "num_heads": [3], "mlp_ratio": 4}, "needs 2 num_heads, not 1"),
    ({"depth": 2, "width": 192}, "has the keys depth, embed_dim, mlp_ratios and num_heads"),
    ("tiny", "a Config or a mapping, not 'tiny'"),
])  # fmt: skip
def test_outside_the_supernet(config, message):
    with on_meta():
        net = Supernet(AUTOFORMER_T)
        with pytest.raises(ValueError, match=message):
            net.set_config(config)
        with pytest.raises(ValueError, match=message):
            harness.build("autoformer_supernet_t", config=config)


def test_other_impossible_builds():
    with pytest.raises(ValueError, match=r"multiple of 16, not 230"):
        harness.build("autoformer_t", image_size=230)
    with pytest.raises(ValueError, match="no published subnet"):
        harness.build("autoformer_b", space="b8")
    with pytest.raises(ValueError, match="no search space 'x'; there are t, s, b, b8, micro"):
        harness.build("autoformer_supernet_t", space="x")
    with on_meta():
        net = harness.build("autoformer_supernet_t", change_qkv=False)
        with pytest.raises(ValueError, match="num_heads cannot be 3"):
            net.set_config({"depth": 12, "embed_dim": 192, "num_heads": 3, "mlp_ratios": 4})
        with pytest.raises(ValueError, match="images of 224x224, not 192x192"):
            net(torch.zeros(1, 3, 192, 192))
