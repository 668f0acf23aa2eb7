"""The notebooks: paired, clean, run on both kernel generations, and pointing to one place."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import jupytext
import nbformat
import pytest

import bitllm_core as bit
from tests.conftest import ROOT
from tests.kernels import KERNELS, python_of

FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
BOOKS = sorted(FOLDER.glob("*.ipynb"))
RUNS = {
    "01_train": ["ci"],
    "02_use": ["ci"],
    "03_inside_ternary": ["inside-ternary", "inside-dense"],
    "bitllm_one_cell": ["ci"],
}
"""Notebook -> the runs it trains in an empty folder"""


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_notebook_for_each_source_and_the_one_cell():
    assert sorted(RUNS) == [path.stem for path in BOOKS]
    assert [path.stem for path in SOURCES] == [n for n in sorted(RUNS) if n[0].isdigit()]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_pairs_are_in_sync(source):
    here, there = jupytext.read(source), nbformat.read(source.with_suffix(".ipynb"), 4)
    cells = [[(cell.cell_type, cell.source) for cell in book.cells] for book in (here, there)]
    assert cells[0] == cells[1], "run: python tools/notebooks.py pair"


@pytest.mark.parametrize("book", BOOKS, ids=lambda path: path.stem)
def test_metadata_selects_a_t4_and_outputs_are_clean(book):
    text = book.read_text(encoding="utf-8")
    metadata = nbformat.reads(text, 4).metadata
    assert metadata.accelerator == "GPU"
    assert metadata.colab.gpuType == "T4"
    assert "widgets" not in metadata
    assert "widget-view" not in text
    paths = re.findall(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|opt)/[\w./-]*", text)
    assert not paths
    assert not re.search(r"[A-Z]:\\\\Users", text)


@pytest.mark.parametrize("name", [name for name in RUNS if name[0].isdigit()])
def test_committed_outputs_are_of_a_whole_run(name):
    book = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [x for x in outputs if x.output_type == "error"]
    assert [x for x in outputs if "image/png" in x.get("data", {})] or name == "02_use"


def test_the_one_cell_notebook_is_what_its_builder_builds():
    built = tool("build_one_cell").build()
    message = "run: python tools/build_one_cell.py"
    assert built == (FOLDER / "bitllm_one_cell.ipynb").read_text(encoding="utf-8"), message


def nbval(python, folder, name):
    """Outcome of each cell of a notebook in `folder`, run by pytest and nbval."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax"]
    command += ["--nbval-cell-timeout=240", "--junit-xml=report.xml", f"{name}.ipynb"]
    environment = {**os.environ, "BITLLM_PRESET": "ci", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
    suite = ET.parse(folder / "report.xml").getroot().find("testsuite")
    return {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", RUNS)
def test_run_all_in_an_empty_folder(tmp_path, name, kernel):
    python = python_of(kernel)
    shutil.copy(FOLDER / f"{name}.ipynb", tmp_path)
    if name != "bitllm_one_cell":
        shutil.copy(ROOT / "bitllm_core.py", tmp_path)
    outcome = nbval(python, tmp_path, name)
    cells = nbformat.read(tmp_path / f"{name}.ipynb", 4).cells
    # nbval shows a cell after one that timed out as skipped (xfail), and is content
    assert outcome == {
        "tests": sum(cell.cell_type == "code" for cell in cells),
        "failures": 0,
        "errors": 0,
        "skipped": 0,
    }
    for run in RUNS[name]:
        lines = bit.MetricsLog.read(tmp_path / "runs" / run / "metrics.jsonl")
        assert lines[-1]["final"]


def test_the_check_sees_a_training_that_did_not_finish(tmp_path):
    """The guard above is needed: nbval alone is content with an interrupted training."""
    book = nbformat.read(FOLDER / "01_train.ipynb", 4)
    for cell in book.cells:
        cell.source = cell.source.replace(
            "display = bit.LiveDisplay(run)",
            "display = bit.LiveDisplay(run)\n"
            "display.on_eval = lambda state, metrics: setattr(state, 'stop_signal', 2)",
        )
    nbformat.write(book, tmp_path / "stopped.ipynb")
    shutil.copy(ROOT / "bitllm_core.py", tmp_path)
    with pytest.raises(AssertionError, match="stopped at step 20 of 40"):
        nbval(sys.executable, tmp_path, "stopped")


def test_set_up_says_what_to_do_without_file_and_repository(tmp_path):
    book = nbformat.read(FOLDER / "01_train.ipynb", 4)
    cell = next(cell for cell in book.cells if "REPOSITORY" in cell.source)
    code = cell.source.replace("https://", "http://127.0.0.1:9/")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "upload that one file" in done.stderr
    assert "bitllm_one_cell.ipynb" in done.stderr
    assert not list(tmp_path.iterdir())


def test_all_places_name_one_repository():
    places = tool("set_repository")
    found = {path.name: places.named(path.read_text(encoding="utf-8")) for path in places.files()}
    assert all(found.values()), found
    assert len({place for several in found.values() for place in several}) == 1, found


def test_the_set_up_cell_is_the_same_in_every_notebook():
    cells = {
        next(cell.source for cell in jupytext.read(path).cells if "REPOSITORY" in cell.source)
        for path in SOURCES
    }
    assert len(cells) == 1


def test_a_fork_points_all_places_to_itself():
    places = tool("set_repository")
    for path in places.files():
        old = path.read_text(encoding="utf-8")
        new = places.renamed(old, "some-one/my.fork", "dev/x")
        assert set(places.named(new)) == {("some-one/my.fork", "dev/x")}
        assert len(places.named(new)) == len(places.named(old))
        back = places.named(old)[0]
        assert places.renamed(new, *back) == old
