# %% [markdown]
# # AutoFormer: one set of weights, a thousand transformers
#
# Run it as a program (`python -m reproductions.autoformer.example`) or cell by cell in an editor.
# It takes about two minutes on a laptop, uses real images of Fashion-MNIST, and saves the picture
# `lessons/autoformer.png`.

# %%
import random

import torch
from matplotlib.figure import Figure

from harness.data import batches_of, hold_out, load_split
from harness.environment import home
from harness.evolution import Workers
from harness.training import train
from reproductions.autoformer.counting import params_of
from reproductions.autoformer.drawing import draw_architecture, draw_slices, draw_trace
from reproductions.autoformer.evolution import Evolution, Settings, random_search
from reproductions.autoformer.fitness import InheritedAccuracy
from reproductions.autoformer.space import MICRO, Config
from reproductions.autoformer.supernet import Supernet
from reproductions.autoformer.training import OneSubnetPerStep

torch.manual_seed(0)

# %% [markdown]
# ## 1. A subnet is a part of the supernet
# Set a configuration and the same weights compute another network. Copied out, it is an ordinary
# dense model with the same outputs: nothing of the supernet has to be carried along.

# %%
supernet = Supernet(MICRO, num_classes=10, image_size=32)
config = MICRO.sample(random.Random(0))
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    inside = supernet.eval().set_config(config)(images)
    outside = supernet.extract(config)(images)
print(f"{MICRO.candidates:,} candidates in {sum(p.numel() for p in supernet.parameters()):,} "
      f"parameters; one of them: {config}")  # fmt: skip
print(f"inside the supernet against copied out: {(inside - outside).abs().max():.1e}")

# %% [markdown]
# ## 2. Train all of them at once
# Every step draws one subnet and moves only the slices it uses. Half of the training images are
# held out: they will say which subnet is good.

# %%
HELD_OUT, EPOCHS = 5000, 2
supernet.set_config(MICRO.largest())
trained = train(
    supernet, "fashion_mini", {"warmup_epochs": 0, "batch_size": 64, "lr": 2e-3},
    objective=OneSubnetPerStep(), epochs=EPOCHS, hold_out=HELD_OUT, evaluate=False,
    name="autoformer_lesson", device="cpu",
)  # fmt: skip
_, held = hold_out(load_split("fashion_mini", "train"), HELD_OUT)
fitness = Workers(InheritedAccuracy(supernet, batches_of(held, 32, limit=500)))

# %% [markdown]
# ## 3. Search: evolution against luck
# Both look at as many candidates, under the same parameter budget. Nothing is trained any more.


# %%
def count(one: Config) -> int:
    """Parameters of a candidate with ten classes."""
    return params_of(MICRO, one, 10, 32)


settings = Settings(generations=4, population=10, parents=4, mutations=5, crossovers=4,
                    min_params=0.22, max_params=0.2586)  # fmt: skip
evolved = Evolution(MICRO, count, fitness, settings).run()
lucky = random_search(MICRO, count, fitness, settings.evaluations, settings, seed=1)
for name, result in (("evolution", evolved), ("random search", lucky)):
    best = result.scores[result.winner.genes].fitness
    print(f"{name}: {best:.2f} % on held-out images after {len(result.scores)} candidates, "
          f"{count(result.winner):,} parameters: {result.winner}")  # fmt: skip

# %% [markdown]
# ## 4. The picture
# Left: three subnets use nested parts of one and the same weight. Middle: the search. Right: what
# it found, layer by layer, inside the outline of the supernet.

# %%
figure = Figure(figsize=(14, 4.4), layout="constrained")
left, middle, right = figure.subplots(1, 3)
draw_slices(left, MICRO, [MICRO.smallest(), Config(6, 56, (2.5,) * 6, (3,) * 6), MICRO.full()])
draw_trace(middle, {"evolution": [evolved.trace()], "random": [lucky.trace()]})
middle.set_title("The same number of candidates", fontsize=10)
draw_architecture(right, evolved.winner, MICRO)
out = home() / "lessons" / "autoformer.png"
out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(out, dpi=110)
print(f"wrote {out}")
