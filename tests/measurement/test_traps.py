"""The traps of counting, one by one: each against its closed form, by both counters.

What neither counter can see must be listed with its kind, so that nothing is silently zero.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from counting_tools import Calls, counted, totals
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import flop_counter

from harness.errors import ReplivitError
from harness.measurement import operators
from harness.measurement.macs import count_macs
from harness.measurement.macs_fvcore import einsum_macs, explain_gap

# --- attention ---------------------------------------------------------------------------------


def heads(tokens, dim, count=2, device="cpu"):
    return torch.randn(1, count, tokens, dim, device=device)


@pytest.mark.parametrize(
    ("value_dim", "options"),
    [(8, {}), (4, {}), (8, {"is_causal": True}), (8, {"attn_mask": torch.zeros(6, 6)})],
)
def test_fused_attention(value_dim, options):
    """B H Nq Nk (Dk + Dv), masked or not: a mask does not make dense kernels cheaper."""
    expected = 2 * 6 * 6 * (8 + value_dim)
    inputs = heads(6, 8), heads(6, 8), heads(6, value_dim)

    def attend(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, **options)

    assert totals(attend, *inputs) == (expected, expected)


def test_fused_attention_with_fewer_queries_and_grouped_heads():
    inputs = heads(3, 8, count=4), heads(9, 8), heads(9, 8)

    def attend(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    assert totals(attend, *inputs) == (4 * 3 * 9 * 16, 4 * 3 * 9 * 16)


def test_fused_attention_on_meta():
    inputs = (heads(6, 8, device="meta"),) * 3
    count = count_macs(Calls(F.scaled_dot_product_attention), inputs=inputs)
    assert count.total == 2 * 6 * 6 * 16


def unfused(query, key, value):
    return (query @ key.mT).softmax(-1) @ value


def test_fused_and_unfused_attention_count_the_same():
    inputs = heads(6, 8), heads(6, 8), heads(6, 8)
    assert totals(unfused, *inputs) == totals(F.scaled_dot_product_attention, *inputs)


KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.fixture
def fresh_formulas():
    operators.formulas.cache_clear()
    yield
    operators.formulas.cache_clear()


@pytest.mark.parametrize("fault", ["missing", "zero"])
def test_the_self_check_mends_a_torch_that_counts_attention_as_zero(
    monkeypatch, fresh_formulas, fault
):
    if fault == "missing":
        monkeypatch.delitem(flop_counter.flop_registry, KERNEL, raising=False)
    else:
        monkeypatch.setitem(flop_counter.flop_registry, KERNEL, lambda *_, **__: 0)
    query = heads(6, 8)
    with flop_counter.FlopCounterMode(display=False) as plain:
        F.scaled_dot_product_attention(query, query, query)
    assert plain.get_total_flops() == 0, "the fault was not injected"
    count = count_macs(Calls(F.scaled_dot_product_attention), inputs=(query, query, query))
    assert count.total == 2 * 6 * 6 * 16


def test_a_torch_that_cannot_be_mended_is_refused(monkeypatch, fresh_formulas):
    monkeypatch.setattr(operators, "_counts_attention", lambda *_: False)
    with pytest.raises(ReplivitError, match="does not count a known attention call"):
        count_macs(nn.Linear(2, 2), inputs=torch.randn(1, 2))


class SelfAttention(nn.MultiheadAttention):
    """torch's attention of a sequence with itself."""

    def __init__(self, dim, need_weights):
        super().__init__(dim, 4, batch_first=True)
        self.need_weights = need_weights
        self.eval()

    def forward(self, x):
        return super().forward(x, x, x, need_weights=self.need_weights)[0]


def test_multihead_attention_and_encoder_layer():
    """Their inference fast path is one kernel without a formula; it must be off."""
    tokens, dim, hidden = 8, 16, 32
    x = torch.randn(1, tokens, dim)
    attention = 4 * tokens * dim**2 + 2 * tokens**2 * dim
    for need_weights in (True, False):
        layer = SelfAttention(dim, need_weights)
        assert totals(layer, x) == (attention, attention)

    encoder = nn.TransformerEncoderLayer(dim, 4, hidden, batch_first=True).eval()
    canonical, fvcore = counted(encoder, x)
    assert canonical.total == attention + 2 * tokens * dim * hidden
    assert fvcore.total - canonical.total == 2 * 5 * tokens * dim
    assert [one.operator for one in explain_gap(canonical, fvcore).reasons] == ["layer_norm"]


# --- custom autograd functions -----------------------------------------------------------------


class Coupling(torch.autograd.Function):
    """A reversible coupling: (x1 + W x2, x2), keeping nothing of what a backward would need."""

    @staticmethod
    def forward(ctx, x1, x2, weight):
        ctx.save_for_backward(weight)
        ctx.set_materialize_grads(False)
        return x1 + x2 @ weight, x2


class Product(torch.autograd.Function):
    """The newer form, with a context of its own."""

    @staticmethod
    def forward(a, b):
        return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


def test_custom_autograd_functions_are_looked_into():
    a, b, weight = torch.randn(1, 7, 5), torch.randn(1, 7, 5), torch.randn(5, 5)
    assert totals(lambda *t: Coupling.apply(*t), a, b, weight) == (7 * 25, 7 * 25)
    assert totals(lambda *t: Product.apply(*t), a, b.mT) == (7 * 7 * 5, 7 * 7 * 5)


# --- einsum and other products -----------------------------------------------------------------


def test_einsum_of_two_operands_is_exact():
    """fvcore alone rounds this one to 7,375,000."""
    q, k = torch.randn(1, 3, 196, 64), torch.randn(1, 3, 196, 64)
    assert totals(lambda q, k: torch.einsum("bhnd,bhmd->bhnm", q, k), q, k) == (7_375_872,) * 2


def test_einsum_of_three_operands_counts_products_and_lists_the_outer_one():
    a, b, c = torch.randn(1, 4, 8), torch.randn(1, 6, 8), torch.randn(1, 5, 8)
    canonical, fvcore = counted(lambda *t: torch.einsum("bnd,bmd,bkd->bnmk", *t), a, b, c)
    assert canonical.total == fvcore.total == 4 * 6 * 5 * 8
    outer = canonical.suspicious["aten.mul (broadcast)"]
    assert outer.estimated_macs in (4 * 6 * 8, 4 * 5 * 8, 6 * 5 * 8)  # whichever pair came first


@st.composite
def einsums(draw):
    """An equation over up to four labels, and the sizes of its operands."""
    sizes = {label: draw(st.integers(2, 4)) for label in "abcd"}
    term = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True).map("".join)
    terms = draw(st.lists(term, min_size=2, max_size=3))
    used = sorted(set("".join(terms)))
    output = "".join(draw(st.lists(st.sampled_from(used), unique=True)))
    explicit = draw(st.booleans())
    equation = ",".join(terms) + (f"->{output}" if explicit else "")
    return equation, [tuple(sizes[label] for label in term) for term in terms]


@given(einsums())
@settings(max_examples=150, deadline=None)
def test_our_einsum_formula_is_what_torch_executes(case):
    equation, shapes = case
    tensors = [torch.zeros(shape) for shape in shapes]
    with (
        torch.backends.opt_einsum.flags(enabled=False),
        flop_counter.FlopCounterMode(display=False) as counter,
    ):
        torch.einsum(equation, *tensors)
    assert einsum_macs(equation, shapes) == counter.get_total_flops() / 2


def test_einsum_formula_knows_dots_and_paths():
    assert einsum_macs("...nd,...md->...nm", [(2, 3, 4, 8), (2, 3, 5, 8)]) == 6 * 4 * 5 * 8
    assert einsum_macs("b...d,d", [(2, 3, 8), (8,)]) == 2 * 3 * 8
    assert einsum_macs("...d,...d->d", [(3, 8), (3, 8)]) == 3 * 8
    assert einsum_macs("...d,...d->...d", [(3, 8), (3, 8)]) == 0
    chain = "ab,bc,cd->ad", [(10, 2), (2, 10), (10, 2)]
    assert einsum_macs(*chain) == 10 * 2 * 10 + 10 * 10 * 2
    assert einsum_macs(*chain, path=[1, 2, 0, 1]) == 2 * 10 * 2 + 10 * 2 * 2
    assert einsum_macs("ab->ba", [(3, 4)]) == 0


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (lambda a, b: a @ b, [(1, 4, 8), (3, 8, 5)], 3 * 4 * 8 * 5),  # broadcast over a batch
        (lambda a, b: a @ b, [(1, 4, 8), (8,)], 4 * 8),
        (lambda a, b: a[0] @ b, [(1, 8), (8,)], 8),
        (lambda a, b: torch.mv(a, b), [(1, 8), (8,)], 8),
        (lambda a, b: torch.addmv(a[:, 0], a, b), [(1, 8), (8,)], 8),
        (lambda a, b, c: torch.baddbmm(c, a, b), [(1, 4, 8), (1, 8, 5), (1, 4, 5)], 160),
        (lambda a, b, c: torch.addbmm(c, a, b), [(1, 4, 8), (1, 8, 5), (4, 5)], 160),
    ],
)
def test_products_with_vectors_and_broadcasts(function, shapes, expected):
    inputs = [torch.randn(shape) for shape in shapes]
    assert totals(function, *inputs) == (expected, expected)


# --- what no counter sees ----------------------------------------------------------------------


def test_a_broadcast_product_with_a_sum_is_flagged():
    """(N, 1, D) * (M, D), summed over D, is a matrix product that counts nothing."""
    a, b = torch.randn(1, 6, 1, 8), torch.randn(1, 1, 5, 8)
    canonical, fvcore = counted(lambda a, b: (a * b).sum(-1), a, b)
    assert (canonical.total, fvcore.total) == (0, 0)
    use = canonical.suspicious["aten.mul (broadcast)"]
    assert (use.kind, use.calls, use.estimated_macs) == ("hidden product", 1, 6 * 5 * 8)
    expanded = count_macs(Calls(lambda a, b: a.expand(1, 6, 5, 8) * b), inputs=(a, b))
    assert expanded.suspicious["aten.mul (broadcast)"].estimated_macs == 6 * 5 * 8
    assert "aten::mul" in fvcore.unsupported


def test_scaling_is_no_hidden_product():
    x = torch.randn(1, 6, 8)
    uses = count_macs(Calls(lambda x: x * 2 * torch.ones(8) * x), inputs=x).unsupported
    assert uses["aten.mul"].kind == "elementwise" and uses["aten.mul"].calls == 3
    assert not count_macs(Calls(lambda x: x * x), inputs=x).suspicious


@pytest.mark.parametrize("points", [6, 40])  # torch changes its kernel at 25 points
def test_distances_are_estimated(points):
    x = torch.randn(1, points, 16)
    canonical, fvcore = counted(lambda x: torch.cdist(x, x), x)
    assert (canonical.total, fvcore.total) == (0, 0)
    (use,) = canonical.suspicious.values()
    assert (use.kind, use.estimated_macs) == ("distance", points * points * 16)
    assert "aten::cdist" in fvcore.unsupported


def test_index_operators_are_listed_with_the_bytes_they_move():
    def select(x):
        order = x.argsort(-1)
        return x.topk(3).values, x.gather(-1, order), x.sort(-1).values, x[:, [0, 2]]

    canonical, fvcore = counted(select, torch.randn(1, 100))
    assert (canonical.total, fvcore.total) == (0, 0)
    index = {name: use for name, use in canonical.unsupported.items() if use.kind == "index"}
    assert set(index) == {"aten.sort", "aten.topk", "aten.gather", "aten.index"}
    assert index["aten.sort"].calls == 2
    assert index["aten.sort"].bytes_moved == 2 * (400 + 400 + 800)  # in, values, int64 indices
    assert index["aten.gather"].bytes_moved == 400 + 800 + 400


@pytest.mark.parametrize(
    ("transform", "points", "length", "factor"),
    [
        (torch.fft.rfft, 4 * 64, 64, 2.5),
        (torch.fft.rfft2, 4 * 64, 4 * 64, 2.5),
        (torch.fft.fft, 4 * 64, 64, 2.5),  # of real input: torch runs the real kernel
        (lambda x: torch.fft.fft(x.to(torch.complex64)), 4 * 64, 64, 5.0),
        (lambda x: torch.fft.irfft(x.to(torch.complex64), n=126), 4 * 126, 126, 2.5),
    ],
)
def test_fourier_transforms_are_estimated(transform, points, length, factor):
    """2.5 N log2 N FLOPs of N real points, twice that of complex ones; halved to MACs."""
    canonical, fvcore = counted(transform, torch.randn(1, 4, 64))
    assert (canonical.total, fvcore.total) == (0, 0)
    (use,) = canonical.suspicious.values()
    assert use.kind == "fft"
    assert use.estimated_macs == round(factor * points * math.log2(length) / 2)


def test_activations_and_norms_count_nothing_here_and_are_listed():
    layers = nn.Sequential(nn.GELU(), nn.Softmax(-1), nn.BatchNorm2d(3), nn.LayerNorm(7))
    canonical, fvcore = counted(layers, torch.randn(1, 3, 7, 7))
    pixels = 3 * 7 * 7
    assert (canonical.total, fvcore.total) == (0, 2 * pixels + 5 * pixels)
    kinds = {name: use.kind for name, use in canonical.unsupported.items()}
    assert kinds["aten.gelu"] == kinds["aten._softmax"] == "elementwise"
    assert sorted(kinds.values()).count("normalisation") == 2
    assert {"aten::gelu", "aten::softmax"} <= set(fvcore.unsupported)
    gap = explain_gap(canonical, fvcore)
    assert gap.relative is None and gap.notable
    assert [(one.operator, one.macs) for one in gap.reasons] == [
        ("layer_norm", 5 * pixels),
        ("batch_norm", 2 * pixels),
    ]


def test_an_unknown_kernel_is_listed_as_other():
    layer = nn.Bilinear(4, 5, 6)
    found = count_macs(layer, inputs=(torch.randn(1, 4), torch.randn(1, 5)))
    assert found.total == 0
    assert found.suspicious["aten._trilinear"].kind == "other"
