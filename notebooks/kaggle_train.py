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
#   kaggle:
#     accelerator: nvidiaTeslaT4
#     isGpuEnabled: true
#     isInternetEnabled: true
#     language: python
#     sourceType: notebook
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train your own 1.58-bit language model on Kaggle's two T4s
#
# [![Open In Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/OWNER/bitllm/blob/main/notebooks/kaggle_train.ipynb)
#
# At the end of this notebook you have a language model of your own, trained from scratch on both
# GPUs, in a folder that a later version of this notebook resumes from. In the settings at the
# right: **Accelerator: GPU T4 x2**, and **Internet: on** (Kaggle asks for a verified phone number
# for both). Then **Save Version > Save & Run All**: it runs with the browser closed. Nothing below
# waits for a click.
#
# Without GPUs one process trains a small model, kept to about three minutes.

# %% [markdown]
# ## Installation
#
# This cell finds the package `bitllm` beside the notebook, or installs it.

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

# %%
import dataclasses
import shutil
import threading
import time
from pathlib import Path

import torch

import bitllm as bit

bit.log_to(sys.stdout)
print(bit.environment_report())

# %% [markdown]
# ## Settings
#
# `data` takes a known name (`wikitext-2`, `tinystories`, `fineweb-edu`, `wikipedia-es`, `pydocs`),
# `hf:OWNER/NAME`, or a file or folder such as one under `/kaggle/input`; empty: as the preset has
# it. `companion` (`companion:es`) is somebody to talk with, whom you make up in `persona`, as in
# `name=Luna; home=a boat; likes=tea; maker=Ana; motto=Slow is fine.`.
#
# `max_steps = 0` is the preset's number; a larger one makes a finished run longer. Kaggle ends a
# session after 12 hours: after `max_hours` training is stopped and saved, and the cells below
# still run. `gpus = 0` means all there are.

# %%
# @title Settings
preset = "auto"  # @param ["auto", "ci", "demo", "laptop", "t4-1h", "t4-3h", "seed"]
data = ""  # @param ["", "companion", "companion:es"] {allow-input: true}
persona = ""  # @param {type: "string"}
max_steps = 0  # @param {type: "integer"}
max_hours = 11.5  # @param {type: "number"}
gpus = 0  # @param {type: "integer"}

began = time.monotonic()
working = next(folder for folder in (Path("/kaggle/working"), Path()) if folder.is_dir())
settings = bit.Settings(preset, data, persona=persona)
run = working / settings.run_folder
settings = settings.replace(out=str(run))

# %% [markdown]
# ## Resume an earlier version
#
# `/kaggle/working` is kept as the output of a saved version and empty in the next. To resume,
# choose **Add Input > Your Work**, and the output of that version: the run in it is found, copied
# and resumed exactly. `/kaggle/input` cannot be written, so it is no place for a `--mirror`: the
# saved output is the copy.

# %%
inputs = working.resolve().parent / "input"
earlier = bit.furthest_run(inputs, run.name)
if earlier and not run.exists():
    copy = run.with_name(run.name + ".part")
    shutil.copytree(earlier, copy, dirs_exist_ok=True)
    copy.rename(run)  # now that it is whole
    print(f"resumes {earlier.relative_to(inputs).as_posix()} at step {bit.saved_step(run)}")

# %%
model, source, train = settings.configs()
if max_steps:
    train = dataclasses.replace(train, max_steps=max_steps, minutes=None)
print(settings.describe())

# %% [markdown]
# ## Train
#
# On several GPUs `torchrun` starts a process for each, with the command that is printed here. The
# time above is that of one.

# %%
asked = zip((model, source, train), bit.PRESETS[settings.preset_name], strict=True)
flags = [
    f"--{field.name.replace('_', '-')}={getattr(part, field.name)}"
    for part, its_preset in asked
    for field in dataclasses.fields(part)
    if getattr(part, field.name) != getattr(its_preset, field.name)
    and not (train.minutes and field.name == "max_steps")
]
gpus = gpus or max(1, torch.cuda.device_count())
torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
command = [*(torchrun if gpus > 1 else []), "-m", "bitllm", "train"]
command += ["--preset", settings.preset_name, "--out", run.as_posix(), *flags]
print("python", *command)

# %%
log = run.with_name(run.name + ".log")
log.parent.mkdir(parents=True, exist_ok=True)
with log.open("w") as sink:
    process = subprocess.Popen(
        [sys.executable, *command],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),  # finds what this notebook finds
            "TQDM_DISABLE": "1",  # the curve is the progress bar
        },
        stdout=sink,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # an interrupt comes to this notebook alone
    )

# %% [markdown]
# Stop, or interrupting the cell (■), stops and saves. The same cell in another notebook shows the
# same: `bit.watch(run)`.

# %%
limit = threading.Timer(3600 * max_hours - (time.monotonic() - began), process.terminate)
limit.start()
bit.watch(run, process=process)
limit.cancel()
told = log.read_text(errors="replace")
stopped = "stopped at step" in told
print(told.partition("Traceback")[0] if stopped else told)
if process.returncode and not stopped:
    raise RuntimeError(f"training ended with exit code {process.returncode}; see {log}")

# %% [markdown]
# ## Let it write
#
# A model that was trained on conversations answers; any other continues a text. One this small
# knows the look of its text rather than its sense. More steps, more text and more width help, in
# this order.

# %%
net, tokenizer = bit.load_model(run)
prompt = "hello" if bit.can_chat(tokenizer) else "The "
sampling = bit.SamplingConfig(max_new_tokens=120, temperature=0.5, seed=0)
for piece in bit.respond(net, tokenizer, prompt, sampling):
    print(piece, end="")

# %% [markdown]
# ## Take it along
#
# One packed file for this program, and a folder for transformers; `02_use` makes more. They are
# under **Output**, as the run folder is.

# %%
exports = working / "exports"
exports.mkdir(exist_ok=True)
for exported in (
    bit.export_packed(run, exports / f"{run.name}.safetensors", overwrite=True),
    bit.export_hf(run, exports / f"{run.name}-hf", overwrite=True),
):
    print(f"{exported.path.as_posix()}: {exported.size:,} bytes\n{exported.usage}")

# %%
last = bit.read_metrics(run)[-1]
if last.get("final"):
    print(f"complete: {bit.saved_step(run)} steps, validation loss {last['val_loss']:.3f}")
else:
    print(
        f"stopped, and saved, at step {bit.saved_step(run)} of {train.max_steps}. To resume: save "
        "this version, add its output as an input, and run all again"
    )
