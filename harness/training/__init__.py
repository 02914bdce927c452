"""Training: one trainer on accelerate and timm; a method brings an objective and callbacks.

from harness.training import Objective, train

class Mine(Objective):
    def loss(self, model, images, targets, context):
        return F.cross_entropy(model(images), targets)

trained = train("vit_micro", "fashion_mini", objective=Mine(), epochs=2)
"""

from harness.training.api import TrainedModel, train
from harness.training.callbacks import Callback, EvaluateEvery, TensorBoard
from harness.training.context import Context
from harness.training.distillation import (
    Distillation,
    distillation_loss,
    freeze_teacher,
    load_teacher,
)
from harness.training.objective import CrossEntropy, Objective, cross_entropy, only_logits
from harness.training.recipe import Recipe, read_recipe

__all__ = [
    "Callback",
    "Context",
    "CrossEntropy",
    "Distillation",
    "EvaluateEvery",
    "Objective",
    "Recipe",
    "TensorBoard",
    "TrainedModel",
    "cross_entropy",
    "distillation_loss",
    "freeze_teacher",
    "load_teacher",
    "only_logits",
    "read_recipe",
    "train",
]
