"""Prompt and chat boxes, exports and downloads."""

import dataclasses
import os
import sys
import time
import types
import zipfile
from pathlib import Path
from urllib.parse import quote

import ipywidgets
import pytest

import bitllm_core as bit
from bitllm.notebook import boxes
from bitllm.notebook.boxes import first_words
from bitllm.notebook.exports import _frame, download_button, export_box
from bitllm.notebook.runs import find_model
from tests import tiny
from tests.notebook.kernels import KERNELS, TRAIN, Cell, kernel, new_subshell, python_of

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.mark.parametrize("name", KERNELS)
def test_form_and_prompt_box_are_made_of_widgets_that_both_generations_have(tmp_path, name):
    with kernel(python_of(name), tmp_path) as client:
        code = 'state = go(0, max_steps=2)\nbit.SettingsPanel(bit.Settings("ci")).show()\n'
        code += 'bit.prompt_box(*bit.load_model("run"), "The")\nprint("shown")'
        cell = Cell(client, TRAIN + code).listen_until(lambda c: c.done)
        assert "shown" in cell.text, cell.text
        views = [x for x in cell.displays if "application/vnd.jupyter.widget-view+json" in x]
        assert len(views) == 3 + 2  # form, prompt box, buttons, the bars of tokenizing
        boxes = [x for x in views if "a prompt box" in x["text/plain"]]
        assert "The</span>" in boxes[0]["text/html"]  # it has answered once, also for a reader
        Cell(client, "").listen_until(lambda c: c.done)
        subshell = new_subshell(client)
        cell.states.clear()
        cell.click("Write", subshell)
        cell.listen_until(lambda c: "The</span>" in str(c.states))
        cell.click("Stop", subshell)
        cell.listen_until(lambda c: {"disabled": False} in c.states)
        cell.click("Train", subshell)  # in a thread: the kernel is free meanwhile
        cell.listen_until(lambda c: "Stop and ■" in str(c.states) or "Training" in str(c.states))
        assert "free" in Cell(client, "print('free')").listen_until(lambda c: c.done).text
        cell.listen_until(lambda c: "Done in " in str(c.states))


def test_downloads_are_offered_and_a_folder_as_a_zip(colab, tmp_path, monkeypatch, capsys):
    (tmp_path / "model-hf").mkdir()
    (tmp_path / "model-hf" / "config.json").write_text("{}")
    download_button(tmp_path / "model-hf")  # no notebook: its path
    assert str(tmp_path / "model-hf.zip") in capsys.readouterr().out
    assert zipfile.ZipFile(tmp_path / "model-hf.zip").namelist() == ["config.json"]
    asked, shown = [], []
    sys.modules["google.colab"].files = types.SimpleNamespace(download=asked.append)
    monkeypatch.setattr("bitllm.notebook.kernel.widgets", lambda: ipywidgets)
    monkeypatch.setattr("IPython.display.display", lambda x, **options: shown.append(x))
    download_button(tmp_path / "model-hf.zip")
    assert not asked  # Run all downloads nothing by itself
    shown[0].click()
    assert asked == [str(tmp_path / "model-hf.zip")]
    del sys.modules["google.colab"].files
    download_button(tmp_path / "model-hf.zip")
    assert 'model-hf.zip" download' in shown[1]["text/html"]
    name = tmp_path / 'my "50%" & more#1.txt'
    download_button(name)
    assert 'href="' + quote(name.as_posix()) + '" download>' in shown[2]["text/html"]
    assert "my &quot;50%&quot; &amp; more#1.txt</a>" in shown[2]["text/html"]


TALK = """
import json, pathlib
turn = lambda role, text: {"role": role, "content": text}
rows = [[turn("user", "hello"), turn("assistant", "I am <b>Pip</b>.")]] * 200
pathlib.Path("talk.jsonl").write_text("".join(json.dumps({"messages": r}) + "\\n" for r in rows))
config = bit.TrainConfig(120, 256, eval_every_steps=0, compile="off", warmup_steps=2)
bit.train(tiny.MODEL, bit.DataConfig("talk.jsonl"), config, "talk", callbacks=[])
bit.prompt_box(*bit.load_model("talk"), "hello")
print("shown")
"""


@pytest.mark.parametrize("name", KERNELS)
def test_a_model_that_talks_has_a_box_with_its_history(tmp_path, name):
    with kernel(python_of(name), tmp_path) as client:
        cell = Cell(client, TRAIN + "from tests import tiny\n" + TALK)
        cell.listen_until(lambda c: c.done)
        assert "shown" in cell.text, cell.text
        Cell(client, "").listen_until(lambda c: c.done)
        answer = "I am &lt;b&gt;Pip&lt;/b&gt;."  # what a model writes is never markup
        assert any(answer in x.get("text/html", "") for x in cell.displays)
        cell.states.clear()
        cell.fill("Say something", "hello")
        cell.click("Say", new_subshell(client))
        cell.listen_until(lambda c: str(c.states[-9:]).count(answer) > 1)


def test_without_widgets_one_answer_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(boxes, "can_chat", lambda tokenizer: True)
    monkeypatch.setattr(boxes, "Chat", lambda *a: types.SimpleNamespace(answer=str.upper))
    boxes.prompt_box(None, None)
    assert capsys.readouterr().out == "> hello\nHELLO\n"


def test_a_prompt_is_the_beginning_of_the_validation_text(tmp_path, tiny_corpus):
    assert first_words(tmp_path, None) == "The"
    tokenizer = train_run(tmp_path, tiny_corpus)
    assert first_words(tmp_path / "run", tokenizer) == "cats sat on"


def train_run(folder, text):
    config = dataclasses.replace(tiny.TRAIN, max_steps=2)
    bit.train(tiny.MODEL, bit.DataConfig(str(text)), config, folder / "run", callbacks=[])
    return bit.load_tokenizer(folder / "run" / "tokenizer.json")


def test_a_space_at_the_end_of_a_prompt_is_no_token_of_its_own(tmp_path, tiny_corpus, monkeypatch):
    train_run(tmp_path, tiny_corpus)
    monkeypatch.setattr("bitllm.notebook.kernel.widgets", lambda: ipywidgets)
    given = []
    monkeypatch.setattr(boxes, "stream", lambda m, t, prompt, s: given.append(prompt) or [" mats"])
    box = boxes._PromptBox(*bit.load_model(tmp_path / "run"), "cats sat on ")
    assert given == ["cats sat on"]
    assert "cats sat on </span>mats" in box.answer.value


def test_buttons_export_and_offer_the_file(tmp_path, tiny_corpus, monkeypatch):
    train_run(tmp_path, tiny_corpus)
    monkeypatch.setattr("bitllm.notebook.kernel.widgets", lambda: ipywidgets)
    shown = []
    monkeypatch.setattr("bitllm.notebook.kernel.show", lambda widget, text: shown.append(widget))
    export_box(tmp_path / "run")
    *rows, out = shown[0].children
    buttons = {row.children[0].description: row.children[0] for row in rows}
    assert list(buttons) == ["Web page", "GGUF", "transformers", "Small file"]
    for name, said in {
        "Small file": "Download run.safetensors</a> (0.",
        "GGUF": "multiple of",
    }.items():
        buttons[name].click()
        end = time.monotonic() + 60
        while buttons[name].disabled or not out.outputs:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert said in out.outputs[0]["data"]["text/html"]
    assert 'src="exports/a%20b.html"' in _frame(Path("exports/a b.html"))


def test_the_newest_model_is_found_wherever_it_was_left(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert find_model() is None
    for number, place in enumerate(("../runs/cli", "runs/mine", "drive/far")):
        checkpoints = Path(place, "checkpoints")
        checkpoints.mkdir(parents=True)
        (checkpoints / "step_00000009.safetensors").touch()
        os.utime(place, (number, number))
    assert find_model() == Path("runs/mine")
    assert find_model("", Path("drive")) == Path("drive/far")
    assert find_model("../runs/cli") == Path("../runs/cli")
    Path("models").mkdir()
    Path("models/x.safetensors").touch()
    assert find_model() == Path("models/x.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere: nothing there"):
        find_model("nowhere")
