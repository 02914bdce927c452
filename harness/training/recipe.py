"""Recipes: everything that decides how a model is trained, as data.

A recipe is read from YAML. It is found by name in the paper's own `recipes/` directory, then in
this package's, or by path. Unknown keys, wrong types and values out of range are one sentence
that names file, line and key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from harness.errors import ReplivitError
from harness.paper import Fact, load_yaml
from harness.registry import Variant

RECIPES = Path(__file__).parent / "recipes"


class ParameterGroup(Fact):
    """Parameters that learn at a rate of their own."""

    match: tuple[str, ...] = Field(description="names of parameters (fnmatch)")
    lr_scale: float = Field(1.0, ge=0, description="factor of the learning rate; 0 = not trained")
    frozen_epochs: int = Field(0, ge=0, description="epochs at learning rate 0 before it starts")


class Recipe(Fact):
    """How to train. Frozen; `changed()` gives a variation of it."""

    name: str = Field("custom", description="where it came from; the file's stem unless given")
    extends: str | None = Field(None, description="recipe whose values hold where this is silent")
    summary: str = ""

    # length and batch
    epochs: int = Field(300, ge=1)
    batch_size: int = Field(1024, ge=1, description="images per update, over all processes")
    accumulation: int = Field(1, ge=1, description="forward passes an update is split into")

    # optimizer
    optimizer: str = Field("adamw", description="a name that timm's create_optimizer_v2 knows")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    lr_reference_batch: int | None = Field(
        None, ge=1, description="if given, the peak is lr * batch_size / lr_reference_batch"
    )
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.9, ge=0, le=1, description="of optimizers that have one")
    weight_decay: float = Field(0.05, ge=0)
    no_decay: tuple[str, ...] = Field(
        (), description="names (fnmatch) without weight decay, beside biases and 1-d tensors"
    )
    decay_model_exceptions: bool = Field(
        False, description="decay also what the model's no_weight_decay() exempts"
    )

    parameter_groups: tuple[ParameterGroup, ...] = Field(
        (), description="the first that matches a parameter holds; others learn at the full rate"
    )

    # learning-rate schedule
    scheduler: Literal["cosine", "cosine_after_warmup", "constant"] = Field(
        "cosine",
        description="cosine: over all epochs, its beginning hidden by the warm-up; "
        "cosine_after_warmup: over the epochs after it, as ConvNeXt's code does",
    )
    warmup_epochs: int = Field(5, ge=0)
    warmup_lr: float = Field(1e-6, ge=0, description="where the linear warm-up starts")
    min_lr: float = Field(1e-5, ge=0, description="where the cosine ends")
    lr_updates: Literal["step", "epoch"] = "step"
    lr_lag_epochs: int = Field(0, ge=0, description="epochs the schedule runs behind (by epoch)")

    # regularisation of the targets and of the model
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0, description="alpha; 0 = off")
    cutmix: float = Field(0.0, ge=0, description="alpha; 0 = off")
    mixup_prob: float = Field(1.0, ge=0, le=1)
    switch_prob: float = Field(0.5, ge=0, le=1, description="of cutmix where both are on")
    mixup_off_epoch: int | None = Field(None, ge=0, description="no mixing from this epoch on")
    drop_path: float | None = Field(
        None, ge=0, lt=1, description="given to the builder as drop_path_rate; None = its default"
    )

    # images: what `harness.data.create_transform` reads
    augment: str = Field(
        "",
        description="crop_flip (pad, crop, flip), none, or random resized crop with this timm "
        "policy: rand-m9-mstd0.5-inc1, ...; empty = without policy",
    )
    color_jitter: float | None = Field(None, ge=0, description="without effect beside a policy")
    random_erasing: float = Field(0.0, ge=0, le=1, description="probability")
    random_erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    crop_scale: tuple[float, float] | None = Field(None, description="area of the crop, in parts")
    crop_ratio: tuple[float, float] | None = Field(None, description="width to height of the crop")
    hflip: float | None = Field(None, ge=0, le=1, description="probability of a flip")
    repeats: int = Field(1, ge=1, description="repeated augmentation: copies of each image drawn")

    # distillation (used where a teacher is given)
    distillation: Literal["none", "soft", "hard"] = "none"
    distillation_alpha: float = Field(0.5, ge=0, le=1)
    distillation_tau: float = Field(1.0, gt=0)

    # stability and averaging
    clip: Literal["norm", "value", "agc"] | None = Field(None, description="gradient clipping")
    clip_value: float = Field(1.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    ema_final: bool = Field(False, description="whether the averaged weights are the result")

    # speed
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    compile: bool = False
    workers: int = Field(0, ge=0, description="loader processes; small images need none")

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        if self.extends:  # its base may bring the other half; checked once they are joined
            return self
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into {self.accumulation} passes"
            )
        if self.ema_final and self.ema_decay is None:
            raise ValueError("ema_final needs ema_decay")
        if self.lr_lag_epochs and self.lr_updates != "epoch":
            raise ValueError("lr_lag_epochs needs lr_updates: epoch")
        return self

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up, scaled by the batch where the recipe says so."""
        return self.lr * self.batch_size / (self.lr_reference_batch or self.batch_size)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def changed(self, **values: Any) -> Recipe:
        """This recipe with other values, checked like a file's.

        Raises:
            ReplivitError: unknown key or impossible value.
        """
        try:
            return Recipe.model_validate({**self.model_dump(), **values})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "recipe"
            problem = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                problem = f"no such key; known: {', '.join(Recipe.model_fields)}"
            raise ReplivitError(f"recipe {self.name}: {key}: {problem}") from error


def _folders(variant: Variant | None) -> list[Path]:
    own = [variant.paper.directory / "recipes"] if variant else []
    return [*own, RECIPES]


def read_recipe(
    name: str | Path, variant: Variant | None = None, _above: tuple[Path, ...] = ()
) -> Recipe:
    """The recipe of a file, or of a name known to the variant's paper or to this package.

    Raises:
        ReplivitError: no such recipe (the known ones are listed), or a mistake in the file.
    """
    folders = _folders(variant)
    candidates = [Path(name)] if Path(name).suffix in (".yaml", ".yml") else []
    candidates += [folder / f"{name}.yaml" for folder in folders]
    path = next((one for one in candidates if one.is_file()), None)
    if path is None:
        known = sorted({one.stem for folder in folders for one in folder.glob("*.yaml")})
        raise ReplivitError(f"no recipe {str(name)!r}; known: {', '.join(known)}, or a .yaml file")
    recipe: Recipe = load_yaml(path, Recipe)
    said = {key: getattr(recipe, key) for key in recipe.model_fields_set}
    said.setdefault("name", path.stem)
    base = said.pop("extends", None)
    if path in _above or base == path.stem:
        raise ReplivitError(f"{path}: a recipe cannot extend itself")
    below = read_recipe(base, variant, (*_above, path)) if base else Recipe()
    return below.changed(**said)


def default_recipe(variant: Variant | None, protocol: Mapping[str, Any]) -> Recipe:
    """The recipe that holds when none is named: a track's protocol over what it leaves open.

    `protocol` is `Track.protocol`; it may name the recipe it builds on (`recipe`, default
    `small_track`), and its keys that a recipe does not know (seeds, ...) are not for us.
    """
    base = read_recipe(protocol.get("recipe", "small_track"), variant)
    known = set(Recipe.model_fields) - {"name", "extends"}
    return base.changed(**{key: value for key, value in protocol.items() if key in known})


def resolve_recipe(
    recipe: Recipe | Mapping[str, Any] | str | Path | None,
    variant: Variant | None,
    track: str,
    protocol: Mapping[str, Any],
) -> Recipe:
    """What the caller gave as one recipe.

    A mapping is read like a file: its values hold over the recipe it extends, or over the default
    if it extends none. The default on a variant's own track is the recipe that its paper names, if
    it names one, otherwise the track's protocol.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, (str, Path)):
        return read_recipe(recipe, variant)
    changes = dict(recipe or {})
    base = changes.pop("extends", None)
    if base is None and variant is not None and variant.track == track:
        base = variant.spec.recipe
    found = read_recipe(base, variant) if base else default_recipe(variant, protocol)
    return found.changed(**changes)
