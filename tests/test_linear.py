"""Linear layers through oneDNN: the same numbers, wherever torch's own are to be replaced."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import harness
from harness.linear import Linear, choose_linears, linear, matrix_products, mkl_holds_back


@pytest.fixture(autouse=True)
def held_back(monkeypatch):
    """As if on a processor where the convolution is taken."""
    monkeypatch.setattr("harness.linear.mkl_holds_back", lambda: True)


SHAPES = [(8, 197), (4, 197), (1576,), (3, 7, 75), (1, 2000)]


class Operators(TorchDispatchMode):
    """Names of the operators that ran inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def convolves(call):
    with Operators() as seen:
        call()
    return "convolution" in seen.names


def a_layer(bias=True):
    torch.manual_seed(0)
    return nn.Linear(96, 160, bias=bias)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_torch(shape, bias, threads):
    layer, before = a_layer(bias), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(*shape, 96, requires_grad=True)
        grad = torch.randn(*shape, 160)
        found = {}
        for which in (F.linear, linear):
            out = which(x, layer.weight, layer.bias)
            inputs = [x, *layer.parameters()]
            found[which] = [out, *torch.autograd.grad(out, inputs, grad)]
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(found[linear], found[F.linear], strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


def test_inputs_and_weights_may_be_views():
    layer = a_layer()
    x = torch.randn(96, 8, 300).permute(1, 2, 0)
    weight, bias = layer.weight[:150, :90], layer.bias[:150]
    expected = F.linear(x[..., :90], weight, bias)
    assert torch.allclose(linear(x[..., :90], weight, bias), expected, atol=1e-5)
    assert linear(x.contiguous()[:, :200], layer.weight, layer.bias).is_contiguous()


def test_large_float32_products_are_convolutions():
    layer, x = Linear(96, 160), torch.randn(8, 197, 96)
    assert convolves(lambda: layer(x))
    assert convolves(lambda: linear(x, layer.weight))


@pytest.mark.parametrize(
    ("vendor", "capability", "chosen"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "DEFAULT", False),
    ],
)
def test_where_mkl_holds_back(vendor, capability, chosen, monkeypatch):
    for library in ("mkl", "mkldnn"):
        monkeypatch.setattr(f"torch.backends.{library}.is_available", lambda: True)
    monkeypatch.setattr("harness.linear.cpu_vendor", lambda: vendor)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert mkl_holds_back.__wrapped__() == chosen


def test_everything_else_is_torchs_own():
    layer, x = Linear(96, 160), torch.randn(8, 197, 96)
    assert not convolves(lambda: layer(x[:1]))
    assert not convolves(lambda: layer(x[:, :1, :1].expand(-1, 30, 96)))
    assert not convolves(lambda: layer.double()(x.double()))
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert not convolves(lambda: layer(x))
    with matrix_products():
        assert not convolves(lambda: layer(x))
    assert convolves(lambda: layer(x))  # and only inside
    exported = torch.export.export(layer, (x,))
    assert "conv" not in exported.graph_module.code
    traced = torch.jit.trace(layer, x)
    assert "conv" not in str(traced.inlined_graph)
    graph = torch.fx.Tracer().trace(nn.Sequential(layer))
    assert graph is not None


def test_every_plain_linear_layer_of_a_network_takes_part():
    for name in ("vit_micro", "deit_ti", "dynamicvit_micro", "sepvit_micro"):
        kinds = {type(one) for one in harness.build(name).modules() if isinstance(one, nn.Linear)}
        assert Linear in kinds, name
        assert nn.Linear not in kinds, name


def test_a_layer_stays_what_it_was():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8))
    calls, state = [], {name: one.clone() for name, one in model.state_dict().items()}
    model[0].register_forward_hook(lambda *_: calls.append(1))
    choose_linears(model)
    assert type(model[0]) is Linear and type(model[1]) is Own
    model(torch.zeros(2, 8))
    assert calls == [1]
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
