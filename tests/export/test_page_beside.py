"""A page with two models: each answers as it does here, in a column of its own."""

import re

import pytest

import bitllm_core as bit
from bitllm import chat
from bitllm.export import export_html, export_packed
from bitllm.export.common import FORMATS
from bitllm.export.webpage import FOLDER_FILES
from tests.export.helpers import SOUNDS, train_tiny
from tests.export.test_page import FITS, SHOTS, outside
from tools import page_in_browsers as drive

GREEDY = bit.SamplingConfig(temperature=0, max_new_tokens=12)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory):
    """A dense model that continues a text, whose lines it knows by heart."""
    folder = tmp_path_factory.mktemp("dense")
    lines = [
        f"hello {a}. what does a {a} say? A {a} says {b}.\nand a cow? no.\n"
        for a, b in SOUNDS.items()
    ]
    (folder / "text.txt").write_text("".join(lines) * 100, encoding="utf-8")
    out = folder / "dense"
    model = bit.ModelConfig(300, 256, 256, 1, 4, 2, 128, linear="dense")
    config = bit.TrainConfig(
        80, 1024, compile="off", eval_every_steps=0, save_every_steps=40, warmup_steps=4
    )
    bit.train(model, bit.DataConfig(str(folder / "text.txt")), config, out, callbacks=())
    return out


@pytest.fixture(scope="module")
def page(chat_run, dense_run, runtime, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    export_html(chat_run, path, runtime=runtime, beside=dense_run)
    return path.as_uri()


def columns(browser):
    """What is said in each column."""
    return browser.ask(
        "[...document.querySelectorAll('.talk')].map((talk) =>"
        "[...talk.querySelectorAll('.said')].map((said) => said.textContent))"
    )


def test_each_column_has_the_answers_of_its_model(tab, page, chat_run, dense_run):
    tab.open(page)
    assert drive.wait_finished(tab).startswith("Done")
    (hello, answer), (continued,) = columns(tab)  # by itself, and before anybody writes
    assert hello == "hello"
    assert answer
    assert continued.startswith("hello")
    tab.page.get_by_role("button", name="New conversation").click()
    assert columns(tab) == [[], []]
    talk, text_model = chat.Chat(*bit.load_model(chat_run), GREEDY), bit.load_model(dense_run)
    texts = []
    for words in ("what does a duck say?", "and a cow?"):
        drive.press_generate(tab, words, GREEDY.max_new_tokens)
        assert drive.wait_finished(tab).startswith("Done")
        talk.answer(words)
        texts.append(words + bit.generate(*text_model, words, GREEDY))
    assert columns(tab) == [[message["content"] for message in talk.messages], texts]
    names = tab.page.locator("#columns h2").all_inner_texts()
    assert names == ["run", "dense"]
    assert tab.page.title() == "run and dense"
    facts = tab.page.locator("details", has_text="Details of the model")
    facts.locator("summary").click()
    assert facts.locator("dl").count() == 2
    assert "full precision" in facts.locator("dl").last.inner_text()
    assert not outside(tab.requests)
    assert not tab.complaints


def test_columns_stand_side_by_side_or_one_below_the_other(tab, page):
    tab.open(f"{page}#quiet")
    tab.page.get_by_text("Ready.").wait_for()
    for words in ("what does a duck say?", "and a cow?"):
        drive.press_generate(tab, words, 20, temperature=0.3, seed=1)
        assert drive.wait_finished(tab).startswith("Done")
    seeds = tab.page.locator(".speed").all_inner_texts()
    assert [re.search(r"seed (\d+)", line)[1] for line in seeds] == ["1", "1"]
    SHOTS.mkdir(exist_ok=True)
    for width, narrow in ((360, True), (1000, False)):
        tab.page.set_viewport_size({"width": width, "height": 740})
        first, second = (tab.page.locator(".talk").nth(i).bounding_box() for i in (0, 1))
        assert (second["y"] >= first["y"] + first["height"]) == narrow
        assert (second["x"] >= first["x"] + first["width"]) != narrow
        assert tab.ask(FITS)
        tab.page.screenshot(path=SHOTS / f"beside_{width}.png", full_page=True)


def test_stop_ends_both_and_nothing_is_lost(tab, page):
    tab.open(f"{page}#quiet")
    tab.page.get_by_text("Ready.").wait_for()
    tab.ask("(at('prompt').value = 'hello?', at('generate').click(), at('stop').click())")
    drive.wait_for(lambda: drive.status_of(tab) == "Stopped.")
    assert columns(tab) == [[], []]
    assert tab.ask("sides.map((side) => side.turns)") == [[], []]
    assert tab.page.get_by_label("Your message").input_value() == "hello?"


def test_two_steps_of_a_run_are_named_and_a_folder_holds_both(
    dense_run, runtime, tmp_path, run_cli
):
    out = tmp_path / "site"
    words = ("--to", "html", "--out", out, "--runtime", runtime, "--beside", 40)
    result = run_cli("export", "--model", dense_run, *words)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in out.iterdir()} == {*FOLDER_FILES, "beside.gguf"}
    assert FORMATS["html"].is_export(out)
    assert (out / "model.gguf").read_bytes() != (out / "beside.gguf").read_bytes()
    assert "<title>dense, step 80 and dense, step 40</title>" in (out / "index.html").read_text(
        encoding="utf-8"
    )


def test_a_pair_that_llama_cpp_cannot_hold_is_refused(dense_run, tmp_path, tiny_corpus):
    narrow = train_tiny(tmp_path / "narrow", tiny_corpus)
    with pytest.raises(ValueError, match=r"^narrow: .*256.*a pair needs two models, ternary or de"):
        export_html(dense_run, tmp_path / "page.html", beside=narrow)
    with pytest.raises((ValueError, FileNotFoundError), match="no whole checkpoint"):
        export_html(dense_run, tmp_path / "page.html", beside="19")
    packed = export_packed(narrow, tmp_path / "packed.safetensors")
    with pytest.raises(ValueError, match=r"beside.*a step of the run"):  # it has none but its own
        export_html(packed, tmp_path / "page.html", beside="1")
    assert not (tmp_path / "page.html").exists()
