"""Bring the notebooks up to date: pair them with their sources, or run them and keep the outputs.

python tools/notebooks.py pair                     # after editing notebooks/*.py
python tools/notebooks.py run [NAME ...]           # execute in an empty folder, keep outputs
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"


def pair(source: Path) -> None:
    """Write the .ipynb of a percent script; outputs and ids of cells that stay are kept."""
    path, new = source.with_suffix(".ipynb"), jupytext.read(source)
    old = nbformat.read(path, 4).cells if path.exists() else []
    before = {(cell.cell_type, cell.source): cell for cell in old}
    for number, cell in enumerate(new.cells):
        cell.id = f"{source.stem.split('_')[0]}-{number:02}"
        kept = before.get((cell.cell_type, cell.source))
        if kept is not None and cell.cell_type == "code":
            cell.outputs, cell.execution_count = kept.outputs, kept.execution_count
    write(new, path)


def run(path: Path, preset: str) -> None:
    """Execute in an empty folder that holds the notebook and the one file; keep what it said."""
    book = nbformat.read(path, 4)
    os.environ["BITLLM_PRESET"] = preset
    with tempfile.TemporaryDirectory() as folder:
        if "one_cell" not in path.name:
            shutil.copy(ROOT / "bitllm_core.py", folder)
        where = {"metadata": {"path": folder}}
        NotebookClient(book, timeout=3600, resources=where, store_widget_state=False).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)  # of no use without its kernel
    book.metadata.pop("widgets", None)
    write(book, path)


def write(book: nbformat.NotebookNode, path: Path) -> None:
    book.metadata.pop("language_info", None)
    nbformat.validate(book)
    path.write_text(nbformat.writes(book) + "\n", encoding="utf-8", newline="\n")


def main(task: str, *names: str) -> None:
    if task == "pair":
        for source in sorted(FOLDER.glob("*.py")):
            pair(source)
        return
    if task != "run":
        raise SystemExit(f"task={task!r}: expected pair or run")
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            preset = "ci" if path.stem.startswith("03") else "demo"
            print(path.name, preset)
            run(path, os.environ.get("BITLLM_PRESET", preset))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["pair"]))
