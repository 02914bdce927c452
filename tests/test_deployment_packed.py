"""Packed linear layers: the same numbers, wherever the layer goes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import harness
from harness.deployment import PackedLinear, pack_linears
from harness.deployment.packed import LEAST_WEIGHTS
from harness.training import freeze_teacher

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN"
)


def calls(function) -> int:
    """How often the packed operator is called meanwhile."""
    with torch.profiler.profile() as profile:
        function()
    return sum(e.count for e in profile.key_averages() if e.key == "mkldnn::_linear_pointwise")


def layer(bias=True) -> tuple[nn.Linear, PackedLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(128, 256, bias=bias).requires_grad_(False)
    return plain, PackedLinear.of(plain)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(128,), (1, 128), (3, 5, 128), (2, 4, 6, 128)])
def test_the_same_product(shape, bias):
    plain, packed = layer(bias)
    x = torch.randn(shape)
    torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-6)
    assert calls(lambda: packed(x)) == 1


def test_new_weights_are_packed_anew():
    plain, packed = layer()
    x = torch.randn(4, 128)
    packed(x)
    with torch.no_grad():
        plain.weight.mul_(2)
    torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-6)
    packed.load_state_dict(nn.Linear(128, 256).state_dict())
    torch.testing.assert_close(packed(x), nn.functional.linear(x, packed.weight, packed.bias),
                               rtol=1e-5, atol=1e-6)  # fmt: skip


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        plain, packed = layer()
        x = torch.randn(4, 128)
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-6)
        assert calls(lambda: packed(x)) == 1


def test_other_dtypes_gradients_and_empty_batches_are_an_ordinary_layer():
    plain, packed = layer()
    x = torch.randn(4, 128, requires_grad=True)
    assert calls(lambda: packed(x).sum().backward()) == 0
    torch.testing.assert_close(x.grad, plain.weight.sum(0).expand(4, -1))
    assert packed(torch.empty(0, 128)).shape == (0, 256)
    half = copy.deepcopy(packed).bfloat16()
    assert half(torch.randn(2, 128).bfloat16()).dtype == torch.bfloat16


def test_it_is_traced_exported_copied_and_counted_like_an_ordinary_layer():
    plain, packed = layer()
    x = torch.randn(4, 128)
    packed(x)
    traced = torch.jit.trace(packed, x)
    assert "mkldnn" not in str(traced.graph) and torch.equal(traced(x), plain(x))
    exported = torch.export.export(packed, (x,))
    assert "mkldnn" not in str(exported.graph)
    assert copy.deepcopy(packed)._packed is None
    assert packed.state_dict().keys() == plain.state_dict().keys()
    flops = {}
    for name, one in (("plain", plain), ("packed", packed)):
        with FlopCounterMode(display=False) as counter:
            one(x)
        flops[name] = counter.get_total_flops()
    assert flops["packed"] == flops["plain"] == 2 * 4 * 128 * 256


def test_mixed_precision_is_left_to_torch():
    _, packed = layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(torch.randn(4, 128)).dtype == torch.bfloat16


def test_a_frozen_teacher_answers_as_before_and_faster():
    teacher = harness.build("deit_ti", num_classes=10, image_size=32)
    images = torch.randn(2, 3, 32, 32)
    wanted = teacher.eval()(images).detach()
    names = set(teacher.state_dict())
    frozen = freeze_teacher(teacher.train(), "cpu")
    assert frozen is teacher and set(frozen.state_dict()) == names
    assert not frozen.training and not any(one.requires_grad for one in frozen.parameters())
    student = torch.randn(2, 10, requires_grad=True)
    answers = frozen(images)  # under gradients, as in a training step: nothing here needs any
    torch.testing.assert_close(answers, wanted, rtol=1e-5, atol=1e-5)
    (student - answers).square().sum().backward()
    assert calls(lambda: frozen(images)) == 48


def test_only_large_ordinary_layers_are_packed():
    class Own(nn.Linear):
        pass

    shared = nn.Linear(128, 128)
    model = nn.ModuleDict({
        "large": shared, "again": shared, "small": nn.Linear(64, LEAST_WEIGHTS // 64 - 1),
        "own": Own(256, 256), "float64": nn.Linear(256, 256).double(),
        "watched": nn.Linear(256, 256),
    })  # fmt: skip
    model["watched"].register_forward_hook(lambda *_: None)
    assert pack_linears(model) == ["large"]
    assert model["large"] is model["again"] and isinstance(model["large"], PackedLinear)


def test_deploy_packs_a_transformer_and_says_so():
    model = harness.build("deit_ti", num_classes=10, image_size=32)
    deployed = harness.deploy(model)
    assert len(deployed.deploy_report.packed) == 4 * 12
    assert "48 linears packed" in str(deployed.deploy_report)
    assert calls(lambda: torch.inference_mode()(deployed)(torch.randn(1, 3, 32, 32))) == 48
    assert not any(isinstance(one, PackedLinear) for one in model.modules())
