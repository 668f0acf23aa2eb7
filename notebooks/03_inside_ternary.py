# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#     provenance: []
#   jupytext:
#     notebook_metadata_filter: all,-language_info
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Inside a ternary network
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bitllm/blob/main/notebooks/03_inside_ternary.ipynb)
#
# How a matrix of real numbers becomes one of -1, 0 and 1, what that does to the numbers that flow
# through, and what it costs against the same network in full precision. Two small networks are
# trained for it, which takes a minute or two on a CPU and needs no download. **Run everything
# once:** in Colab *Runtime > Run all*, in JupyterLab *Run > Run All Cells*.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Set up
import importlib.util
import os
import re
import subprocess
import sys

sys.path[:0] = [".", ".."]  # in a checkout the package is beside this notebook or above it
if not getattr(importlib.util.find_spec("bitllm"), "origin", None):  # elsewhere: install it
    sessions = subprocess.getoutput("curl -sm 2 $COLAB_JUPYTER_IP:$KMP_TARGET_PORT/api/sessions")
    match = re.search(r'github\.com/([^"]+?/blob/[^"]+?)/notebooks/', sessions.replace("%2F", "/"))
    source = os.environ.get("BITLLM_REPOSITORY") or (match[1] if match else "OWNER/bitllm@main")
    archive = f"https://github.com/{re.sub('/blob/|@', '/archive/', source)}.zip"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "jupyter_ui_poll"]
    subprocess.run([*pip, archive], check=True)  # if this fails: open bitllm_one_cell.ipynb

# %% cellView="form" jupyter={"source_hidden": true}
# @title Start
import dataclasses
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import bitllm as bit
from bitllm_core import encode

bit.log_to(sys.stdout)
bit.brief_errors()
plt.rcParams.update({"figure.figsize": (9, 3), "figure.dpi": 120, "font.size": 9})
plt.rcParams.update({"figure.facecolor": "white", "legend.frameon": False})

# %% [markdown]
# ## Two small networks
#
# The same shape, the same data in the same order, the same number of steps. `linear="ternary"`
# rounds every weight of the blocks and every activation that enters them; `linear="dense"` rounds
# nothing.

# %%
shape, data, train = bit.PRESETS["ci"]
shape = dataclasses.replace(shape, hidden_size=256, intermediate_size=512, num_attention_heads=4)
train = dataclasses.replace(train, max_steps=100, eval_every_steps=25, log_every_steps=5)
train = dataclasses.replace(train, compile="off")


class History(bit.Callback):
    """Keeps the first matrix' master weights at every line of the log."""

    def __init__(self):
        self.weights = {}

    def on_step(self, state, metrics):
        if metrics:
            layer = next(iter(state.model.bit_linears().values()))
            self.weights[state.step] = layer.weight.detach().cpu().clone()


states, histories = {}, {"ternary": History(), "dense": History()}
for linear, history in histories.items():
    model = dataclasses.replace(shape, linear=linear)
    run = Path("runs") / f"inside-{linear}"
    shutil.rmtree(run, ignore_errors=True)  # seconds to train again, and the history is whole
    display = bit.LiveDisplay(run)
    states[linear] = bit.train(model, data, train, run, callbacks=[display, history])
    display.show_end(states[linear])

# %% [markdown]
# ## Absmean: from a matrix to trits
#
# The scale is the mean size of the weights, s = mean |W|. Each weight is divided by it, rounded and
# clipped: what is smaller than s/2 becomes 0, the rest keeps its sign and nothing else.

# %%
name, layer = next(iter(states["ternary"].model.bit_linears().items()))
master = layer.weight.detach().cpu()
scale = master.abs().mean()
by_hand = (master / scale).round().clamp(-1, 1)
print(name, tuple(master.shape), f"s = {scale:.4f}")
print(master[:3, :5], by_hand[:3, :5].int(), sep="\n")

# %% [markdown]
# The library does the same, with a floor under the scale for a matrix of zeros.

# %%
ternary, s = bit.weight_quant(master)
assert torch.equal(ternary, by_hand)
print({int(v): f"{(ternary == v).float().mean():.1%}" for v in (-1, 0, 1)})

# %%
figure, places = plt.subplots(1, 2, layout="constrained")
part = slice(0, 48)  # a corner of it, to see single weights
matrices = {"master weights": master[part, part], "trits": ternary[part, part]}
for axes, (title, matrix) in zip(places, matrices.items(), strict=True):
    limit = float(matrix.abs().max())
    image = axes.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit)
    axes.set(title=f"{name.removeprefix('model.')}: {title}", xlabel="input", ylabel="output")
    figure.colorbar(image, ax=axes)
plt.show()

# %% [markdown]
# ## A weight crosses its threshold
#
# Training moves the master weights, which stay real numbers. What the network computes with changes
# only where one of them crosses a threshold, ±s/2. Here are the weights that changed most often.

# %%
history = histories["ternary"].weights
steps = list(history)
over_time = torch.stack([history[step].flatten() for step in steps])  # (lines, weights)
half = over_time.abs().mean(1, keepdim=True) / 2
trits = (over_time / (2 * half)).round().clamp(-1, 1)
changes = (trits[1:] != trits[:-1]).sum(0)
_, axes = plt.subplots(layout="constrained")
for number in changes.topk(3).indices.tolist():
    axes.plot(steps, over_time[:, number], label=f"weight {number}")
axes.plot(steps, half, "k--", linewidth=0.8, label="thresholds, s/2 and -s/2")
axes.plot(steps, -half, "k--", linewidth=0.8)
axes.fill_between(steps, -half[:, 0], half[:, 0], alpha=0.1, color="gray")
axes.set(title="in the grey band a weight counts as 0", xlabel="step", ylabel="master weight")
axes.legend()
plt.show()

# %% [markdown]
# One matrix, before and after: what changed sides, and what stayed.

# %%
first, last_one = (trits[n].view_as(master)[part, part] for n in (0, -1))
figure, places = plt.subplots(1, 3, layout="constrained")
shown = {f"step {steps[0]}": first, f"step {steps[-1]}": last_one, "changed": first != last_one}
for axes, (title, matrix) in zip(places, shown.items(), strict=True):
    style = {"cmap": "RdBu", "vmin": -1, "vmax": 1} if title != "changed" else {"cmap": "Greys"}
    axes.imshow(matrix, **style)
    axes.set(title=title, xlabel="input", ylabel="output")
plt.show()
print(f"{(first != last_one).float().mean():.0%} of the trits have changed")

# %% [markdown]
# A weight near a threshold flips with a small push; one in the middle of its bin needs many. The
# dense twin is trained by the same optimizer but has no thresholds.

# %%
_, places = plt.subplots(1, 2, layout="constrained", sharey=True)
for axes, (linear, state) in zip(places, states.items(), strict=True):
    weight = state.model.bit_linears()[name].weight.detach().cpu().flatten()
    half = weight.abs().mean() / 2
    axes.hist(weight.numpy(), bins=80, color="#3a8fd0")
    for threshold in (-half, half):
        axes.axvline(threshold, color="#d0701a", label="±s/2" if threshold > 0 else None)
    near = ((weight.abs() - half).abs() < 0.1 * half).float().mean()
    title = f"{linear}: {near:.1%} within a tenth of a threshold"
    axes.set(title=title, xlabel="master weight", ylabel="how many")
    axes.legend()
plt.show()

# %% [markdown]
# ## Zeros and flips, over time
#
# Weights begin uniformly distributed, and a quarter of such weights is smaller than half their mean
# size. Training gives them the shape of a bell, for which it would be 31%. Trits flip often while
# the learning rate is high, and freeze as it falls.

# %%
lines = [line for line in bit.read_metrics("runs/inside-ternary") if "loss" in line]
steps = [line["step"] for line in lines]
_, places = plt.subplots(1, 2, layout="constrained")
titles = {"zero_fraction": "share of weights that are 0", "flip_rate": "share that changed"}
for axes, (key, title) in zip(places, titles.items(), strict=True):
    for number, values in enumerate(zip(*(line[key] for line in lines), strict=True)):
        axes.plot(steps, values, label=f"layer {number}")
    axes.set(title=title, xlabel="step")
    axes.set_ylim(0, None)
    axes.legend()
plt.show()

# %% [markdown]
# ## Activations in 8 bits
#
# What enters a ternary matrix is rounded too: each token's vector is scaled by its largest absolute
# value and rounded to integers from -127 to 127. A hook on the norm before the first attention
# shows the vectors of real text before, and `activation_quant` after.

# %%
net, tokenizer = bit.load_model("runs/inside-ternary")
outputs = []
norm = net.model.layers[0].input_layernorm
hook = norm.register_forward_hook(lambda layer, x, y: outputs.append(y))
with torch.no_grad():
    net(torch.tensor([encode(tokenizer, "The with statement is used to wrap a block.")]))
hook.remove()
before = outputs[0][0]
after = bit.activation_quant(before)
error = (after - before).norm() / before.norm()
print(f"{len(before)} tokens of width {before.shape[1]}, relative error {error:.2%}")
assert error > 0

# %%
_, axes = plt.subplots(layout="constrained")
axes.plot(before[0, :64], label="before", color="#3a8fd0")
axes.plot(after[0, :64], ".", label="after, 8 bits", color="#d0701a")
axes.set(title="the first token's vector, its first 64 numbers", xlabel="number", ylabel="value")
axes.legend()
plt.show()

# %% [markdown]
# ## What it costs
#
# Validation loss of both networks, each trained at the learning rate that was tuned for its form:
# at one rate for both, most of the gap would be the rate's. In so short a training they end close
# to each other; [results](https://github.com/OWNER/bitllm/blob/main/docs/results.md) have the gap
# of longer ones, over several seeds.

# %%
_, axes = plt.subplots(layout="constrained")
last = {}
for linear, color in {"ternary": "#3a8fd0", "dense": "#d0701a"}.items():
    lines = bit.read_metrics(f"runs/inside-{linear}")
    points = [(x["step"], x["val_loss"]) for x in lines if "val_loss" in x and "final" not in x]
    if points:  # none if the training was stopped early
        axes.plot(*zip(*points, strict=True), ".-", label=linear, color=color)
        last[linear] = points[-1][1]
axes.set(title="on text that it has not seen", xlabel="step", ylabel="loss, nats per token")
axes.legend()
plt.show()

# %%
if len(last) == 2:
    gap = last["ternary"] - last["dense"]
    print(f"ternary {last['ternary']:.3f}, dense {last['dense']:.3f}: {gap:+.3f} nats per token")

# %% [markdown]
# ## What it saves
#
# The smallest file of each: five trits in a byte for the one, 16 bits per weight for the other. The
# embedding has 16 bits in both, so the larger the network, the more is saved.

# %%
packed = bit.export_packed("runs/inside-ternary", "runs/inside.safetensors", overwrite=True)
sizes = {"ternary": packed.size, "dense": 2 * shape.num_parameters}
_, axes = plt.subplots(figsize=(9, 1.5), layout="constrained")
axes.barh(list(sizes), [size / 1e6 for size in sizes.values()], color=["#3a8fd0", "#d0701a"])
axes.set(xlabel="file size, MB")
axes.invert_yaxis()
plt.show()
print(
    f"ternary {sizes['ternary']:,} bytes, {sizes['ternary'] / sizes['dense']:.0%} of the dense one"
)
