# %% [markdown]
# # EfficientFormer: a transformer that is a map almost to the end
#
# The small EfficientFormer on real images of Fashion-MNIST: its two kinds of blocks, where its time
# goes, what attention has learned, and what is left of it in its deployment form. Run it as a
# program (`python -m reproductions.efficientformer.example`, under two minutes on a laptop) or cell
# by cell in an editor. It saves the picture `lessons/efficientformer.png`.

# %% Images, and a trained network
import tempfile

import torch
from matplotlib.figure import Figure

import harness
from harness.data import create_transform, input_spec, load_split
from harness.environment import home
from harness.measurement.latency import time_callables
from reproductions.efficientformer.blocks import Attention, Meta3D, Meta4D, Pooling

torch.manual_seed(0)
torch.set_num_threads(1)
NAME, TRACK = "efficientformer_micro", "fashion_mini"
variant = harness.get_variant(NAME)
file = variant.weights_file(TRACK)
if file is not None and file.exists():
    model = harness.load_pretrained(NAME)
else:  # no weights beside the code: one epoch is enough for the tour
    with tempfile.TemporaryDirectory() as folder:
        model = harness.train(NAME, TRACK, epochs=1, device="cpu", out=folder).model.eval()

test = load_split(TRACK, "test")
transform = create_transform(input_spec(variant), 32)
shown = [int((test.labels == label).argmax()) for label in range(6)]  # the first of each class
images = torch.stack([transform(test[index][0]) for index in shown])
with torch.inference_mode():
    answers = model(images).softmax(dim=1)

# %% Two kinds of blocks, and one change of shape
# Everything before `Flatten` works on maps (B, C, H, W), everything after it on tokens (B, N, C).
for index, stage in enumerate(model.network[::2]):
    height, width = model.resolutions[index]
    kinds = ", ".join(type(block).__name__ for block in stage)
    print(f"stage {index + 1}: {model.widths[index]} channels of {height}x{width}: {kinds}")

# %% The token mixer of a 4D block has no parameters: neighbours' mean minus the pixel
# On an image it looks like the edges, with the sign turned.
edges = Pooling()(images[:1])

# %% Where the time goes (CPU, one thread, batch 1)
parts, x = {}, images[:1].contiguous(memory_format=torch.channels_last)
with torch.inference_mode():
    for name, part in [("stem", model.patch_embed)] + [
        (f"stage {i // 2 + 1}" if i % 2 == 0 else f"down {i // 2 + 1}", part)
        for i, part in enumerate(model.network)
    ]:
        parts[name] = lambda part=part, x=x: part(x)
        x = part(x)
timings = time_callables(parts, budget_s=3, warm_up_s=0.05)

# %% What the attention has learned about distance
# One number per head for each |dy|, |dx|; here as seen from the token in the upper left corner.
attention = next(one for one in model.modules() if isinstance(one, Attention))
side = model.resolutions[-1]
bias = attention.bias()[:, 0].detach().reshape(-1, *side)

# %% The deployment form: the same function with fewer operations
deployed = harness.deploy(model, 32)
with torch.inference_mode():
    gap = (deployed(images) - model(images)).norm() / model(images).norm()
pair = {"eager": lambda: model(images[:1]), "deployed": lambda: deployed(images[:1])}
ratio = time_callables(pair, budget_s=3, warm_up_s=0.1)["deployed"]
low, high = ratio.ratio_interval
print(f"deployed: {ratio.ratio:.2f} times the time [{low:.2f}, {high:.2f}], off by {gap:.0e}")
print(deployed.deploy_report)

# %% The picture
figure = Figure(figsize=(10, 5.6), layout="constrained")
top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.3])
spec = input_spec(variant)
for axes, image, answer, index in zip(top.subplots(1, 6), images, answers, shown, strict=True):
    axes.imshow((image[0] * spec.std[0] + spec.mean[0]).clamp(0, 1), cmap="gray")
    label, truth = test.classes[int(answer.argmax())], test.classes[test[index][1]]
    colour = "green" if label == truth else "red"
    said = label if label == truth else f"{label} (is {truth})"
    axes.set_title(f"{said}\n{answer.max():.0%}", fontsize=9, color=colour)
    axes.set_axis_off()
left, middle, right = bottom.subfigures(1, 3, width_ratios=[1.2, 0.8, 1])
axes = left.subplots()
axes.barh(list(timings), [one.median * 1e3 for one in timings.values()], color="#4c72b0")
axes.invert_yaxis()
axes.set(xlabel="ms, batch 1, one thread", title="where the time goes")
axes = middle.subplots()
reach = float(edges.abs().max())
axes.imshow(edges[0, 0], cmap="RdBu", vmin=-reach, vmax=reach)
axes.set(title="pooling minus identity", xticks=[], yticks=[])
right.suptitle("attention bias per head")
scale = float(bias.abs().max()) or 1.0
for axes, head in zip(right.subplots(2, 2).flat, bias, strict=True):
    axes.imshow(head, cmap="PuOr", vmin=-scale, vmax=scale)
    axes.set(xticks=[], yticks=[])
blocks = [sum(isinstance(one, kind) for one in model.modules()) for kind in (Meta4D, Meta3D)]
figure.suptitle(f"{NAME}: {blocks[0]} blocks on maps, {blocks[1]} on tokens")
picture = home() / "lessons" / "efficientformer.png"
picture.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(picture, dpi=150)
print(f"picture: {picture}")
