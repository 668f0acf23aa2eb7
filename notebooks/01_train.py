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
# # Train your own 1.58-bit language model
#
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/bitllm/blob/main/notebooks/01_train.ipynb)
#
# At the end of this notebook you have a language model of your own, with ternary weights
# (-1, 0 or 1: [BitNet b1.58](https://arxiv.org/abs/2402.17764)), trained from nothing, in a
# folder that you can keep, continue and use. It costs nothing: choose **Runtime > Run all** and
# wait. On a free Colab T4 the default is a 29M model, planned for about an hour; without a GPU it
# is a companion of 2.9M parameters, which answers, kept to about three minutes.
#
# Nothing below waits for a click. Stop whenever you like: running all again resumes from the
# last checkpoint.

# %% [markdown]
# ## Installation
#
# This cell finds the package `bitllm` beside the notebook, or installs it from the repository that
# the notebook was opened from. In Colab everything else is there already, except a small package
# that delivers clicks while a cell runs.

# %%
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

# %%
import bitllm as bit

bit.log_to(sys.stdout)
print(bit.environment_report())

# %% [markdown]
# ## Google Drive (optional)
#
# Colab takes its machine back after some hours, with all files on it. With a tick here, Colab asks
# for access to your Drive, and each checkpoint is copied there; the next day this notebook resumes
# from the copy.

# %%
use_drive = False  # @param {type: "boolean"}
drive = bit.mount_drive() if use_drive else None

# %% [markdown]
# ## Settings
#
# Empty or 0 means the preset's value. `data` takes a text file or a folder, a known name
# (`wikitext-2`, `tinystories`, `fineweb-edu`, `wikipedia-es`, `pydocs`) or `hf:OWNER/NAME`.
# `companion` is somebody to talk with, whom you make up: in `persona`, as in
# `name=Luna; home=a boat; likes=tea; maker=Ana; motto=Slow is fine.`, or in the form below. What
# is left out is as it was thought up here, in English or, with `companion:es`, in Spanish.
# `minutes` is a time budget, which sets the number of steps. `resume = never` moves the run in
# the folder aside and starts a new one.

# %%
# @title Settings
preset = "auto"  # @param ["auto", "ci", "demo", "laptop", "t4-1h", "t4-3h", "seed"]
data = ""  # @param ["", "companion", "companion:es"] {allow-input: true}
persona = ""  # @param {type: "string"}
minutes = 0.0  # @param {type: "number"}
hidden_size = 0  # @param {type: "integer"}
num_hidden_layers = 0  # @param {type: "integer"}
batch_tokens = 0  # @param {type: "integer"}
learning_rate = 0.0  # @param {type: "number"}
resume = "auto"  # @param ["auto", "never"]
out = ""  # @param {type: "string"}
mirror = ""  # @param {type: "string"}

settings = bit.Settings(
    preset,
    data,
    hidden_size,
    num_hidden_layers,
    minutes,
    batch_tokens,
    learning_rate,
    resume,
    out,
    mirror,
    persona,
)

# %% [markdown]
# The same as a form that shows parameters, memory and the estimated time after every change.
# Your own text can be pasted or uploaded here. Change what you like, then run the cells below.

# %%
panel = bit.SettingsPanel(settings)
panel.show()

# %%
settings = panel.settings
if drive and not settings.mirror:
    settings = settings.replace(mirror=str(drive / settings.run_folder.name))
model, data, train = settings.configs()
print(settings.describe())

# %% [markdown]
# ## Train
#
# Blue is the loss on the training text, orange on text held back. The heat maps show, layer by
# layer, the share of weights that are zero, and the share of trits that changed since the last
# line: a network that is still learning keeps flipping.

# %%
run = settings.run_folder
display = bit.LiveDisplay(run)
state = bit.train(model, data, train, run, callbacks=[display], **settings.options)

# %% [markdown]
# The curve comes from `metrics.jsonl` in the run folder, so it is whole however often the training
# was interrupted.

# %%
bit.show_run(run)

# %% [markdown]
# ## Evaluate
#
# Perplexity is the number of tokens the model hesitates between; a uniform guess hesitates between
# all of them.

# %%
last = [line for line in bit.read_metrics(run) if "val_loss" in line][-1]
print(f"validation loss {last['val_loss']:.3f} nats per token at step {last['step']}")
print(f"perplexity {last['val_perplexity']:.1f}; a uniform guess: {model.vocab_size}")

# %% [markdown]
# ## Let it write
#
# A model that was trained on conversations answers; any other continues a text. One this small
# knows the look of its text rather than its sense. More steps, more text and more width help, in
# this order; see `docs/troubleshooting.md`.

# %%
net, tokenizer = bit.load_model(run)
prompt = "hello" if bit.can_chat(tokenizer) else "The "
sampling = bit.SamplingConfig(max_new_tokens=120, temperature=0.5, seed=0)
for piece in bit.respond(net, tokenizer, prompt, sampling):
    print(piece, end="")

# %% [markdown]
# Now you. Press **Say** or **Write** as often as you like.

# %%
bit.prompt_box(net, tokenizer, prompt)

# %% [markdown]
# `02_use` weighs and exports this model; `03_inside_ternary` shows what the ternary weights do.
# The run folder is all there is to keep.

# %%
assert state.finished, (
    f"stopped at step {state.step} of {state.config.max_steps}, and saved: run the training cell "
    "again to resume"
)
print(f"complete: {state.step} steps, {state.tokens:,} tokens, in {run.as_posix()}")
