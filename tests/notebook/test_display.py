"""The live display, its buttons, and the curve of a run on disk."""

import base64
import dataclasses
import re
import sys
import types

import pytest

import bitllm_core as bit
from bitllm.notebook.display import LiveDisplay
from bitllm.notebook.runs import newest_run, show_run
from bitllm.notebook.settings import Settings
from tests import tiny
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
        card, folded = cell.displays[-2:]
        page = card["text/html"]
        assert folded["text/html"].startswith("<details")
        assert "Stopped at step 30 of 40, saved in run. To resume, run this cell again." in page
        assert "mirror &lt;failing&gt; since 14:02" in page
        assert "last save step 30 at " in page
        assert "what it says at step 30" in page
        assert "what it says at step 5<" in page  # of the first session
        figure = base64.b64decode(page.split("base64,")[1].split('"')[0])
        assert figure.startswith(b"\x89PNG")
        assert "8 {'Stop'" in cell.text  # 6 training lines, an evaluation, and one at the stop
        shown = Cell(client, "bit.show_run('run')").listen_until(lambda c: c.done)
        assert "step 30 of 40, loss" in shown.displays[0]["text/plain"]
        assert "base64," in shown.displays[0]["text/html"]
        assert "what it says at step 5<" in shown.displays[0]["text/html"]
        lines = len(bit.MetricsLog.read(tmp_path / "run" / "metrics.jsonl"))
        code = "state = go(0)\ndisplay.show_end(state)\nstate = go(0)\ndisplay.show_end(state)"
        ends = Cell(client, code).listen_until(lambda c: c.done)
        heads = [x["text/plain"] for x in ends.displays if "text/plain" in x]
        assert re.search(r"Done in \d+ s. Perplexity [\d.]+ \(random guessing: 512\)", str(heads))
        assert "Complete already: 40 steps, in run." in heads[-2]
        assert lines == 7  # the evaluation at a stop is for the eyes alone


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
        cell.listen_until(lambda c: "last save step" in c.displays[-1].get("text/plain", ""))
        cell.click("Pause", subshell)
        cell.listen_until(lambda c: "Paused" in c.displays[-1].get("text/plain", ""))
        assert not cell.done
        cell.click("Pause", subshell)
        cell.listen_until(lambda c: "Paused" not in c.displays[-1].get("text/plain", ""))
        cell.click("Stop", subshell)
        cell.listen_until(lambda c: c.done)
        came_to = int(cell.text.split("came to ")[1].split()[0])
        assert 0 < came_to < 5000
        assert f"came to {came_to} saved {came_to}" in cell.text
        cell.listen_until(lambda c: "the cell below" in c.text)


BROKEN = """
import bitllm.notebook.card
def broken(*lines):
    raise RuntimeError("no fonts")
After.on_start = lambda self, state: setattr(bitllm.notebook.card, "loss_figure", broken)
print("came to", go(0, max_steps=4).step)
"""


def test_a_display_that_cannot_be_drawn_does_not_end_the_training(tmp_path):
    with kernel(sys.executable, tmp_path) as client:
        cell = Cell(client, TRAIN + BROKEN).listen_until(lambda c: c.done)
    assert "display: not drawn (RuntimeError: no fonts)" in cell.text
    assert "came to 4" in cell.text


def test_drawings_and_samples_take_two_percent_of_the_time(tmp_path, monkeypatch):
    """By a clock that steps, drawings and samples move."""
    now, spent = [0.0], {"drawing": 0.0, "sample": 0.0}

    def take(what, seconds):
        now[0] += seconds
        spent[what] += seconds

    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("bitllm.notebook.display.time", clock)
    display = LiveDisplay(tmp_path)
    display.progress_bar, display.poll = None, lambda: None
    display.handle = types.SimpleNamespace(update=lambda page, raw: take("drawing", 0.3))
    monkeypatch.setattr(display, "_card", lambda state: {})

    def sample(state):
        take("sample", 0.7)
        display.samples.add(state.step, [])

    monkeypatch.setattr(display.samples, "take", sample)
    config = dataclasses.replace(tiny.TRAIN, max_steps=2000)
    state = types.SimpleNamespace(config=config, paused=False, stop_signal=0)
    for state.step in range(1, 2001):
        now[0] += 0.1
        display.on_step(state, {"step": state.step, "loss": 1.0} if state.step % 10 == 0 else None)
    assert 0.3 * 2 <= spent["drawing"] <= 0.007 * now[0] + 0.3 * 2  # the first at once
    assert 0.7 * 2 <= spent["sample"] <= 0.007 * now[0] + 0.7
