"""Zero-cost proxies: numbers that are read off a network at initialisation.

All work on any dense transformer whose blocks name their linears `attn.qkv`, `attn.proj`, `fc1` and
`fc2` (timm's ViTs, the PiT space, subnets extracted from AutoFormer's supernet). The network is
left as it was: weights are substituted, not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.patches import ImageSize

Role = Literal["embedding", "qkv", "proj", "mlp", "head"]
DssMode = Literal["shipped", "with_qkv", "linearised"]
DSS_MODES: tuple[DssMode, ...] = ("shipped", "with_qkv", "linearised")


@dataclass(frozen=True)
class Score:
    """A proxy's value, and what each scored layer adds to it."""

    value: float
    per_layer: dict[str, float] = field(default_factory=dict)


# ---- which layers are scored ---------------------------------------------------------------------


def scored_layers(model: nn.Module) -> dict[str, Role]:
    """Names of the layers that proxies look at, in module order, with their roles.

    Raises:
        ValueError: the model has no transformer block with these names.
    """
    roles = {name: role for name, one in model.named_modules() if (role := _role(name, one))}
    if not {"qkv", "proj", "mlp"} <= set(roles.values()):
        raise ValueError(
            f"{type(model).__name__} cannot be scored: its blocks need the linears attn.qkv, "
            "attn.proj, fc1 and fc2"
        )
    return roles


def _role(name: str, module: nn.Module) -> Role | None:
    *path, last = name.split(".")
    if isinstance(module, nn.Conv2d):
        return "embedding" if path and path[0].startswith("patch_embed") else None
    if not isinstance(module, nn.Linear):
        return None
    if last in ("qkv", "proj") and path[-1:] == ["attn"]:
        return last
    if last in ("fc1", "fc2"):
        return "mlp"
    return "head" if name == "head" else None


# ---- DSS -----------------------------------------------------------------------------------------


def dss(
    model: nn.Module,
    image_size: ImageSize,
    mode: DssMode = "shipped",
    *,
    parameters: Mapping[str, Tensor] | None = None,
    weight_norms: MutableMapping[tuple, float] | None = None,
) -> Score:
    """The DSS-indicator: synaptic diversity of attention plus synaptic saliency of the MLPs.

    One image of ones goes through, the sum of the logits comes back. Each attention matrix adds
    `nuc(dL/dW) * nuc(W)`, each MLP matrix the sum of `|dL/dW * W|`.

    Args:
        mode: what is read where paper and code differ.
            `shipped`: what the released search computes. Output projections only (in the release
            the sampled qkv matrix gets no gradient), weights with their signs, absolute values of
            class token and positions.
            `with_qkv`: the same, and each block's whole qkv matrix as one more.
            `linearised`: `with_qkv` on the absolute values of all parameters.
        parameters: computed with in place of the model's own, by name; only these are scored.
        weight_norms: nuclear norms of weights by (layer, shape), filled and used again; only for
            networks that are cut from one supernet, and for one mode.

    Raises:
        ValueError: unknown mode, or blocks with other names.
    """
    check_mode(mode)
    wanted = {"proj", "mlp"} if mode == "shipped" else {"qkv", "proj", "mlp"}
    absolute = None if mode == "linearised" else ("cls_token", "pos_embed")
    given = _own_parameters(model) if parameters is None else parameters
    roles = {
        name: role
        for name, role in scored_layers(model).items()
        if role in wanted and f"{name}.weight" in given
    }
    norms = {} if weight_norms is None else weight_norms

    def part(name: str, weight: Tensor, gradient: Tensor) -> float:
        if roles[name] == "mlp":
            return torch.linalg.vector_norm(gradient.mul_(weight), 1).item()
        key = (name, *weight.shape)
        if key not in norms:
            norms[key] = nuclear_norm(weight)
        return nuclear_norm(gradient) * norms[key]

    parts = _score_by_ones(model, image_size, given, list(roles), absolute, part)
    return Score(sum(parts.values()), parts)


def check_mode(mode: str) -> DssMode:
    """Give the mode back if it is one.

    Raises:
        ValueError: it is not; the modes are named.
    """
    if mode not in DSS_MODES:
        raise ValueError(f"no DSS mode {mode!r}; it is {', '.join(DSS_MODES)}")
    return mode


def nuclear_norm(matrix: Tensor) -> float:
    """Sum of the singular values of an (M, N) matrix.

    They are the roots of the eigenvalues of its smaller Gram matrix. In float64 this costs a
    fraction of a singular value decomposition; what squaring loses is below 1e-8 of the largest.
    """
    exact = matrix.detach().double()
    gram = exact @ exact.mT if matrix.shape[0] <= matrix.shape[1] else exact.mT @ exact
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum().item()


def synflow(model: nn.Module, image_size: ImageSize) -> Score:
    """Synaptic flow: the sum of `|dL/dW * W|` over all scored layers of the linearised network.

    The release has no such indicator; DSS borrows its input of ones and its absolute weights. On
    positive weights the original multiplies, here softmax, GELU and norms stay as they are.
    """

    def part(name: str, weight: Tensor, gradient: Tensor) -> float:
        return torch.linalg.vector_norm(gradient.mul_(weight), 1).item()

    names = list(scored_layers(model))
    parts = _score_by_ones(model, image_size, _own_parameters(model), names, None, part)
    return Score(sum(parts.values()), parts)


def _own_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters without their gradients' history."""
    return {name: one.detach() for name, one in model.named_parameters()}


def _score_by_ones(
    model: nn.Module,
    image_size: ImageSize,
    given: Mapping[str, Tensor],
    names: list[str],
    absolute: Sequence[str] | None,
    part: Callable[[str, Tensor, Tensor], float],
) -> dict[str, float]:
    """What each named layer adds, from the gradients of the summed logits of an image of ones.

    Args:
        given: the parameters to compute with.
        absolute: names of parameters whose absolute values are taken; None means all.
        part: a layer's name, weight and gradient to its share. It is called as soon as a gradient
            is there, and may overwrite it; so they never need memory all at once.
    """
    values = {
        name: one.abs() if absolute is None or name in absolute else one
        for name, one in given.items()
    }
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    parts = dict.fromkeys(names, 0.0)

    def take(name: str, leaf: Tensor) -> None:
        parts[name] = part(name, leaf.detach(), leaf.grad)
        leaf.grad = None

    with torch.enable_grad(), evaluating(model):
        leaves = _require(values, names)
        for name, leaf in zip(names, leaves, strict=True):
            leaf.register_post_accumulate_grad_hook(partial(take, name))
        ones = torch.ones(1, 3, *sides, device=leaves[0].device, dtype=leaves[0].dtype)
        functional_call(model, values, (ones,)).sum().backward()
    return parts


def _require(values: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    """Leaves with gradients for the weights of the named layers, put into `values`."""
    for name in names:
        values[f"{name}.weight"] = values[f"{name}.weight"].detach().requires_grad_()
    return [values[f"{name}.weight"] for name in names]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the modes of before afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# ---- proxies that look at images -----------------------------------------------------------------


def snip(model: nn.Module, images: Tensor, targets: Tensor) -> Score:
    """Sum of `|dCE/dW * W|` over all scored layers: what cutting each weight would change.

    Args:
        images: (B, 3, H, W), normalised.
        targets: labels (B,).
    """
    names = list(scored_layers(model))
    values = _own_parameters(model)
    with torch.enable_grad(), evaluating(model):
        weights = _require(values, names)
        loss = F.cross_entropy(functional_call(model, values, (images,)), targets)
        gradients = torch.autograd.grad(loss, weights)
    parts = {
        name: (weight.detach() * gradient).abs().sum().item()
        for name, weight, gradient in zip(names, weights, gradients, strict=True)
    }
    return Score(sum(parts.values()), parts)


def grasp(model: nn.Module, images: Tensor, targets: Tensor) -> Score:
    """Sum of `-W * Hg` over all scored layers: whether cutting weights keeps the gradient's norm.

    H is the Hessian and g the gradient of the cross entropy in these weights. The sign is that of
    the release.

    Args:
        images: (B, 3, H, W), normalised.
        targets: labels (B,).
    """
    names = list(scored_layers(model))
    values = _own_parameters(model)
    # fused attention has no second derivative
    with torch.enable_grad(), evaluating(model), sdpa_kernel(SDPBackend.MATH):
        weights = _require(values, names)
        loss = F.cross_entropy(functional_call(model, values, (images,)), targets)
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        product = sum((one.detach() * one).sum() for one in gradients)
        curvature = torch.autograd.grad(product, weights)
    parts = {
        name: -(weight.detach() * bent).sum().item()
        for name, weight, bent in zip(names, weights, curvature, strict=True)
    }
    return Score(sum(parts.values()), parts)


@torch.no_grad()
def agreement(model: nn.Module, images: Tensor) -> np.ndarray:
    """In how many GELUs two images have the same sign: (B, B) for images (B, 3, H, W)."""
    kernel = np.zeros((len(images), len(images)))

    def count(module: nn.Module, inputs: tuple, hidden: Tensor) -> None:
        active = (hidden.flatten(1) > 0).to(torch.float32)
        both = (active @ active.mT).double().cpu().numpy()  # exact: counts are below 2 ** 24
        ones = np.diag(both)
        # both on, plus both off
        kernel[...] += 2 * both - ones[:, None] - ones[None] + active.shape[1]

    scored_layers(model)
    hooks = [
        module.register_forward_hook(count)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "fc1"
    ]
    try:
        with evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return kernel


def naswot(model: nn.Module, images: Tensor) -> Score:
    """log|det K| of the kernel of equal activations: how differently the images are seen.

    The release draws the images from N(0, 1), 64 of them, and looks at the GELUs of the MLPs.
    """
    return Score(float(np.linalg.slogdet(agreement(model, images))[1]))


def ntk_condition(model: nn.Module, images: Tensor, chunk_size: int = 8) -> Score:
    """Minus the condition number of the neural tangent kernel of the summed logits: TE-score.

    The release scores by the kernel alone; of TE-NAS's two terms the number of linear regions is
    never used. Gradients of all images are held at once: B times the scored weights.

    Args:
        images: (B, 3, H, W).
        chunk_size: images whose gradients are computed together.
    """
    wanted = [f"{name}.weight" for name in scored_layers(model)]
    values = _own_parameters(model)
    chosen = {name: values.pop(name) for name in wanted}

    def summed(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, {**values, **weights}, (image[None],)).sum()

    with evaluating(model), sdpa_kernel(SDPBackend.MATH):
        per_image = vmap(grad(summed), in_dims=(None, 0), chunk_size=chunk_size)
        gradients = per_image(chosen, images)
    kernel = sum(one.flatten(1).double() @ one.flatten(1).double().mT for one in gradients.values())
    eigenvalues = torch.linalg.eigvalsh(kernel)
    smallest = eigenvalues[0].clamp_min(torch.finfo(torch.float64).eps * eigenvalues[-1])
    return Score(-float(eigenvalues[-1] / smallest))
