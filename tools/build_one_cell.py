"""Build notebooks/bitllm_one_cell.ipynb: core, package and a launcher in one form cell.

python tools/build_one_cell.py
"""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "notebooks" / "bitllm_one_cell.ipynb"
LEFT_OUT = ("__main__.py", "bench.py", "cli.py", "export", "loggers.py", "tasks.py")
"""Of the package: what training and the prompt box never import"""

INTRODUCTION = """\
# Train a 1.58-bit language model with one cell

All of it is in the cell below, folded away: nothing to upload, nothing to fetch but your data.
**Run it:** in Colab *Runtime > Run all*, in JupyterLab *Run > Run All Cells*. Form, training and
the model's answers appear under it. Without a GPU it trains a companion that answers, in about
three minutes; on a free Colab T4 a writer of small stories, in about an hour (an estimate). Run it
again to resume where it stopped. The cell can also be copied into any notebook."""

HIDDEN = {"cellView": "form", "jupyter": {"source_hidden": True}}
"""In Colab the cell is a form, in JupyterLab a line: its source is 7,000 lines."""

FORM = """\
# @title Train a 1.58-bit language model
preset = "auto"  # @param ["auto", "ci", "demo", "laptop", "t4-1h", "t4-3h", "seed"]
data = ""  # @param ["", "companion", "companion:es"] {allow-input: true}
persona = ""  # @param {type: "string"}
minutes = 0.0  # @param {type: "number"}
resume = "auto"  # @param ["auto", "never"]
use_drive = False  # @param {type: "boolean"}
prompt = ""  # @param {type: "string"}
"""

LAUNCHER = """
import importlib.util
import subprocess
import sys
from pathlib import Path

folder = Path("bitllm_one_cell")
for name, text in SOURCES.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8", newline="\\n")
sys.path.insert(0, str(folder.resolve()))
for name in list(sys.modules):  # of an earlier version of this cell
    if name.partition(".")[0] in ("bitllm", "bitllm_core"):
        del sys.modules[name]
needed = ["datasets", "tokenizers", "safetensors", "tqdm", "matplotlib"]
needed += ["ipywidgets", "jupyter_ui_poll"]
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:  # in Colab never what these depend on: numpy and torch are in use already
    alone = ["--no-deps"] if "google.colab" in sys.modules else []
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *alone, *missing], check=False)

import bitllm as bit

bit.log_to(sys.stdout)
bit.brief_errors()
bit.show_environment()
drive = bit.mount_drive() if use_drive else None
settings = bit.Settings(preset, data, minutes=minutes, resume=resume, persona=persona)
panel = bit.SettingsPanel.kept(settings if settings != bit.Settings() else None)
if "google.colab" not in sys.modules:  # there the cell itself is the form
    panel.show()
settings = panel.settings
run = settings.run_folder
if drive:
    settings = settings.replace(mirror=str(drive / run.name))
display = bit.LiveDisplay(run)
state = bit.train(*settings.configs(), run, callbacks=[display], **settings.options)
display.show_end(state)
if prompt:
    bit.prompt_box(*bit.load_model(run), prompt)
else:
    bit.try_out(run)"""


def files() -> list[Path]:
    """The core, and of the package what the cell can come to."""
    kinds = (".py", ".c", ".h", ".json")
    parts = [p for p in sorted((ROOT / "bitllm").rglob("*")) if p.suffix in kinds]
    return [ROOT / "bitllm_core.py"] + [
        path for path in parts if path.relative_to(ROOT / "bitllm").parts[0] not in LEFT_OUT
    ]


def quoted(path: Path) -> str:
    """A file as a line of the cell that puts it into SOURCES."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    assert "'''" not in text, f"{name} is quoted with three single quotes"
    assert text.endswith("\n") or not text, f"{name} has no line end at its end"
    return f"SOURCES[{name!r}] = r'''{text}'''\n"


def build() -> str:
    """The notebook as text."""
    code = f"{FORM}\nSOURCES = {{}}\n{''.join(map(quoted, files()))}{LAUNCHER}"
    book = new_notebook(
        cells=[
            new_markdown_cell(INTRODUCTION, id="introduction"),
            new_code_cell(code, id="bitllm", metadata=HIDDEN),
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
