"""The live display, its buttons, and the curve of a run on disk."""

import base64
import dataclasses
import sys

import pytest

import bitllm_core as bit
from bitllm.notebook.display import LiveDisplay
from bitllm.notebook.runs import newest_run, show_run
from bitllm.notebook.settings import Settings
from tests.notebook.kernels import KERNELS, TRAIN, Cell, kernel, new_subshell, python_of

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_without_a_notebook_the_display_is_a_progress_bar(tmp_path, tiny_corpus, capsys):
    model, data, train = Settings("ci", data=str(tiny_corpus)).configs()
    train = dataclasses.replace(train, max_steps=2)
    bit.train(model, data, train, "run", callbacks=[LiveDisplay("run")])
    assert "2/2" in capsys.readouterr().err
    show_run("run")
    assert "step 2 of 2, loss" in capsys.readouterr().out
    assert newest_run(".").name == "run"
    assert newest_run("none") is None
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        show_run("none")


def test_the_display_in_a_kernel_and_after_it_died(tmp_path):
    with kernel(sys.executable, tmp_path) as client:
        Cell(client, TRAIN + "go(20)").listen_until(lambda c: c.done)
    with kernel(sys.executable, tmp_path) as client:  # the first one was killed
        cell = Cell(client, TRAIN + "go(30)\nprint(len(display.lines), display.buttons)")
        cell.listen_until(lambda c: c.done)
        assert "from step 20" in cell.text
        card = cell.displays[-1]
        page = card["text/html"]
        assert "step <b>30 of 40</b>" in page
        assert "mirror <b>&lt;failing&gt; since 14:02</b>" in page
        assert "saved; run this cell again to resume" in page
        assert "last save <b>step 30 at " in page
        figure = base64.b64decode(page.split("base64,")[1].split('"')[0])
        assert figure.startswith(b"\x89PNG")
        assert "6 {" not in cell.text  # 6 training lines and an evaluation
        assert "7 {'Stop'" in cell.text
        shown = Cell(client, "bit.show_run('run')").listen_until(lambda c: c.done)
        assert "step 30 of 40, loss" in shown.displays[0]["text/plain"]
        assert base64.b64decode(shown.displays[0]["image/png"]).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", KERNELS)
def test_buttons_work_while_the_cell_runs(tmp_path, name):
    with kernel(python_of(name), tmp_path) as client:
        subshell = new_subshell(client)
        assert (subshell is None) == (name == "colab")
        run = 'state = go(0, max_steps=5000, eval_every_steps=500, compile="off")\n'
        end = 'print("came to", state.step, "saved", bit.saved_step("run"))'
        cell = Cell(client, TRAIN.replace("else 0", "else state.stop_signal") + run + end)
        cell.listen_until(lambda c: len(c.displays) > 3)
        client.execute("print('the cell', 'below')")  # as run all sends it
        cell.click("Save now", subshell)
        cell.listen_until(lambda c: "last save" in c.displays[-1].get("text/plain", ""))
        cell.click("Pause", subshell)
        cell.listen_until(lambda c: "paused" in c.displays[-1].get("text/plain", ""))
        assert not cell.done
        cell.click("Pause", subshell)
        cell.listen_until(lambda c: "paused" not in c.displays[-1].get("text/plain", ""))
        cell.click("Stop", subshell)
        cell.listen_until(lambda c: c.done)
        came_to = int(cell.text.split("came to ")[1].split()[0])
        assert 0 < came_to < 5000
        assert f"came to {came_to} saved {came_to}" in cell.text
        cell.listen_until(lambda c: "the cell below" in c.text)


BROKEN = """
import bitllm.notebook.display
def broken(lines):
    raise RuntimeError("no fonts")
After.on_start = lambda self, state: setattr(bitllm.notebook.display, "run_figure", broken)
print("came to", go(0, max_steps=4).step)
"""


def test_a_display_that_cannot_be_drawn_does_not_end_the_training(tmp_path):
    with kernel(sys.executable, tmp_path) as client:
        cell = Cell(client, TRAIN + BROKEN).listen_until(lambda c: c.done)
    assert "display: not drawn (RuntimeError: no fonts)" in cell.text
    assert "came to 4" in cell.text
