# %% [markdown]
# # Manifold distillation: learn how the teacher relates patches, not what it calls them
#
# Run it as a program (`python -m reproductions.manifold_distillation.example`) or cell by cell in
# an editor. It takes under two minutes on a laptop, uses real images of Fashion-MNIST, and saves
# the picture `lessons/manifold_distillation.png`.

# %%
import torch

import harness
from harness.environment import home
from harness.tokens import sample_images
from harness.training import train
from reproductions.manifold_distillation.losses import Weights, manifold_loss
from reproductions.manifold_distillation.method import end_layers, micro_objective
from reproductions.manifold_distillation.picture import manifold_figure
from reproductions.manifold_distillation.taps import block_names, tapped

TRACK = "fashion_mini"
torch.manual_seed(0)

# %% [markdown]
# ## 1. A teacher and a student
# The student is `vit_micro`, trained by labels. The teacher has the same 64 patches, but a stem of
# convolutions makes them, and it knows better.

# %%
student = harness.load_pretrained("vit_micro", track=TRACK)
teacher = harness.load_pretrained("manifold_distillation_teacher_micro", track=TRACK)
for name, model in (("student", student), ("teacher", teacher)):
    top1 = harness.evaluate(model, TRACK)[0].value
    params = sum(one.numel() for one in model.parameters())
    print(f"{name}: {params / 1e6:.2f} M parameters, top-1 {top1:.1f} %")

# %% [markdown]
# ## 2. Which layers, which tokens
# The first third of the student's blocks goes with as many first blocks of the teacher, the last
# third with the last. A tap is what a block hands on: the class token and 64 patches.

# %%
layers = end_layers(len(block_names(student)), len(block_names(teacher)))
print("student's blocks", layers[0], "learn from the teacher's", layers[1])
sample = sample_images(student, TRACK, 64)
with torch.no_grad(), tapped(student, layers[0]) as ours, tapped(teacher, layers[1]) as theirs:
    student(sample.inputs)
    teacher(sample.inputs)
own, other = ours.features()[-2], theirs.features()[-2]
print(f"student {tuple(own.tokens.shape)}, of which {own.prefix} is the class token")

# %% [markdown]
# ## 3. Relations, not features
# Tokens of length one, all cosines between them, and the mean square of what differs from the
# teacher's: within an image, across images at one place, and between random patches of the batch.
# `full` would compare every patch with every other, here 4160 x 4160 numbers. The three others
# stand for it, but it can be had without its matrix.

# %%
_, terms = manifold_loss(own.tokens, other.tokens, Weights(1, 1, 1, 1))
for name, value in terms.items():
    print(f"{name:7}{value:.4f}")
turn = torch.linalg.qr(torch.randn(64, 64))[0]
_, turned = manifold_loss(3 * other.tokens @ turn, other.tokens, Weights(1, 1, 1, 1))
print(f"the teacher's own tokens, rotated and three times as long: {turned['full']:.0e}")

# %% [markdown]
# ## 4. Train on
# An epoch over half of the images, once by labels, once as the authors do: the teacher's soft
# answers and its manifolds, no labels at all.

# %%
recipe = {"lr": 5e-4, "warmup_epochs": 0}
runs = {
    name: train(
        "manifold_distillation_micro", TRACK, recipe, epochs=1, hold_out=5000, device="cpu",
        init=student.state_dict(), objective=objective,
    )
    for name, objective in (
        ("by labels", harness.training.CrossEntropy()), ("by the teacher", micro_objective(teacher))
    )
}  # fmt: skip
for name, run in runs.items():
    print(f"an epoch {name}: top-1 {run.value('top1'):.1f} %")

# %% [markdown]
# ## 5. The picture
# Who resembles whom, one layer before the last: within two images, and across sixty-four images at
# the same place. Red is alike, blue the opposite; below stands how far it is from the teacher's.

# %%
columns = {"teacher": (teacher, layers[1][-2]), "student before": (student, layers[0][-2])}
columns |= {name: (run.model, layers[0][-2]) for name, run in runs.items()}
figure = manifold_figure(columns, sample)
path = home() / "lessons" / "manifold_distillation.png"
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path, dpi=100)
print(f"picture: {path}")
