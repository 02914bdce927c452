# %% [markdown]
# # ATS: as many tokens as the picture needs
#
# Run it as a program (`python -m reproductions.ats.example`) or cell by cell in an editor. It takes
# under two minutes on a laptop, uses real images of Fashion-MNIST, trains nothing, and saves the
# picture `lessons/ats.png`.

# %%
import time

import numpy as np
import torch
from matplotlib.figure import Figure

import harness
from harness.environment import home
from harness.measurement.macs import count_macs
from harness.tokens import draw_kept, keep_mask, sample_images
from reproductions.ats.conventions import macs_of_counts, tokens_in_blocks
from reproductions.ats.model import AtsVisionTransformer, insert_ats
from reproductions.ats.sampling import cumulative, sample_counts
from reproductions.ats.sampling_experiment import first_stage, scores_of

start = time.perf_counter()

# %% [markdown]
# ## 1. A trained parent
# A plain ViT that cuts 32x32 pixels into 64 patches and spends the same work on each.

# %%
parent = harness.load_pretrained("vit_micro")
sample = sample_images(parent, "fashion_mini", 1500)
with torch.inference_mode():
    right = (parent(sample.inputs).argmax(1) == sample.labels).float().mean()
whole = count_macs(parent, 32).total
print(f"parent: {100 * right:.1f} % of {len(sample)} images, {whole / 1e6:.1f} M multiply-adds")

# %% [markdown]
# ## 2. Put sampling into it
# From block 2 on, each block asks which patches the class token attends to and how long their
# values are. The scores, summed up from the first patch to the last, climb from 0 to 1. Evenly
# spaced samples on that axis each fall on a patch: on an important one several of them, on the
# others few or none. Only the patches that were hit go on. There is nothing to learn, so the
# parent's weights are all there is.

# %%
model = insert_ats(harness.load_pretrained("vit_micro"), tokens=0.5)
with torch.inference_mode():
    logits, kept = model.forward_with_tokens(sample.inputs)
counts = tokens_in_blocks(model, kept)
macs = macs_of_counts(model, counts)
left = counts[:, -1] - 1
print(f"32 samples in blocks 2 to 5: {left.min()} to {left.max()} patches are left at the end")
print(f"multiply-adds per image: {macs.min() / 1e6:.1f} to {macs.max() / 1e6:.1f} M")
print(f"{100 * (logits.argmax(1) == sample.labels).float().mean():.1f} % right, without training")

# %% [markdown]
# ## 3. Is sampling better than taking the best?
# The same scores, and as many tokens as sampling keeps on average: but always the best ones. The
# best tokens tend to say the same thing; samples also fall on the rest of the picture.


# %%
@torch.inference_mode()
def score(model: AtsVisionTransformer) -> tuple[float, float, list[int]]:
    """MACs as a part of the parent's, % right, and the average number of patches per stage."""
    logits, kept = model.forward_with_tokens(sample.inputs)
    counts = tokens_in_blocks(model, kept)
    stages = [round(float(counts[:, stage + 1].mean())) - 1 for stage in sorted(model.ats.limits)]
    share = macs_of_counts(model, counts).mean() / whole
    return share, 100 * float((logits.argmax(1) == sample.labels).float().mean()), stages


curves = {"sampling": [], "top-k, as many": []}
for limit in (1.0, 0.75, 0.5, 0.35, 0.25, 0.12):
    *point, stages = score(insert_ats(model, tokens=limit))
    *rival, _ = score(insert_ats(model, tokens=stages, mode="topk"))
    for name, one in zip(curves, (point, rival), strict=True):
        curves[name].append(one)
    print(f"{point[0]:.2f} of the work: sampling {point[1]:.1f} %, top-k {rival[1]:.1f} %")

# %% [markdown]
# ## 4. The picture
# Left: the image that keeps the fewest patches, and the one that keeps the most. Middle: their
# sums of scores with the samples; where the curve jumps, many samples hit the same patch. Right:
# what is left of the accuracy, without any training.

# %%
insert_ats(model, tokens=0.5)
with torch.inference_mode():
    scores = scores_of(model, *first_stage(model, sample.inputs))
cdf = cumulative(scores)
hits = sample_counts(cdf, 32)
masks = [keep_mask(kept[0], 64), keep_mask(kept[-1], 64)]
figure = Figure(figsize=(12.5, 4.4), layout="constrained")
pictures, curve, front = figure.subfigures(1, 3, width_ratios=[1.15, 1.1, 1])
cells, axes = pictures.subplots(2, 3), curve.subplots(2, 1, sharex=True)
for line, panel, image in zip(cells, axes, (left.argmin(), left.argmax()), strict=True):
    shown = [torch.ones(64, dtype=torch.bool), *(mask[image] for mask in masks)]
    for cell, mask, name in zip(line, shown, ("", "block 2: ", "block 5: "), strict=True):
        draw_kept(cell, sample.pictures[image], mask, model.patch_embed.grid_size)
        cell.set_title(f"{name}{int(mask.sum())}", fontsize=9)
    places = np.repeat(np.arange(64), hits[image])
    panel.step(range(64), cdf[image], where="mid", color="0.3", linewidth=1)
    panel.hlines((np.arange(32) + 0.5) / 32, -1, places, color="#4c72b0", linewidth=0.5)
    panel.plot(places, np.zeros(32), "|", color="#c44e52", markersize=9)
    panel.set(xlim=(-1, 64), ylim=(0, 1.02), ylabel="sum of scores")
    panel.spines[["top", "right"]].set_visible(False)
axes[-1].set_xlabel("patch (red: hit in block 2)")
panel = front.subplots()
for (name, points), style in zip(curves.items(), ("o-", "s--"), strict=True):
    panel.plot(*zip(*points, strict=True), style, label=name)
panel.plot(1, 100 * right, "k*", markersize=10, label="parent")
panel.set(xlabel="multiply-adds / parent's", ylabel="% right, without training")
panel.legend(frameon=False)
panel.spines[["top", "right"]].set_visible(False)
path = home() / "lessons" / "ats.png"
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path, dpi=110)
print(f"picture: {path} ({time.perf_counter() - start:.0f} s)")
