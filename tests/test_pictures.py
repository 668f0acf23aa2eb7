"""What a visitor sees first, in a real browser: both READMEs, and the page on a phone.

The pictures stay in artefacts/, to be looked at.
"""

import re

import pytest
from markdown_it import MarkdownIt

from tests.conftest import ROOT
from tests.export.helpers import started
from tests.export.test_page import FITS, SHOTS
from tools import page_in_browsers as drive

STYLE = """body { max-width: 838px; margin: 32px auto; font: 16px/1.5 sans-serif }
table { border-collapse: collapse; font-size: 14px } td, th { border: 1px solid #ccc; padding: 6px }
pre { background: #f6f8fa; padding: 16px; overflow: auto; font-size: 13.6px }
code { font-size: 1em } img { max-width: 100% }"""
"""about as wide as on GitHub"""
NOT_LOADED = """[...document.images].filter((x) => x.src.startsWith("file:") && !x.naturalWidth)
  .map((x) => x.getAttribute("src"))"""
PROSE = """[...document.querySelectorAll("p, li, td, th, h1, h2, h3")].map((x) => {
  const copy = x.cloneNode(true);
  copy.querySelectorAll("code").forEach((code) => code.remove());
  return copy.textContent; }).join("\\n")"""


@pytest.fixture(scope="module")
def chromium():
    browser = started(drive.Chromium)
    SHOTS.mkdir(exist_ok=True)
    yield browser
    browser.close()


@pytest.mark.parametrize("name", ["README.md", "README.es.md"])
def test_a_readme_shows_its_pictures_and_no_markup(chromium, tmp_path, name):
    text = (ROOT / name).read_text(encoding="utf-8")
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    head = f'<meta charset="utf-8"><base href="{ROOT.as_uri()}/"><style>{STYLE}</style>'
    (tmp_path / "page.html").write_text(head + body, encoding="utf-8")
    page = chromium.new_page(viewport={"width": 1012, "height": 800})
    page.route(re.compile("^https?:"), lambda route: route.abort())  # badges: no network
    page.goto((tmp_path / "page.html").as_uri())
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)
    assert page.evaluate(NOT_LOADED) == []
    assert page.locator("table").count() == len(re.findall(r"^\| ---", text, re.MULTILINE))
    assert not re.search(r"\*\*|\]\(|^#|\|", page.evaluate(PROSE), re.MULTILINE)
    assert page.evaluate(FITS)
    page.close()


def test_the_page_talks_on_a_phone(chromium):
    chromium.page = chromium.new_page(
        viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True
    )
    chromium.open(f"{(ROOT / 'docs' / 'demo.html').as_uri()}#quiet")
    chromium.page.get_by_text("Ready.").wait_for()
    for words in ("My name is Nora.", "What is my name?"):
        drive.press_generate(chromium, words, 100)
        drive.wait_finished(chromium)
    chromium.page.screenshot(path=SHOTS / "demo_phone.png")
    assert "Nora" in drive.written_by(chromium)
    assert chromium.ask(FITS)
    send = chromium.page.get_by_role("button", name="Send").bounding_box()
    assert send["y"] + send["height"] <= 844  # in reach without scrolling
    chromium.page.close()
