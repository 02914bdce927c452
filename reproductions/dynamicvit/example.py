# %% [markdown]
# # DynamicViT: a network that looks away from most of the picture
#
# Run it as a program (`python -m reproductions.dynamicvit.example`) or cell by cell in an editor.
# It takes under two minutes on a laptop, uses real images of Fashion-MNIST, and saves the picture
# `lessons/dynamicvit.png`.

# %%
import time

import torch
from matplotlib.figure import Figure

import harness
from harness.environment import home
from harness.measurement.macs import count_macs
from harness.measurement.side_by_side import time_models
from harness.tokens import draw_kept, keep_mask, sample_images
from reproductions.dynamicvit.method import DynamicViTObjective

start = time.perf_counter()
torch.manual_seed(0)

# %% [markdown]
# ## 1. A trained parent
# A plain ViT that cuts 32x32 pixels into 64 patches. Most of them are black. It treats all alike.

# %%
parent = harness.load_pretrained("vit_micro")
[top1, _] = harness.evaluate(parent, "fashion_mini")
print(f"parent: {top1.value:.1f} % top-1, {count_macs(parent, 32).total / 1e6:.1f} M multiply-adds")

# %% [markdown]
# ## 2. Learn what to drop
# Three small prediction modules are put before blocks 2, 3 and 4. Each scores the tokens that are
# left; 70 % stay each time. Which decision is the right one cannot be differentiated, so training
# samples decisions (Gumbel-softmax), blocks the dropped tokens inside attention instead of removing
# them, and pays for keeping more than agreed. The parent is the teacher. One epoch is enough to see
# it work.

# %%
trained = harness.train(
    "dynamicvit_micro", "fashion_mini", epochs=1,
    objective=DynamicViTObjective(parent), init=parent.state_dict(), device="cpu",
)  # fmt: skip
pruned = trained.model
print(f"pruned: {trained.value('top1'):.1f} % top-1 after one epoch of fine-tuning")

# %% [markdown]
# ## 3. Now really remove
# In evaluation the best tokens are gathered and the rest is gone: the sequence gets shorter for the
# whole batch, since every image keeps the same number. That is what makes it fast. Masking, as in
# training, would save nothing.

# %%
sample = sample_images(pruned, "fashion_mini", 32)
with torch.inference_mode():
    _, kept = pruned.forward_with_tokens(sample.inputs)
print("tokens:", " -> ".join(map(str, (64, *pruned.keep_counts()))))
models = {"dense": parent}
for ratio in (0.9, 0.7, 0.5):
    models[f"keep {ratio}"] = harness.build("dynamicvit_micro", keep_ratio=ratio).eval()
timings = time_models(models, [sample.inputs], budget_s=8, palindromes=2, warm_up_limit_s=1)
speed = {name: 1 / timing.ratio for name, timing in timings.items()}
whole = count_macs(parent, 32).total
work = {name: whole / count_macs(model, 32).total for name, model in models.items()}
for name in models:
    print(f"{name:9} {work[name]:.2f} times less work, {speed[name]:.2f} times as fast")

# %% [markdown]
# ## 4. The picture
# Left: what the three stages keep of four images. Right: how much of the saved work is saved time.
# On a network this small the prediction modules and the sorting weigh; on DeiT-S time follows the
# multiply-adds (`replivit run dynamicvit/keep_ratio`).

# %%
figure = Figure(figsize=(11, 5), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1])
cells = left.subplots(4, 4)
everything = torch.arange(64).expand(len(sample), 64)
masks = [keep_mask(positions, 64) for positions in (everything, *kept)]
for row, image in enumerate((0, 3, 7, 8)):
    for axes, mask in zip(cells[row], masks, strict=True):
        draw_kept(axes, sample.pictures[image], mask[image], pruned.grid)
for axes, text in zip(cells[0], ("64 patches", *map(str, pruned.keep_counts())), strict=True):
    axes.set_title(text)
axes = right.subplots()
places = range(len(work))
axes.bar(places, work.values(), width=-0.38, align="edge", label="less work (MACs)")
axes.bar(places, speed.values(), width=0.38, align="edge", label="less time (measured)")
axes.axhline(1, color="0.5", linewidth=0.8)
axes.set_xticks(places, list(work))
axes.set(ylabel="dense / pruned", title="Batch 32, one thread")
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
path = home() / "lessons" / "dynamicvit.png"
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path, dpi=110)
print(f"picture: {path} ({time.perf_counter() - start:.0f} s)")
