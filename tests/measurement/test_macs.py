"""Both counters: equal to the golden rows, linear in the batch, and without a trace left."""

import copy

import pytest
import timm
import torch
from golden_tools import load_golden
from torch import nn

from harness.measurement.macs import breakdown, count_macs, count_macs_distribution
from harness.measurement.macs_fvcore import count_macs_fvcore, explain_gap
from harness.measurement.params import count_params
from harness.meta import on_meta

ROWS = load_golden("baselines/macs_224")["rows"]


@pytest.mark.parametrize("row", ROWS, ids=[row["variant"] for row in ROWS])
def test_both_counters_give_the_golden_rows(row):
    """At full size, with attention fused as timm builds it: the unfused totals, operator by
    operator."""
    model = timm.create_model(row["timm"], num_classes=1000)
    params = count_params(model)
    assert (params.total, params.buffers) == (row["params"], row["buffers"])

    macs = count_macs(model, row["img_size"])
    golden = row["torch_flop_counter_fused"]
    assert macs.total == golden["half"] == row["torch_flop_counter_unfused"]["half"]
    assert {name: 2 * value for name, value in macs.by_operator.items()} == golden["by_op"]
    assert macs.modules.macs == macs.total == sum(macs.by_operator.values())

    fvcore = count_macs_fvcore(model, row["img_size"])
    assert fvcore.total == row["fvcore_unfused"]["macs"]
    by_op = dict(row["fvcore_fused"]["by_op"])
    if row["fvcore_missing_attention_macs"]:
        by_op["scaled_dot_product_attention"] = row["fvcore_missing_attention_macs"]
    assert fvcore.by_operator == by_op
    unsupported = dict(row["fvcore_fused"]["unsupported"])
    unsupported.pop("aten::scaled_dot_product_attention", None)
    assert fvcore.unsupported == unsupported

    gap = explain_gap(macs, fvcore)
    norms = {"layer_norm", "batch_norm", "adaptive_avg_pool2d"}
    assert {reason.operator for reason in gap.reasons} <= norms
    assert sum(reason.macs for reason in gap.reasons) == gap.macs == fvcore.total - macs.total
    assert gap.notable == (abs(fvcore.total / macs.total - 1) > 0.005)


class Mixed(nn.Module):
    """Convolution, norms, fused attention, a linear layer: (B, 3, 8, 8) -> (B, 5)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 2, stride=2)
        self.bn = nn.BatchNorm2d(12)
        self.blocks = nn.ModuleList([nn.LayerNorm(12), nn.Dropout(0.5)])
        self.qkv = nn.Linear(12, 36)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.bn(self.stem(x)).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(x.transpose(1, 2).flatten(2).mean(1))


MIXED = 16 * 3 * 4 * 12 + 16 * 12 * 36 + 2 * 16 * 16 * 12 + 12 * 5
NORMS = 2 * 16 * 12 + 5 * 16 * 12


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_counts_per_image_do_not_depend_on_the_batch(batch):
    model = Mixed()
    macs, fvcore = count_macs(model, 8, batch), count_macs_fvcore(model, 8, batch)
    assert (macs.total, fvcore.total) == (MIXED, MIXED + NORMS)
    assert (macs.batch_size, macs.modules.macs) == (batch, MIXED)
    assert explain_gap(macs, fvcore).macs == NORMS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_of_the_module_is_used(dtype):
    model = Mixed().to(dtype)
    assert count_macs(model, 8).total == MIXED
    assert count_macs_fvcore(model, 8).total == MIXED + NORMS


def test_meta_modules_count_without_memory():
    with on_meta():
        model = Mixed()
        large = timm.create_model("deit_base_patch16_224")
    assert count_macs(model, 8).total == MIXED
    assert count_macs(large, 224).total == 17_563_828_224
    with pytest.raises(ValueError, match="real device"):
        count_macs_fvcore(model, 8)


def test_sizes_need_not_be_square():
    model = nn.Conv2d(3, 4, 3, padding=1)
    assert count_macs(model, (5, 7)).total == count_macs_fvcore(model, (5, 7)).total
    assert count_macs(model, (5, 7)).total == 5 * 7 * 3 * 4 * 9


def test_inputs_may_be_tokens_or_several_tensors():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 4))
    tokens = torch.randint(50, (3, 10))
    assert count_macs(model, inputs=tokens).total == 10 * 8 * 4
    assert count_macs_fvcore(model, inputs=tokens).total == 10 * 8 * 4
    pair = (torch.randn(2, 6, 8), torch.randn(2, 9, 8))
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    expected = 8 * 8 * (6 + 9 + 9 + 6) + 2 * 6 * 9 * 8
    assert count_macs(attention, inputs=(pair[0], pair[1], pair[1])).total == expected
    with pytest.raises(ValueError, match="image size or example inputs"):
        count_macs(model)


class Caching(nn.Module):
    """Keeps a table in evaluation mode and drops it in training mode, as attention biases do."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        self.cache = None

    def train(self, mode=True):
        super().train(mode)
        self.cache = None if mode else self.bias.detach() * 2
        return self

    def forward(self, x):
        assert self.cache is not None
        return x + self.cache[:, None, None] + torch.randn(()) * 0


@pytest.mark.parametrize("count", [count_macs, count_macs_fvcore])
def test_counting_leaves_no_trace(count):
    model = nn.Sequential(Caching(), Mixed())
    model[1].bn.eval()  # a frozen norm in a model that trains
    before = copy.deepcopy(model.state_dict())
    flags = [part.training for part in model.modules()]
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    count(model, 8)
    assert torch.equal(torch.randn(3), expected), "the random state moved"
    assert [part.training for part in model.modules()] == flags
    assert model[0].cache is None, "train() was not called again"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()
    model[0].eval()
    assert not model[0].cache.is_inference()


@pytest.mark.parametrize("count", [count_macs, count_macs_fvcore])
def test_a_failing_forward_leaves_no_trace(count):
    model = Mixed()
    apply = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(RuntimeError):
        count(model, inputs=torch.randn(1, 4, 8, 8))
    assert model.training and torch.is_grad_enabled()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.autograd.Function.__dict__["apply"] is apply
    assert count(model, 8).total in (MIXED, MIXED + NORMS)


def test_a_compiled_module_counts_as_the_module_inside():
    assert count_macs(torch.compile(Mixed(), backend="eager"), 8).total == MIXED


def test_the_tree_says_where_multiply_adds_go():
    tree = breakdown(Mixed(), 8)
    assert tree.flat(1) == {
        "Mixed": MIXED,
        "stem": 16 * 3 * 4 * 12,
        "bn": 0,
        "blocks": 0,
        "qkv": 16 * 12 * 36,
        "head": 12 * 5,
    }
    own = tree.macs - sum(child.macs for child in tree.children)
    assert own == 2 * 16 * 16 * 12  # the attention call stands in no sub-module
    assert (tree.type, tree.params) == ("Mixed", count_params(Mixed()).total)
    assert "blocks.0" in tree.flat(2)


def test_a_shared_module_is_charged_to_each_caller():
    class Half(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.shared = shared

        def forward(self, x):
            return self.shared(self.shared(x))

    shared = nn.Linear(4, 4)
    model = nn.Sequential(Half(shared), Half(shared), shared)
    found = count_macs(model, inputs=torch.randn(1, 4))
    assert found.total == count_macs_fvcore(model, inputs=torch.randn(1, 4)).total == 5 * 16
    assert found.modules.flat(2) == {
        "Sequential": 80, "0": 32, "0.shared": 32, "1": 32, "1.shared": 32, "2": 16,
    }  # fmt: skip
    assert [child.calls for child in found.modules.children] == [1, 1, 1]
    assert found.modules.children[0].children[0].calls == 2
    assert found.modules.params == 20


def test_a_recursive_module_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, again=True):
            x = self.fc(x)
            return self(x, again=False) if again else x

    tree = breakdown(Twice(), inputs=torch.randn(1, 4))
    assert (tree.macs, tree.calls, tree.children[0].macs) == (32, 2, 32)


def test_a_gap_of_matrix_products_names_what_fvcore_cannot_see():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x @ x

    stored = Square.apply  # out of the adapter's reach

    class Model(nn.Module):
        def forward(self, x):
            return stored(x)

    x = torch.randn(1, 6, 6)
    gap = explain_gap(count_macs(Model(), inputs=x), count_macs_fvcore(Model(), inputs=x))
    (reason,) = gap.reasons
    assert gap.notable and gap.relative == -1
    assert reason.macs == gap.macs == -216
    assert "prim::PythonOp.Square" in reason.why and "216" in reason.why


class KeepsBright(nn.Module):
    """One linear layer on the pixels above zero: its cost is the number of them."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 7)

    def forward(self, x):
        tokens = x.flatten(2).mT
        return self.fc(tokens[tokens.amin(-1) > 0]).sum(0, keepdim=True)


def test_the_distribution_counts_image_by_image():
    images = [torch.zeros(3, 5, 25) for _ in range(101)]
    for count, image in enumerate(images):
        image.flatten(1)[:, :count] = 1
    model = KeepsBright().train()
    found = count_macs_distribution(model, images)
    assert found.values == tuple(21 * count for count in range(101))
    assert (found.mean, found.p5, found.p95, found.n) == (21 * 50, 21 * 5, 21 * 95, 101)
    assert model.training
    assert count_macs(model, inputs=images[30][None]).total == 21 * 30
    with pytest.raises(ValueError, match="at least one image"):
        count_macs_distribution(model, [])
