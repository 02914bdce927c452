"""Zero-cost proxies: the authors' scores, and what each proxy promises."""

import copy

import numpy as np
import pytest
import torch
from golden_tools import filled_state_dict, golden_input, load_golden
from torch import nn
from torch.nn import functional as F

import harness
from reproductions.autoformer.space import Config, get_space
from reproductions.autoformer.supernet import Supernet
from reproductions.tf_tas.indicators import (
    DSS_MODES,
    agreement,
    dss,
    grasp,
    naswot,
    ntk_condition,
    nuclear_norm,
    scored_layers,
    snip,
    synflow,
)
from reproductions.tf_tas.pit import PitConfig, PoolingTransformer
from reproductions.tf_tas.scoring import DssScorer, random_supernet

GOLDEN = load_golden("tf_tas/autoformer_space_t")
TOLERANCE = 1e-4  # the fixture's own, for scores


def cases(kind: str) -> list:
    found = [case for case in GOLDEN["cases"] if case["kind"] == kind]
    assert found
    return [pytest.param(case, id=case["name"]) for case in found]


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    net = Supernet(get_space("t"), 1000, 224)
    net.load_state_dict(filled_state_dict(GOLDEN["state_dict"]))
    return net.eval()


def micro_model(seed: int = 0) -> nn.Module:
    """A small subnet of a random supernet."""
    net = random_supernet(get_space("micro"), 10, 32, seed)
    return net.extract(Config(3, 48, (2, 3, 2), (2, 3, 2)))


def vit_micro() -> nn.Module:
    """A ViT as timm makes it; its head, which starts at zero, is drawn."""
    torch.manual_seed(0)
    model = harness.build("vit_micro")
    nn.init.normal_(model.head.weight)
    return model.eval()


# ---- against the authors -------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("dss"))
def test_dss_layer_by_layer(supernet, case):
    model = supernet.extract(Config.of(case["extra"]["config"]))
    score = dss(model, 224, case["extra"]["dss_mode"])
    assert score.value == pytest.approx(case["expect"]["dss"], rel=TOLERANCE)
    wanted = case["expect"]["per_layer"]
    for name, value in score.per_layer.items():
        assert value == pytest.approx(wanted[name], rel=TOLERANCE), name
    assert all(not wanted[name] for name in wanted.keys() - score.per_layer.keys())


@pytest.mark.parametrize("case", cases("dss"))
def test_the_fast_scorer_gives_the_same(supernet, case):
    scorer = DssScorer(supernet, case["extra"]["dss_mode"])
    config = Config.of(case["extra"]["config"])
    first = scorer(config)
    assert first == pytest.approx(case["expect"]["dss"], rel=TOLERANCE)
    assert scorer.norms and scorer(config) == pytest.approx(first, rel=1e-6)  # norms from memory


def test_a_score_does_not_depend_on_the_candidates_before(supernet):
    smallest, largest = get_space("t").smallest(), get_space("t").largest()
    scorer = DssScorer(supernet)
    scorer(largest)
    assert scorer(smallest) == pytest.approx(DssScorer(supernet)(smallest), rel=1e-6)


@pytest.mark.parametrize("case", cases("indicator"))
def test_other_indicators(supernet, case):
    model = supernet.extract(Config.of(case["extra"]["config"]))
    images, name = golden_input(case["input_shape"]), case["extra"]["indicator"]
    wanted = case["expect"]
    if name == "NASWOT":
        assert np.abs(agreement(model, images) - wanted["K"]).max() <= 4  # rounding near zero
        assert naswot(model, images).value == pytest.approx(wanted["score"], rel=TOLERANCE)
        return
    score = {"snip": snip, "grasp": grasp}[name](
        model, images, torch.tensor(case["extra"]["targets"])
    )
    assert score.value == pytest.approx(wanted["score"], rel=TOLERANCE)
    assert len(score.per_layer) == wanted["n_entries"]
    first = list(score.per_layer.values())[: len(wanted["first_entries"])]
    assert first == pytest.approx(wanted["first_entries"], rel=TOLERANCE)


# ---- definitions, checked another way ------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
def test_nuclear_norm_is_the_sum_of_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.svdvals(matrix.double()).sum().item()
    assert nuclear_norm(matrix) == pytest.approx(exact, rel=1e-9)
    low = matrix[:, :1] @ matrix[:1]  # of rank one: squaring must not invent small values
    assert nuclear_norm(low) == pytest.approx(
        torch.linalg.svdvals(low.double())[0].item(), rel=1e-6
    )


def reference_dss(model: nn.Module, mode: str) -> float:
    """The definition, with autograd on a copy and plain singular values."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, one in model.named_parameters():
            if mode == "linearised" or name in ("cls_token", "pos_embed"):
                one.abs_()
    model(torch.ones(1, 3, 32, 32)).sum().backward()
    total = 0.0
    for name, module in model.named_modules():
        if name.endswith(("fc1", "fc2")):
            total += (module.weight.grad * module.weight).abs().sum().item()
        if name.endswith("attn.proj") or (name.endswith("attn.qkv") and mode != "shipped"):
            norms = [torch.linalg.svdvals(one.double()).sum() for one in
                     (module.weight.grad, module.weight)]  # fmt: skip
            total += (norms[0] * norms[1]).item()
    return total


@pytest.mark.parametrize("mode", DSS_MODES)
@pytest.mark.parametrize("name", ["subnet", "vit_micro"])
def test_dss_is_its_definition(mode, name):
    model = micro_model() if name == "subnet" else vit_micro()
    assert dss(model, 32, mode).value == pytest.approx(reference_dss(model, mode), rel=1e-4)


def test_a_pit_can_be_scored():
    torch.manual_seed(0)
    model = PoolingTransformer(PitConfig((1, 1, 1), (1, 2, 4), 8, 2), 10, 64)
    score = dss(model, 64, "with_qkv")
    assert len(score.per_layer) == 3 * 4 and score.value > 0
    assert not any("pools" in name or name == "head" for name in score.per_layer)


def test_synflow_counts_every_layer_of_the_linearised_network():
    model = micro_model()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for one in twin.parameters():
            one.abs_()
    twin(torch.ones(1, 3, 32, 32)).sum().backward()
    layers = dict(twin.named_modules())
    wanted = sum((layers[name].weight * layers[name].weight.grad).abs().sum().item()
                 for name in scored_layers(twin))  # fmt: skip
    assert synflow(model, 32).value == pytest.approx(wanted, rel=1e-5)


def test_snip_is_the_gradient_of_masks_of_ones():
    model, images = micro_model(), torch.randn(3, 3, 32, 32)
    targets = torch.tensor([0, 4, 9])
    layers = dict(model.named_modules())
    wanted = 0.0
    for name in scored_layers(model):
        mask = torch.ones_like(layers[name].weight, requires_grad=True)
        values = {f"{name}.weight": layers[name].weight.detach() * mask}
        logits = torch.func.functional_call(model, values, (images,))
        F.cross_entropy(logits, targets).backward()
        wanted += mask.grad.abs().sum().item()
    assert snip(model, images, targets).value == pytest.approx(wanted, rel=1e-4)


def test_grasp_is_a_directional_derivative_of_the_gradient():
    """W . Hg by finite differences: how the gradient's product with g changes along W."""
    model = vit_micro().double()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=generator)
    targets = torch.tensor([1, 2])
    names = [f"{name}.weight" for name in scored_layers(model)]
    start = {name: one.detach() for name, one in model.named_parameters()}

    def gradient(step: float) -> list[torch.Tensor]:
        values = {**start, **{name: (1 + step) * start[name] for name in names}}
        leaves = [values[name].requires_grad_() for name in names]
        loss = F.cross_entropy(torch.func.functional_call(model, values, (images,)), targets)
        return torch.autograd.grad(loss, leaves)

    step, middle = 1e-5, gradient(0.0)
    pairs = zip(gradient(step), gradient(-step), middle, strict=True)
    bent = sum(((up - down) * one).sum().item() for up, down, one in pairs) / (2 * step)
    assert grasp(model, images, targets).value == pytest.approx(-bent, rel=1e-4)


def test_naswot_counts_equal_signs():
    model, images = micro_model(), torch.randn(4, 3, 32, 32)
    seen = []
    hooks = [block.fc1.register_forward_hook(lambda *args: seen.append(args[2] > 0))
             for block in model.blocks]  # fmt: skip
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    kernel = agreement(model, images)
    hidden = sum(one[0].numel() for one in seen)
    assert np.all(np.diag(kernel) == hidden)
    assert kernel[0, 3] == sum((one[0] == one[3]).sum().item() for one in seen)
    assert naswot(model, images).value == pytest.approx(np.linalg.slogdet(kernel)[1])


def test_te_score_is_the_condition_of_the_tangent_kernel():
    model, images = micro_model(), torch.randn(3, 3, 32, 32)
    rows = []
    for image in images:
        model.zero_grad()
        model(image[None]).sum().backward()
        layers = dict(model.named_modules())
        rows.append(
            torch.cat([layers[name].weight.grad.flatten() for name in scored_layers(model)])
        )
    values = torch.linalg.eigvalsh(torch.stack(rows).double() @ torch.stack(rows).double().mT)
    wanted = -(values[-1] / values[0]).item()
    assert ntk_condition(model, images).value == pytest.approx(wanted, rel=1e-2)


# ---- manners -------------------------------------------------------------------------------------


def test_the_network_is_left_as_it_was():
    model = micro_model().train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    images, targets = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    for call in (
        lambda: dss(model, 32, "linearised"), lambda: synflow(model, 32),
        lambda: snip(model, images, targets), lambda: grasp(model, images, targets),
        lambda: naswot(model, images), lambda: ntk_condition(model, images),
    ):  # fmt: skip
        call()
    assert model.training and model.blocks[0].training
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    assert all(one.requires_grad and one.grad is None for one in model.parameters())


def test_unknown_modes_and_networks():
    with pytest.raises(ValueError, match="no DSS mode 'best'; it is shipped, with_qkv, linearised"):
        dss(micro_model(), 32, "best")
    with pytest.raises(ValueError, match="no DSS mode 'best'"):
        DssScorer(random_supernet(get_space("micro"), 10, 32), "best")
    with pytest.raises(ValueError, match=r"Linear cannot be scored: its blocks need .* attn\.qkv"):
        scored_layers(nn.Linear(2, 2))
