"""Prompt box and downloads."""

import sys
import types
import zipfile
from urllib.parse import quote

import ipywidgets
import pytest

from bitllm.notebook.boxes import download_button
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
        Cell(client, "").listen_until(lambda c: c.done)
        cell.click("Write", new_subshell(client))
        cell.listen_until(lambda c: "&#x27;" in str(c.states) or "<pre" in str(c.states))


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
        cell.click("Say", new_subshell(client))
        answer = "I am &lt;b&gt;Pip&lt;/b&gt;."  # what a model writes is never markup
        cell.listen_until(lambda c: answer in str(c.states))


def test_without_widgets_one_answer_is_printed(monkeypatch, capsys):
    from bitllm.notebook import boxes

    monkeypatch.setattr(boxes, "can_chat", lambda tokenizer: True)
    monkeypatch.setattr(boxes, "Chat", lambda *a: types.SimpleNamespace(answer=str.upper))
    boxes.prompt_box(None, None)
    assert capsys.readouterr().out == "> hello\nHELLO\n"
