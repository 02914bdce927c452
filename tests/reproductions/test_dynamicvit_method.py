"""DynamicViT's method: the authors' functions, and training."""

import copy

import numpy as np
import pytest
import torch
from golden_tools import assert_matches, filled_state_dict, golden_input, load_golden
from test_dynamicvit import gumbel_noise
from test_dynamicvit_forms import images, trained
from torch import nn

import harness
from harness.errors import ReplivitError
from harness.meta import on_meta
from harness.training import Recipe, read_recipe, train
from harness.training.optim import Schedule, weight_decay_groups
from reproductions.dynamicvit import layers, method
from reproductions.dynamicvit.convert import from_official
from reproductions.dynamicvit.model import TrainingOutput, dynamicvit_deit, dynamicvit_micro
from reproductions.dynamicvit.predictor import Predictor, straight_through

FUNCTIONS = {case["name"]: case for case in load_golden("dynamicvit/functions")["cases"]}
LOSSES = [name for name in FUNCTIONS if name.startswith("loss_")]


def normal(seed: int, shape, scale: float = 1.0) -> torch.Tensor:
    values = scale * np.random.RandomState(seed).standard_normal(tuple(shape))
    return torch.from_numpy(values.astype(np.float32))


def mask(seed: int, shape, threshold: float) -> torch.Tensor:
    values = np.random.RandomState(seed).uniform(0, 1, tuple(shape)).astype(np.float32)
    return torch.from_numpy((values > threshold).astype(np.float32))


# ---- the authors' functions ----------------------------------------------------------------------


def masked_weights(logits: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The attention matrix itself: unit vectors as values, and queries that give `logits`."""
    size = logits.shape[-1]
    eye = torch.eye(size).expand_as(logits)
    return layers.masked_attention(logits * size**0.5, eye, eye, keep)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name.startswith("masked_softmax")])
def test_masked_attention_is_the_authors_masked_softmax(name):
    case = FUNCTIONS[name]
    args, expected = case["args"], case["expected"]
    batch, _, size, _ = args["shape"]
    keep = mask(args["policy_seed"], (batch, size, 1), args["thr"])[..., 0]
    keep[:, 0] = 1
    if args.get("only_cls"):
        keep[:, 1:] = 0
    if args.get("all_ones"):
        keep[:] = 1
    assert keep.tolist() == expected["policy"]
    weights = masked_weights(normal(args["attn_seed"], args["shape"], args["scale"]), keep)
    assert_matches(weights, expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-6)
    if "values" in expected:  # a dropped key keeps about eps / N: compared number by number
        torch.testing.assert_close(weights, torch.tensor(expected["values"]), rtol=2e-5, atol=0)


def reference_attention(q, k, v, keep):
    """The formula as the paper writes it, in the precision of its input."""
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    size = logits.shape[-1]
    seen = keep[:, None, None, :]
    seen = seen + (1 - seen) * torch.eye(size, dtype=q.dtype)
    weights = (logits - logits.max(dim=-1, keepdim=True)[0]).exp() * seen
    eps = layers.EPS
    return (weights + eps / size) / (weights.sum(-1, keepdim=True) + eps) @ v


@pytest.mark.parametrize("std", [1.0, 20.0])
def test_masked_attention_and_its_gradients_in_float64(std):
    """Gradients of everything, the decisions included; at std 20 kept keys underflow to eps."""
    torch.manual_seed(0)
    shape = (2, 3, 29, 8)
    inputs = [std**0.5 * torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    inputs += [torch.randn(shape, dtype=torch.float64), (torch.rand(2, 29) > 0.5).double()]
    inputs[3][:, 0] = 1
    weight = torch.randn(shape, dtype=torch.float64)
    results = []
    for function in (layers.masked_attention, reference_attention):
        leaves = [one.clone().requires_grad_() for one in inputs]
        output = function(*leaves)
        results.append([output, *torch.autograd.grad((output * weight).sum(), leaves)])
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).norm() <= 1e-11 * reference.norm()


def test_masked_attention_stays_float32_under_autocast():
    q, k, v = normal(0, (3, 1, 2, 9, 8))
    keep = mask(1, (1, 9), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(
            layers.masked_attention(q, k, v, keep), layers.masked_attention(q, k, v, keep).float()
        )
        half = layers.masked_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), keep)
    assert half.dtype == torch.bfloat16
    exact = layers.masked_attention(*(one.bfloat16().float() for one in (q, k, v)), keep)
    torch.testing.assert_close(half, exact.bfloat16(), rtol=0, atol=0)


def test_predictor():
    case = FUNCTIONS["predictor"]
    args, expected = case["args"], case["expected"]
    predictor = Predictor(args["dim"])
    entries = from_official({"cls_token": None, **filled_state_dict(expected["state_dict"])})
    del entries["cls_token"]
    predictor.load_state_dict(entries)
    alive = mask(args["policy_seed"], (*args["shape"][:2], 1), args["thr"])[..., 0]
    tokens = normal(args["x_seed"], args["shape"])
    torch.testing.assert_close(
        predictor(tokens, alive), torch.tensor(expected["values"]), rtol=1e-5, atol=1e-6
    )
    before = predictor(tokens)
    predictor.deploy_()
    torch.testing.assert_close(predictor(tokens), before, rtol=1e-5, atol=1e-6)


def test_predictor_is_finite_where_nothing_is_left():
    predictor = Predictor(16)
    assert predictor(torch.randn(2, 5, 16), torch.zeros(2, 5)).isfinite().all()


def test_gather_takes_the_authors_rows():
    args, expected = FUNCTIONS["index_select"]["args"], FUNCTIONS["index_select"]["expected"]
    tokens = normal(args["x_seed"], args["shape"])
    taken = layers.gather_tokens(tokens, torch.tensor(args["idx"]))
    torch.testing.assert_close(taken, torch.tensor(expected["values"]), rtol=1e-7, atol=0)


def test_decisions_under_given_noise():
    args, expected = FUNCTIONS["gumbel_rule"]["args"], FUNCTIONS["gumbel_rule"]["expected"]
    logits = normal(args["logits_seed"], args["shape"])
    for noise, values in zip(
        gumbel_noise(3, args["shape"]), expected["values_rounded"], strict=True
    ):
        decided = straight_through(logits, noise)
        torch.testing.assert_close(decided, torch.tensor(values)[..., 0], rtol=0, atol=2e-7)


def test_decisions_have_the_gradient_of_the_probability():
    logits = torch.tensor([[[0.3, -0.2], [-1.0, 0.5]]], requires_grad=True)
    noise = torch.tensor([[[0.1, 0.4], [2.0, 0.0]]])
    straight_through(logits, noise).sum().backward()
    soft = (logits.detach() + noise).softmax(-1).prod(-1)
    torch.testing.assert_close(logits.grad, torch.stack([soft, -soft], dim=-1))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_authors(name):
    case = FUNCTIONS[name]
    args, expected, options = case["args"], case["expected"], case["args"]["loss_kwargs"]
    seed, batch = args["seed"], args["B"]
    if "H" in args:  # maps of 7 x 7 positions, chosen on 14 x 14; all of them count
        shape, places = (batch, args["H"] ** 2, args["C"]), (batch, 196)
        final = torch.ones(shape[:2])
    else:
        shape, places = (batch, args["N"], args["C"]), (batch, args["N"])
        final = mask(seed + 2, places, args["mask_thr"])
        assert final.tolist() == expected["mask"]
    stages = [mask(seed + 3 + i, places, one) for i, one in enumerate(args["score_thr"])]
    prediction = normal(seed, (batch, args["classes"])).requires_grad_()
    features = normal(seed + 1, shape).requires_grad_()
    output = TrainingOutput(prediction, features, final, torch.stack(stages, dim=1))
    teacher = normal(seed + 10, (batch, args["classes"])), normal(seed + 11, shape)
    parts = method.pruning_losses(
        output, teacher, nn.functional.cross_entropy(prediction, torch.tensor(args["labels"])),
        options["keep_ratio"], options["ratio_weight"], options.get("distill_weight", 0.5),
        "mse" if options["mse_token"] else "kl", not options.get("dynamic", False),
    )  # fmt: skip
    parts["loss"].backward()
    names = {"loss": "loss", "cls_loss": "classification", "ratio_loss_sum": "ratio",
             "cls_kl": "kl", "token_loss": "token"}  # fmt: skip
    for theirs, ours in names.items():
        assert parts[ours].item() == pytest.approx(expected[theirs], rel=1e-5, abs=1e-12), theirs
    if "grad_pred_l2" in expected:
        for tensor, norm in ((prediction, "grad_pred_l2"), (features, "grad_token_l2")):
            assert tensor.grad.norm().item() == pytest.approx(expected[norm], rel=1e-5, abs=1e-12)


def test_optimizer_groups_are_the_authors():
    with on_meta():
        model = dynamicvit_deit(1000, 224, "s")
    recipe = read_recipe("deit", harness.get_variant("dynamicvit_deit_s_k07"))
    groups = weight_decay_groups(model, recipe)
    found = {
        (one["weight_decay"], one["lr_scale"], one["frozen_epochs"]): (
            len(one["params"]), sum(p.numel() for p in one["params"]),
        )
        for one in groups
    }  # fmt: skip
    expected = FUNCTIONS["groups_deit_s"]["expected"]
    assert found == {
        (one["weight_decay"], one["lr_scale"], one["fix_step"]): (one["tensors"], one["numel"])
        for one in expected["groups"]
    }
    trained_ones = {id(p) for one in groups for p in one["params"]}
    left = [name for name, one in model.named_parameters() if id(one) not in trained_ones]
    assert left == expected["left_out_of_the_optimizer"]


def test_learning_rate_is_the_authors():
    case = FUNCTIONS["lr_schedule_30ep_warm5"]
    steps = case["args"]["kwargs"]["niter_per_ep"]
    recipe = read_recipe("deit", harness.get_variant("dynamicvit_deit_s_k07"))
    new, old = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW(
        [{"params": [new]}, {"params": [old], "lr_scale": 0.01, "frozen_epochs": 5}],
        lr=recipe.peak_lr,
    )
    schedule = Schedule(optimizer, recipe, steps)
    rates = []
    for step in range(case["expected"]["length"]):
        schedule.set(step // steps, step % steps)
        rates.append([group["lr"] for group in optimizer.param_groups])
    for step, rate in case["expected"]["at"].items():
        assert rates[int(step)][0] == pytest.approx(rate, rel=1e-6, abs=1e-15), step
    assert sum(rate for rate, _ in rates) == pytest.approx(case["expected"]["sum"], rel=1e-6)
    assert all(slow == 0 for _, slow in rates[: 5 * steps])
    assert all(slow == pytest.approx(fast / 100) for fast, slow in rates[5 * steps :])


@pytest.mark.parametrize("size", ["ti", "s"])
@torch.inference_mode()
def test_dense_teacher(size):
    case = FUNCTIONS[f"teacher_deit_{size}"]
    expected = case["expected"]
    with on_meta():
        model = dynamicvit_deit(1000, 224, size, pruning_loc=[])
    entries = [[key, one.shape, "float32"] for key, one in model.state_dict().items()]
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(filled_state_dict(entries))
    assert sum(one.numel() for one in model.parameters()) == expected["params"]
    inputs = golden_input(case["args"]["input_shape"])
    logits, tokens = method.teacher_answers(model, inputs)
    assert_matches(logits, expected["logits"])
    assert_matches(tokens, expected["tokens"])
    assert torch.equal(model(inputs), logits)


# ---- training ------------------------------------------------------------------------------------

QUICK = Recipe(epochs=1, batch_size=32, lr=1e-3, warmup_epochs=0, label_smoothing=0.1)


@pytest.fixture(scope="module")
def small_track(tmp_path_factory):
    """64 training and 32 test pictures of two classes, as a folder of images."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 16)):
        for label in ("dark", "light"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                level = generator.integers(0, 90, (32, 32, 3)) + 120 * (label == "light")
                Image.fromarray(level.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def test_training_from_the_dense_network(small_track, tmp_path):
    """The whole method by name: the teacher is the network that the weights came from."""
    parent = trained().dense()
    run = train(
        "dynamicvit_micro", str(small_track), QUICK, init=parent.state_dict(),
        out=tmp_path / "run", device="cpu", quiet=True,
    )  # fmt: skip
    row = run.history[0]
    assert {"classification", "ratio", "kl", "token", "kept_1", "kept_2", "kept_3"} <= set(row)
    assert 0 < row["kept_3"] < row["kept_2"] < row["kept_1"] < 1
    weights = run.model.state_dict()
    start = parent.state_dict()["blocks.0.attn.qkv.weight"]
    assert not torch.equal(weights["blocks.0.attn.qkv.weight"], start)


def test_an_untrained_network_is_not_its_own_teacher(small_track, tmp_path):
    with pytest.raises(ReplivitError, match="fine-tunes a trained network: give its weights"):
        train("dynamicvit_micro", str(small_track), QUICK, out=tmp_path / "run", device="cpu",
              quiet=True)  # fmt: skip


def test_a_teacher_of_another_shape_is_refused(small_track, tmp_path):
    teacher = dynamicvit_micro(7, 32, pruning_loc=[])
    with pytest.raises(ReplivitError, match="they need the same classes, tokens and width"):
        train("dynamicvit_micro", str(small_track), QUICK, out=tmp_path / "run", device="cpu",
              objective=method.DynamicViTObjective(teacher), quiet=True)  # fmt: skip
    with pytest.raises(ReplivitError, match="cannot teach DynamicViT"):
        train("dynamicvit_micro", str(small_track), QUICK, out=tmp_path / "other", device="cpu",
              objective=method.DynamicViTObjective(harness.build("efficientformer_micro", 2)),
              quiet=True)  # fmt: skip


def test_ratio_loss_moves_the_shares_to_their_targets():
    """Some steps of the ratio loss alone: from about a half of the half to 0.9, 0.81, 0.73."""
    torch.manual_seed(0)
    model = dynamicvit_micro(10, 32, keep_ratio=0.9).train()
    for key, one in model.named_parameters():
        one.requires_grad_("score_predictor" in key)
    optimizer = torch.optim.AdamW(model.score_predictor.parameters(), lr=2e-3)
    shares = []
    for step in range(60):
        decisions = model(images(8, seed=step % 4)).decisions
        loss = method.ratio_loss(decisions, model.keep_ratios)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(decisions.detach().mean(dim=(0, 2)))
    first, last = shares[0], torch.stack(shares[-10:]).mean(0)
    target = torch.tensor(model.keep_ratios)
    assert (first - target).abs().max() > 0.3
    assert (last - target).abs().max() < 0.05, last


def test_a_named_teacher_and_its_weights(small_track, tmp_path):
    from harness.checkpoints import save_weights

    parent = copy.deepcopy(trained().dense())
    parent.reset_classifier(2)
    save_weights(parent, tmp_path / "parent.safetensors")
    objective = method.DynamicViTObjective("vit_micro", tmp_path / "parent.safetensors")
    run = train("dynamicvit_micro", str(small_track), QUICK, objective=objective,
                init=tmp_path / "parent.safetensors", out=tmp_path / "run", device="cpu",
                quiet=True)  # fmt: skip
    assert run.history[0]["token"] > 0 and run.value("top1") is not None
