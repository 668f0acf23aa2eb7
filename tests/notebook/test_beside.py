"""Two models side by side."""

import dataclasses
import html
import re
import string
import time

import ipywidgets
import pytest

import bitllm_core as bit
from bitllm.chat import SAMPLING, Chat
from bitllm.notebook.beside import compare
from tests import tiny

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_corpus):
    """A run of a text with steps 9 and 12 kept, and one of conversations."""
    folder = tmp_path_factory.mktemp("runs")
    bit.train(
        tiny.MODEL, bit.DataConfig(str(tiny_corpus)), tiny.TRAIN, folder / "text", callbacks=[]
    )
    rows = '{"messages": [{"role": "user", "content": "hello"}, '
    rows += '{"role": "assistant", "content": "hello to you"}]}\n'
    (folder / "talk.jsonl").write_text(rows * 200)
    config = dataclasses.replace(tiny.TRAIN, max_steps=3)
    model = dataclasses.replace(tiny.MODEL, max_position_embeddings=64)
    data = bit.DataConfig(str(folder / "talk.jsonl"))
    bit.train(model, data, config, folder / "talk", callbacks=[])
    return folder


@pytest.fixture
def shown(monkeypatch):
    found = []
    monkeypatch.setattr("bitllm.notebook.kernel.widgets", lambda: ipywidgets)
    monkeypatch.setattr(
        "bitllm.notebook.kernel.show", lambda widget, text, page: found.append(widget)
    )
    return found


def said(column):
    """What a column shows, without its title."""
    return html.unescape(re.sub(r"<[^>]+>", "", column.value.partition("</b>")[2]))


def test_the_earliest_step_and_the_newest_answer_the_same_words(runs, shown):
    sampling = dataclasses.replace(SAMPLING, temperature=0, seed=0)
    models = [bit.load_model(runs / "text", step) for step in (9, "last")]
    answers = {p: [p + bit.generate(*m, p, sampling) for m in models] for p in string.ascii_letters}
    prompt = next(p for p, (early, late) in answers.items() if early != late)
    compare(runs / "text", prompt=prompt)
    columns, text, buttons, _ = shown[0].children
    assert "text, step 9<" in columns.children[0].value
    assert "text, the newest step<" in columns.children[1].value
    assert [said(column) for column in columns.children] == answers[prompt]
    text.value = "mats"
    buttons.children[0].click()
    end = time.monotonic() + 60
    while not (said(columns.children[1]).startswith("mats") and not buttons.children[0].disabled):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert said(columns.children[0]).startswith("mats")
    buttons.children[2].click()
    assert [said(column) for column in columns.children] == ["", ""]


def test_base_and_companion_each_keep_a_history_of_their_own(runs, shown):
    compare(runs / "talk", str(runs / "text"))
    talk, text = shown[0].children[0].children
    talks = Chat(*bit.load_model(runs / "talk"))
    talks.sampling = dataclasses.replace(SAMPLING, temperature=0, seed=0)
    assert said(talk) == "hello" + talks.answer("hello")
    assert said(text).startswith("hello")
    assert "background:" in talk.value  # bubbles
    assert "background:" not in text.value


def test_without_widgets_both_answers_are_printed(runs, capsys):
    compare(runs / "text", "12", "cats")
    first, second = (x for x in capsys.readouterr().out.split("text, ") if x)
    sampling = dataclasses.replace(SAMPLING, temperature=0, seed=0)
    answer = bit.generate(*bit.load_model(runs / "text"), "cats", sampling)
    assert first == f"step 12: cats{answer}\n"
    assert second == f"the newest step: cats{answer}\n"


@pytest.mark.parametrize(
    ("second", "says"), [("", "has kept one step; give another run"), ("nowhere", "nowhere: no")]
)
def test_where_there_is_no_second_model_a_line_says_so(runs, capsys, second, says):
    compare(runs / "talk", second)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("nothing to compare: ")
    assert says in line
