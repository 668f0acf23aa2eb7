"""The exported page generates what llama.cpp generates, contacts nobody, and shows text as text.

The browsers are real ones, driven by tools/page_in_browsers.py. llama.cpp for them comes out of
docs/demo.html, so that nothing is fetched.
"""

import json
import re
from urllib.parse import urlsplit

import pytest

from bitllm.export.webpage import FOLDER_FILES, HOME, page_files, page_template
from tests.conftest import ROOT
from tests.export.helpers import started
from tests.export.hostile import HOSTILE
from tools import page_in_browsers as drive

SHOTS = ROOT / "artefacts"
TEMPLATE = page_template()


@pytest.fixture(scope="module")
def page(text_page, tmp_path_factory):
    """A page with a text box: the file's address."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_bytes(page_files(TEMPLATE, *text_page, folder=False)["index.html"])
    return path.as_uri()


@pytest.fixture(scope="module")
def expected(text_page, tmp_path_factory):
    """The greedy text of native llama.cpp."""
    gguf = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf.write_bytes(text_page[0]["model"])
    return drive.write_here(gguf, PROMPT, TOKENS)["text"]


PROMPT, TOKENS = "If the ", 32
"""greedy text without a near tie: the smallest gap to the second best token is 0.34 nats"""


def outside(requests, allowed=("file", "blob", "data")):
    return [address for address in requests if urlsplit(address).scheme not in allowed]


# Generating


def test_chromium_generates_what_llama_cpp_generates(tab, page, expected):
    found = drive.write(tab, page, PROMPT, TOKENS)
    assert found["text"] == expected
    assert found["tokens"] == TOKENS
    assert found["tokens_per_s"] > 0
    assert tab.requests
    assert not outside(tab.requests)
    assert not tab.complaints


def test_firefox_generates_what_llama_cpp_generates(page, expected):
    browser = started(drive.Firefox)
    try:
        found = drive.write(browser, page, PROMPT, TOKENS)
        assert found["text"] == expected
        assert found["tokens"] == TOKENS
        assert not outside(browser.requests)
    finally:
        browser.close()


def test_a_folder_behind_a_web_server_generates_the_same(tab, text_page, served, expected):
    folder, address, asked = served
    for name, data in page_files(TEMPLATE, *text_page, folder=True).items():
        (folder / name).write_bytes(data)
    assert {path.name for path in folder.iterdir()} == FOLDER_FILES
    assert (folder / "model.gguf").read_bytes().startswith(b"GGUF")
    assert drive.write(tab, f"{address}/index.html", PROMPT, TOKENS)["text"] == expected
    assert sorted(asked) == ["/index.html", "/model.gguf", "/runtime.bin"]
    assert {urlsplit(x).netloc for x in tab.requests if x[:4] == "http"} == {address[7:]}
    assert not tab.complaints
    tab.open((folder / "index.html").as_uri())
    status = drive.wait_for(lambda: drive.finished(tab))
    assert re.search(r"(runtime\.bin|model\.gguf): not readable", status)
    assert "web server" in status


def test_the_same_seed_generates_the_same_and_stop_stops(tab, page):
    tab.open(page)
    tab.page.get_by_text("Ready.").wait_for()
    texts = []
    for seed in (1, 1, 2):
        drive.press_generate(tab, PROMPT, 20, temperature=1, seed=seed)
        assert drive.wait_finished(tab).startswith("Done")
        texts.append(drive.written_by(tab))
    assert texts[0] == texts[1] != texts[2]
    for stop in (
        lambda: tab.page.get_by_role("button", name="Stop").click(),
        lambda: tab.page.keyboard.press("Escape"),
    ):
        drive.press_generate(tab, PROMPT, 500)  # greedy: a sampled text may end at once
        drive.wait_for(lambda: drive.speed_of(tab)[0] > 3)
        stop()
        assert drive.wait_finished(tab) == "Stopped."
        text, count = drive.written_by(tab), drive.speed_of(tab)[0]
        assert count < 500
        tab.page.wait_for_timeout(300)
        assert drive.written_by(tab) == text


def test_a_page_begins_by_itself_and_a_suggestion_is_a_click(tab, text_page, tmp_path):
    parts, values = text_page
    chips = [PROMPT, "def"]
    path = tmp_path / "page.html"
    made = page_files(TEMPLATE, parts, {**values, "chips": chips}, folder=False)
    path.write_bytes(made["index.html"])
    tab.open(path.as_uri())
    assert drive.wait_finished(tab).startswith("Done")
    written = "document.getElementById('text').textContent"
    assert tab.ask(written).startswith(PROMPT)
    tab.page.get_by_role("button", name="def").click()
    drive.wait_for(lambda: tab.ask(written).startswith("def"))
    assert not tab.complaints
    link = tab.page.get_by_role("link", name="bitllm")
    assert link.get_attribute("href") == HOME


def test_keys_and_labels_are_enough(tab, page):
    """Everything can be found by its label and worked from the keyboard."""
    tab.open(page)
    box = tab.page.get_by_label("Beginning of the text")
    box.fill(PROMPT)
    for name, key, shown in (("temperature", "Home", "0.00"), ("length in tokens", "Home", "1")):
        slider = tab.page.get_by_role("slider", name=name)
        slider.press(key)
        assert tab.page.locator("label", has_text=name).locator("span").inner_text() == shown
    for name in ("top-k", "top-p"):
        assert tab.page.get_by_role("slider", name=name).count() == 1
    assert tab.page.get_by_role("spinbutton", name="seed").count() == 1
    box.press("Control+Enter")
    assert drive.wait_finished(tab).startswith("Done")
    assert drive.speed_of(tab)[0] == 1
    assert tab.page.get_by_role("status").first.inner_text().startswith("Done")
    assert not tab.page.get_by_role("progressbar").is_visible()


def test_light_and_dark_can_be_read_on_a_phone(tab, page):
    tab.open(page)
    tab.page.get_by_text("Ready.").wait_for()
    drive.press_generate(tab, "", 60, temperature=0.8)
    drive.wait_finished(tab)
    for name in themes_and_widths(tab):
        tab.page.screenshot(path=SHOTS / f"page_{name}.png", full_page=True)


def themes_and_widths(tab):
    """Yield the name of each of four looks of an open page, which has to be readable in it."""
    SHOTS.mkdir(exist_ok=True)
    papers = []
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme)
        assert tab.ask(WORST_CONTRAST) >= 4.5  # WCAG 2, level AA
        papers.append(tab.ask("getComputedStyle(document.body).backgroundColor"))
        for width in (360, 1000):
            tab.page.set_viewport_size({"width": width, "height": 740})
            assert tab.ask(FITS), width
            yield f"{scheme}_{width}"
    assert papers[0] != papers[1]


FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
WORST_CONTRAST = """(() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
      .map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return /, 0\\)$/.test(colour) ? behind(element.parentElement) : colour;
  };
  const ratios = [...document.querySelectorAll("h1,h2,p,label,dt,dd,button,textarea,output,span")]
    .filter((x) => x.textContent.trim() && !x.disabled && x.checkVisibility())
    .map((x) => [light(getComputedStyle(x).color), light(behind(x))].sort((a, b) => b - a))
    .map(([a, b]) => (a + 0.05) / (b + 0.05));
  return Math.min(...ratios);
})()"""


# Hostile text

FACTS = "name", "data", "author", "licence", "data_licence"


def page_about(text_page, words, folder=False, template=TEMPLATE):
    """A page with `words` wherever it describes its model; it holds no engine that could run."""
    parts = {**text_page[0], "engine": b"", "model": b""}
    values = json.loads(json.dumps(text_page[1]))
    values["facts"] |= dict.fromkeys(FACTS, words)
    values["prompt"] = words
    return page_files(template, parts, values, folder)


def layout(tab):
    return tab.ask(
        """(() => {
            const button = document.getElementById("generate").getBoundingClientRect();
            return [document.querySelectorAll("*").length, document.scripts.length,
                    getComputedStyle(document.getElementById("generate")).display,
                    button.width, button.height, button.left];
        })()"""
    )


def opened(tab, path):
    tab.open(path.as_uri())
    return drive.wait_for(lambda: drive.finished(tab))  # no engine: "The model cannot run here"


@pytest.fixture(scope="module", params=[False, True], ids=["text", "chat"])
def template(request):
    return page_template(request.param)


@pytest.fixture(scope="module")
def harmless(template, chromium, text_page, tmp_path_factory):
    """The layout with a name of one word."""
    chromium.page = chromium.new_page(viewport={"width": 360, "height": 740})
    path = tmp_path_factory.mktemp("harmless") / "page.html"
    path.write_bytes(page_about(text_page, "word", template=template)["index.html"])
    opened(chromium, path)
    found = layout(chromium)
    chromium.page.close()
    return found


def test_hostile_words_neither_run_nor_break_the_layout(
    tab, text_page, harmless, template, tmp_path
):
    """All in one tab: to open one for each takes longer than the rest."""
    path = tmp_path / "page.html"
    for words in HOSTILE:
        print(repr(words[:100]))
        path.write_bytes(page_about(text_page, words, template=template)["index.html"])
        opened(tab, path)
        tab.page.mouse.move(180, 60)
        assert tab.ask("globalThis.hacked") is None
        assert layout(tab) == harmless
        assert tab.ask(FITS)
        part = "(document.getElementById('talk') ?? document.getElementById('generate'))"
        assert tab.ask(f"{part}.getBoundingClientRect().bottom") < 740, "not on the first screen"
        shown = tab.ask("[...document.querySelectorAll('dd')].map((x) => x.textContent)")
        assert shown.count(words) == len(FACTS) - 1
        plain = words.replace("\r\n", "\n")  # as HTML reads it, and without the zero byte:
        assert tab.ask("document.getElementById('name').textContent") == plain.replace("\0", "")
        title = re.sub(r"[\x01-\x20]+", " ", plain.replace("\0", "\ufffd")).strip(" ")
        assert tab.ask("document.title") == title
    assert not outside(tab.requests)
    complaints = [x for x in tab.complaints if "Content Security Policy" in x]
    assert not complaints  # nothing even tried


def test_the_read_me_of_a_folder_keeps_a_name_in_its_line(text_page):
    for words in HOSTILE:
        text = page_about(text_page, words, folder=True)["README.md"].decode()
        head = text.split("\n---\n")[0].splitlines()
        assert head[0] == "---"
        assert json.loads(head[1].removeprefix("title: ")) == words
        assert head[2:] == ["sdk: static"]


def test_the_policy_lets_nothing_out_and_nothing_in(tab, page, served):
    _, address, asked = served
    tab.open(page)
    tab.page.get_by_text("Ready.").wait_for()
    attempts = [
        f"fetch('{address}/a').then(() => 'came', () => 'refused')",
        f"new Promise((go) => {{ const x = new Image(); x.onload = () => go('came');"
        f"x.onerror = () => go('refused'); x.src = '{address}/b'; }})",
        "new Promise((go) => { const x = document.createElement('script');"
        "x.textContent = 'globalThis.ran = 1'; document.body.append(x);"
        "setTimeout(() => go(globalThis.ran ? 'came' : 'refused')); })",
        "new Promise((go) => { document.body.insertAdjacentHTML('beforeend',"
        "'<img src=x onerror=globalThis.ran=1>');"
        "setTimeout(() => go(globalThis.ran ? 'came' : 'refused'), 100); })",
    ]
    assert [tab.ask(attempt) for attempt in attempts] == ["refused"] * len(attempts)
    assert not asked


def test_the_template_names_no_address_and_no_handler(template):
    assert not re.search(r"https?:|//\w+\.\w+/|\bon\w+\s*=\s*[\"']", template)
    assert "innerHTML" not in template
