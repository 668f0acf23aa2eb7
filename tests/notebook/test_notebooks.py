"""The notebooks: paired, clean, run on both kernel generations, and pointing to one place."""

import importlib.util
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import jupytext
import nbformat
import pytest

import bitllm
import bitllm_core as bit
from tests import warm
from tests.conftest import ROOT
from tests.notebook.kernels import KERNELS, put_package, python_of, shorten_companion

FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
BOOKS = sorted(FOLDER.glob("*.ipynb"))
RUNS = {
    "01_entrenar": ["ci-companion-es"],
    "01_train": ["ci"],
    "02_use": ["ci-companion"],
    "03_inside_ternary": ["inside-ternary", "inside-dense"],
    "bitllm_one_cell": ["ci"],
    "kaggle_train": ["ci"],
}
"""Notebook -> the runs it trains in an empty folder"""


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_notebook_for_each_source_and_the_one_cell():
    assert sorted(RUNS) == [path.stem for path in BOOKS]
    assert [path.stem for path in SOURCES] == [n for n in sorted(RUNS) if "one_cell" not in n]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_pairs_are_in_sync(source):
    here, there = jupytext.read(source), nbformat.read(source.with_suffix(".ipynb"), 4)
    cells = [[(cell.cell_type, cell.source) for cell in book.cells] for book in (here, there)]
    assert cells[0] == cells[1], "run: python tools/notebooks.py pair"
    for cell in there.cells:
        named = re.findall(r"\(attachment:([\w.]+)\)", cell.source)
        assert list(cell.get("attachments", {})) == named  # a picture that needs no network


@pytest.mark.parametrize("book", BOOKS, ids=lambda path: path.stem)
def test_metadata_selects_a_t4_and_outputs_are_clean(book):
    text = book.read_text(encoding="utf-8")
    metadata = nbformat.reads(text, 4).metadata
    assert metadata.accelerator == "GPU"
    assert metadata.colab.gpuType == "T4"
    assert "widgets" not in metadata
    outputs = [cell.get("outputs") for cell in nbformat.reads(text, 4).cells]
    assert "widget-view" not in str(outputs)
    paths = re.findall(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|opt)/[\w./-]*", text)
    assert not paths
    assert not re.search(r"[A-Z]:\\\\Users", text)


@pytest.mark.parametrize("name", [path.stem for path in SOURCES])
def test_committed_outputs_are_of_a_whole_run(name):
    book = nbformat.read(FOLDER / f"{name}.ipynb", 4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [x for x in outputs if x.output_type == "error"]
    data = [output.get("data", {}) for output in outputs]
    pictures = [x for x in data if "image/png" in x or "base64," in x.get("text/html", "")]
    assert pictures or name == "02_use"
    of_widgets = re.compile(r"\w+Box\(|.*\[\d\d:\d\d")  # a form, a progress bar
    assert not [x for x in data if of_widgets.match(x.get("text/plain", ""))]


@pytest.mark.parametrize("name", [path.stem for path in SOURCES] + ["the one cell"])
def test_every_name_a_notebook_takes_from_the_package_is_there(name):
    """Some cells run only with a tick, so running all does not see every name."""
    path = FOLDER / f"{name}.py"
    source = path.read_text(encoding="utf-8") if path.exists() else tool("build_one_cell").LAUNCHER
    names = set(re.findall(r"\bbit\.(\w+)", source))
    assert names
    assert not {name for name in names if not hasattr(bitllm, name)}


def test_the_one_cell_notebook_is_what_its_builder_builds():
    built = tool("build_one_cell").build()
    message = "run: python tools/build_one_cell.py"
    assert built == (FOLDER / "bitllm_one_cell.ipynb").read_text(encoding="utf-8"), message


RUN_NBVAL = str(Path(__file__).with_name("run_nbval.py"))


def nbval(python, folder, name):
    """Outcome of each cell of a notebook in `folder`, run by pytest and nbval."""
    command = [python, RUN_NBVAL, "-q", "-p", "no:cacheprovider", "--nbval-lax"]
    command += ["--nbval-cell-timeout=240", "--junit-xml=report.xml", f"{name}.ipynb"]
    environment = {**os.environ, "BITLLM_PRESET": "ci", "OMP_NUM_THREADS": "1"}
    environment["BITLLM_MUST_FINISH"] = "1"  # elsewhere a stop is no error
    environment.pop("PYTHONPATH", None)
    done = warm.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
    suite = ET.parse(folder / "report.xml").getroot().find("testsuite")
    return {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}


def test_the_spanish_notebook_runs_what_the_english_one_runs():
    books = [jupytext.read(FOLDER / f"{name}.py") for name in ("01_train", "01_entrenar")]
    english, spanish = ([c.source for c in book.cells if c.cell_type == "code"] for book in books)
    changed = {
        "SettingsPanel.kept()": 'SettingsPanel.kept(bit.Settings(data="companion:es"))',
        "bit.log_to": 'bit.speak("es")\nbit.log_to',
        "@title Set up": "@title Preparar",
        "@title Start": "@title Empezar",
        "@title Settings": "@title Ajustes",
        "(optional)": "(opcional)",
        "Check this GPU: tick the box and run this cell (10 minutes)": (
            "Comprobar esta GPU: marca la casilla y ejecuta esta celda (10 minutos)"
        ),
    }
    for old, new in changed.items():
        english = [source.replace(old, new) for source in english]
    assert spanish == english
    assert [cell.cell_type for cell in books[0].cells] == [c.cell_type for c in books[1].cells]


OTHERWISE = [  # what of all notebooks on all kernels another test runs there
    ("01_entrenar", "colab"),  # its code is that of 01_train,
    ("01_train", "newest"),  # and there of 01_entrenar
    ("bitllm_one_cell", "newest"),  # with a model that answers
    ("kaggle_train", "newest"),  # in two sessions
    ("03_inside_ternary", "newest"),  # where its outputs come from; only its figures are its own
]
WHERE = [(name, kernel) for name in RUNS for kernel in KERNELS if (name, kernel) not in OTHERWISE]


@pytest.mark.parametrize(("name", "kernel"), WHERE)
def test_run_all_in_an_empty_folder(tmp_path, name, kernel):
    python = python_of(kernel)
    shutil.copy(FOLDER / f"{name}.ipynb", tmp_path)
    if name != "bitllm_one_cell":
        put_package(tmp_path)
    if name in ("01_entrenar", "02_use"):
        shorten_companion(tmp_path)
    if name == "03_inside_ternary":
        path = tmp_path / f"{name}.ipynb"
        text = path.read_text(encoding="utf-8")
        for long, short in (
            ("max_steps=100", "max_steps=10"),
            ("hidden_size=256", "hidden_size=64"),
        ):
            assert text.count(long) == 1
            text = text.replace(long, short)
        path.write_text(text, encoding="utf-8")
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


def test_a_model_that_answers_gets_a_chat(tmp_path):
    """In the one cell, whose run all has one that continues a text, in seconds."""
    book = nbformat.read(FOLDER / "bitllm_one_cell.ipynb", 4)
    cell = book.cells[-1]
    for old, new in {
        'data = "" ': 'data = "companion" ',
        'persona = "" ': 'persona = "name=Luna" ',
        '"train": 20_000': '"train": 2_000',
    }.items():
        assert cell.source.count(old) == 1
        cell.source = cell.source.replace(old, new)
    nbformat.write(book, tmp_path / "talk.ipynb")
    outcome = nbval(sys.executable, tmp_path, "talk")
    assert outcome["failures"] == outcome["errors"] == outcome["skipped"] == 0
    config = bit.read_json(next(tmp_path.glob("runs/*/config.json")))
    assert config["data"]["persona"] == "name=Luna"


def test_the_check_sees_a_training_that_did_not_finish(tmp_path):
    """The guard above is needed: nbval alone is content with an interrupted training."""
    book = nbformat.read(FOLDER / "01_train.ipynb", 4)
    for cell in book.cells:
        cell.source = cell.source.replace(
            "display = bit.LiveDisplay(run)",
            "display = bit.LiveDisplay(run)\n"
            "display.on_eval = lambda state, metrics: setattr(state, 'stop_signal', 2)",
        )
    training = next(n for n, cell in enumerate(book.cells) if "bit.train(" in cell.source)
    del book.cells[training + 1 :]
    nbformat.write(book, tmp_path / "stopped.ipynb")
    put_package(tmp_path)
    with pytest.raises(AssertionError, match="Stopped at step 20 of 40"):
        nbval(sys.executable, tmp_path, "stopped")


INTERRUPT = """
import signal, threading
begun = len(bit.read_metrics(run))
def press():
    while len(bit.read_metrics(run)) == begun:
        time.sleep(0.2)
    os.killpg(os.getpgid(0), signal.SIGINT)  # as Jupyter does it
threading.Thread(target=press, daemon=True).start()
bit.watch("""
"""The ■ button, pressed when the session has come to its first line."""
LATE = """
def late():
    while not bit.read_metrics(run):
        time.sleep(0.2)
    limit.function()
limit.start = threading.Thread(target=late, daemon=True).start
limit.start()"""
"""The time limit, reached when the session has come to its first line."""


def kaggle_session(session, *changes):
    """Run the Kaggle notebook on two processes in `session`/working, changed as a user would."""
    book = nbformat.read(FOLDER / "kaggle_train.ipynb", 4)
    for old, new in (("gpus = 0 ", "gpus = 2 "), ("max_steps = 0 ", "max_steps = 5000 "), *changes):
        assert sum(old in cell.source for cell in book.cells if cell.cell_type == "code") == 1
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.source = cell.source.replace(old, new)
    (session / "working").mkdir(parents=True)
    put_package(session / "working")
    nbformat.write(book, session / "working" / "kaggle_train.ipynb")
    outcome = nbval(sys.executable, session / "working", "kaggle_train")
    assert outcome["failures"] == outcome["errors"] == outcome["skipped"] == 0
    run = session / "working" / "runs" / "ci"
    newest = bit.newest_checkpoint(run / "checkpoints")
    told = run.with_suffix(".log").read_text(encoding="utf-8")
    assert f"stopped at step {newest['step']} of 5000; saved" in told
    assert newest["processes"] == 2
    return run, newest["step"], told


def test_on_kaggle_the_next_version_resumes_from_the_output_of_the_last(tmp_path):
    """The time limit ends the first session, a click the second; the notebook runs to its end."""
    run, step, _ = kaggle_session(tmp_path / "one", ("limit.start()", LATE))
    lines = bit.MetricsLog.read(run / "metrics.jsonl")
    (tmp_path / "two" / "input").mkdir(parents=True)
    older = tmp_path / "two" / "input" / "older" / "runs" / "ci" / "checkpoints"
    older.mkdir(parents=True)
    (older / "step_00000001.safetensors").write_bytes(b"")
    (tmp_path / "one" / "working").rename(tmp_path / "two" / "input" / "my-notebook")
    again, further, told = kaggle_session(tmp_path / "two", ("bit.watch(", INTERRUPT))
    assert f"from step {step} of 5000" in told
    assert further > step
    assert bit.MetricsLog.read(again / "metrics.jsonl")[: len(lines)] == lines
    assert (tmp_path / "two" / "working" / "exports" / "ci.safetensors").is_file()


def test_all_places_name_one_repository():
    places = tool("set_repository")
    found = {path.name: places.named(path.read_text(encoding="utf-8")) for path in places.files()}
    assert all(found.values()), found
    assert len({place for several in found.values() for place in several}) == 1, found


def test_every_notebook_has_a_badge():
    text = (ROOT / "colab_badge.md").read_text(encoding="utf-8")
    for path in BOOKS:
        assert re.search(rf"\]\(https://\S+/{path.name}\) \|$", text, re.MULTILINE), path.name
    for name in ("README.md", "README.es.md", "colab_badge.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert text.count("kaggle_train.ipynb)") == text.count("](https://kaggle.com/kernels/") == 1


def test_a_fork_points_all_places_to_itself():
    places = tool("set_repository")
    for path in places.files():
        old = path.read_text(encoding="utf-8")
        new = places.renamed(old, "some-one/my.fork", "dev/x")
        assert set(places.named(new)) == {("some-one/my.fork", "dev/x")}
        assert len(places.named(new)) == len(places.named(old))
        back = places.named(old)[0]
        assert places.renamed(new, *back) == old
    readme = places.renamed((ROOT / "README.md").read_text(encoding="utf-8"), "me/mine", "main")
    assert "git clone https://github.com/me/mine && " in readme
    assert "](https://me.github.io/mine/)" in readme
    assert "OWNER" not in readme
