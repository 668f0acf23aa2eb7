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
# By the end you will have your own language model, trained from scratch, to talk with, to download
# and to send to a friend as a web page. Its weights are only -1, 0 and 1
# ([BitNet b1.58](https://arxiv.org/abs/2402.17764)).
#
# ![What you will see: progress, what the model says, and its curve](attachment:live_display.png)
#
# **Run everything once:** in Colab *Runtime > Run all*, in JupyterLab *Run > Run All Cells*. You
# don't need to click anything else. JupyterLab jumps to the end of the page: scroll up to **Train**
# to watch.
#
# | machine | what is trained | time |
# | --- | --- | --- |
# | without a GPU | a companion that answers, 2.2M parameters | three minutes |
# | free Colab T4 | a writer of small stories, 29M parameters | about an hour (an estimate) |
#
# Stop whenever you like: running everything again resumes from there.

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
import bitllm as bit

bit.log_to(sys.stdout)
bit.brief_errors()
bit.show_environment()

# %% [markdown]
# ## Choose
#
# Leave everything as it is for a first model. Or paste a text of your own, or make up a companion,
# then press **Train**, or run everything again: what you typed is kept.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Settings
panel = bit.SettingsPanel.kept()
panel.show()

# %% [markdown]
# Colab deletes its machine and all files on it after some hours. Tick this box to copy every
# checkpoint to your Google Drive; tomorrow this notebook resumes from there.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Google Drive (optional)
use_drive = False  # @param {type: "boolean"}
drive = bit.mount_drive() if use_drive else None

# %% [markdown]
# ## Train
#
# The loss is how surprised the model is by each piece of text: the lower, the better. What it says
# grows from noise to sentences.

# %%
settings = panel.settings
run = settings.run_folder
if drive and not settings.mirror:
    settings = settings.replace(mirror=str(drive / run.name))
display = bit.LiveDisplay(run)
state = bit.train(*settings.configs(), run, callbacks=[display], **settings.options)
display.show_end(state)

# %% [markdown]
# ## Talk to it
#
# It has answered once. Now you. A model that was not trained on conversations continues the
# beginning of a text instead. One this small has learned what its text looks like, not what it
# means: more steps, more text and more width help, in this order.

# %%
bit.try_out(run)

# %% [markdown]
# ## Keep it
#
# To keep the model, keep the run folder. Or export it: the web page opens in any browser, on a
# phone too, and needs no network. The first page fetches llama.cpp for browsers (17 MB).

# %%
bit.export_box(run)

# %% [markdown]
# <details><summary>Words</summary>
#
# - **Token**: a piece of text, from one letter to one word.
# - **Step**: the model reads some text, then every weight moves a little.
# - **Loss**: the surprise per token, in nats. **Perplexity**: the number of tokens the model
#   hesitates between.
# - **Validation**: the same on text that it never learns from.
# - **Epoch**: once through all of the text.
# - **Ternary weight**: -1, 0 or 1; choosing among three takes 1.58 bits.
#
# </details>
#
# Next: [02_use](https://github.com/OWNER/bitllm/blob/main/notebooks/02_use.ipynb) looks closer at
# this model, [03_inside_ternary](https://github.com/OWNER/bitllm/blob/main/notebooks/03_inside_ternary.ipynb)
# shows what the ternary weights do, and
# [troubleshooting](https://github.com/OWNER/bitllm/blob/main/docs/troubleshooting.md) helps.

# %% cellView="form" jupyter={"source_hidden": true}
# @title Check this GPU: tick the box and run this cell (10 minutes)
check_this_gpu = False  # @param {type: "boolean"}
if check_this_gpu:
    bit.check_gpu()  # its results.jsonl is what docs/gpu.md asks for
