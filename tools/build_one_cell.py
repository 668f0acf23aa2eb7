"""Build notebooks/bitllm_one_cell.ipynb: bitllm_core.py and a launcher in one form cell.

python tools/build_one_cell.py
"""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "notebooks" / "bitllm_one_cell.ipynb"

INTRODUCTION = """\
# Train a 1.58-bit language model with one cell

All of it is in the cell below: nothing to upload, nothing to fetch but your data. In Colab choose
**Runtime > Change runtime type > T4 GPU**, then **Runtime > Run all**. The cell can also be copied
into any notebook. Run it again to go on where it stopped. On a T4 the default is planned for about
an hour; without a GPU a small model is kept to about three minutes."""

FORM = """\
# @title Train a 1.58-bit language model
preset = "auto"  # @param ["auto", "ci", "demo", "laptop", "t4-1h", "t4-3h", "seed"]
data = ""  # @param {type: "string"}
minutes = 0.0  # @param {type: "number"}
resume = "auto"  # @param ["auto", "never"]
use_drive = False  # @param {type: "boolean"}
prompt = "The "  # @param {type: "string"}
"""

LAUNCHER = """
import contextlib
import importlib.util
import subprocess
import sys
from pathlib import Path

folder = Path("bitllm_one_cell")
folder.mkdir(exist_ok=True)
(folder / "bitllm_core.py").write_text(SOURCE, encoding="utf-8", newline="\\n")
sys.path.insert(0, str(folder.resolve()))
sys.modules.pop("bitllm_core", None)  # of an earlier version of this cell
needed = ["datasets", "tokenizers", "safetensors", "tqdm", "matplotlib"]
needed += ["ipywidgets", "jupyter_ui_poll"]
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:  # in Colab never what these depend on: numpy and torch are in use already
    alone = ["--no-deps"] if "google.colab" in sys.modules else []
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *alone, *missing], check=False)

import bitllm_core as bit

print(bit.environment_report())
drive = bit.mount_drive() if use_drive else None
settings = bit.Settings(preset, data, minutes=minutes, resume=resume)
run = settings.run_folder
if drive:
    settings = settings.replace(mirror=str(drive / run.name))
print(settings.describe())
with contextlib.redirect_stderr(sys.stdout):  # notes, not in the colour of errors
    state = bit.train(
        *settings.configs(), run, callbacks=[bit.LiveDisplay(run)], **settings.options
    )
bit.show_run(run)
net, tokenizer = bit.load_model(run)
print(prompt + bit.generate(net, tokenizer, prompt, bit.SamplingConfig(seed=0)))
bit.prompt_box(net, tokenizer, prompt)
assert state.step == state.config.max_steps, (
    f"stopped at step {state.step} of {state.config.max_steps}, and saved: run the cell again"
)
print(f"complete: {state.step} steps, {state.tokens:,} tokens, in {run.as_posix()}")"""


def build() -> str:
    """The notebook as text."""
    source = (ROOT / "bitllm_core.py").read_text(encoding="utf-8")
    assert "'''" not in source, "the file is quoted with three single quotes"
    assert source.endswith("\n")
    code = f"{FORM}\nSOURCE = r'''{source}'''\n{LAUNCHER}"
    book = new_notebook(
        cells=[
            new_markdown_cell(INTRODUCTION, id="introduction"),
            new_code_cell(code, id="bitllm", metadata={"cellView": "form"}),
        ],
        metadata={
            "accelerator": "GPU",
            "colab": {"gpuType": "T4", "provenance": []},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        },
    )
    nbformat.validate(book)
    return nbformat.writes(book) + "\n"


if __name__ == "__main__":
    TARGET.write_text(build(), encoding="utf-8", newline="\n")
    print(f"{TARGET.relative_to(ROOT)}: {TARGET.stat().st_size:,} bytes")
