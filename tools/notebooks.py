"""Bring the notebooks up to date: pair them with their sources, or run them and keep the outputs.

python tools/notebooks.py pair                    # after editing notebooks/*.py
python tools/notebooks.py run [NAME ...]          # in one empty folder, demo preset; some minutes
python tools/notebooks.py run 02_use --in FOLDER  # in a folder that has runs/ already
"""

import argparse
import base64
import contextlib
import os
import re
import shutil
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
        for name in re.findall(r"\(attachment:([\w.]+)\)", cell.source):  # shown without a network
            picture = base64.b64encode((ROOT / "docs" / name).read_bytes()).decode()
            cell.attachments = {name: {"image/png": picture}}
        cell.id = f"{source.stem.split('_')[0]}-{number:02}"
        kept = before.get((cell.cell_type, cell.source))
        if kept is not None and cell.cell_type == "code":
            cell.outputs, cell.execution_count = kept.outputs, kept.execution_count
    write(new, path)


def run(path: Path, folder: str) -> None:
    """Execute in a folder, and keep the outputs."""
    book = nbformat.read(path, 4)
    where = {"metadata": {"path": folder}}
    NotebookClient(book, timeout=3600, resources=where, store_widget_state=False).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times
        kept = []
        for output in cell.get("outputs", []):
            widget = output.get("data", {}).pop(WIDGET, None)  # of no use without its kernel
            if not (widget and re.search(r"\[\d\d:\d\d", output.data["text/plain"])):  # a bar
                kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
    book.metadata.pop("widgets", None)
    write(book, path)


def write(book: nbformat.NotebookNode, path: Path) -> None:
    book.metadata.pop("language_info", None)
    nbformat.validate(book)
    path.write_text(nbformat.writes(book) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("pair", "run"))
    parser.add_argument("names", nargs="*", help="default: all but the one-cell notebook")
    parser.add_argument("--in", dest="folder", help="default: an empty one")
    flags = parser.parse_args()
    sources = sorted(FOLDER.glob("*.py"))
    if flags.task == "pair":
        for source in sources:
            pair(source)
        return
    os.environ.setdefault("BITLLM_PRESET", "demo")
    with contextlib.ExitStack() as stack:
        folder = flags.folder or stack.enter_context(tempfile.TemporaryDirectory())
        shutil.copy(ROOT / "bitllm_core.py", folder)
        shutil.copytree(ROOT / "bitllm", Path(folder) / "bitllm", dirs_exist_ok=True)
        for name in flags.names or [source.stem for source in sources]:  # 02 uses what 01 leaves
            run(FOLDER / f"{name}.ipynb", folder)


if __name__ == "__main__":
    main()
