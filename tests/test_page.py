"""The exported web page: it writes what llama.cpp writes, asks nobody, and shows words as words.

The browsers are real ones, driven by tools/page_in_browsers.py. llama.cpp for them and a trained
model come out of docs/demo.html, so that nothing is fetched.
"""

import functools
import http.server
import io
import json
import os
import re
import shutil
import sys
import tarfile
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import bitllm_core as bit
from bitllm.export import common, webpage, wllama
from tests.conftest import ROOT
from tests.test_export import train_tiny
from tools import page_in_browsers as drive

SHOTS = ROOT / "artefacts"
TEMPLATE = webpage._page_template()


@pytest.fixture(scope="module")
def demo():
    """Parts of docs/demo.html, and what its script is told."""
    return drive.parts_of(ROOT / "docs" / "demo.html")


@pytest.fixture(scope="module")
def runtime(demo, tmp_path_factory):
    """llama.cpp for browsers as npm lays it out."""
    folder = tmp_path_factory.mktemp("runtime")
    for part, (file, _) in wllama._WLLAMA_FILES.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(demo[0][part])
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_corpus):
    """Two steps of training: enough where only the files matter."""
    sizes = {"hidden_size": 256, "intermediate_size": 256}
    return train_tiny(tmp_path_factory.mktemp("run") / "run", tiny_corpus, **sizes)


@pytest.fixture(scope="module")
def page(demo, tmp_path_factory):
    """The demo's model in the template as it is now: the file's address."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_bytes(webpage._page_files(TEMPLATE, *demo, folder=False)["index.html"])
    return path.as_uri()


@pytest.fixture(scope="module")
def expected(demo, tmp_path_factory):
    """48 greedy tokens of native llama.cpp."""
    gguf = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf.write_bytes(demo[0]["model"])
    return drive.write_here(gguf, PROMPT, 48)["text"]


PROMPT = "The "


def started(kind):
    if kind.path is None:
        if os.environ.get("BITLLM_NO_SKIPS"):
            pytest.fail(f"no {kind.__name__}, and BITLLM_NO_SKIPS forbids to skip")
        pytest.skip(f"no {kind.__name__} on the path")
    return kind()


@pytest.fixture(scope="module")
def chromium():
    browser = started(drive.Chromium)
    yield browser
    browser.close()


@pytest.fixture
def tab(chromium):
    """A new tab as wide as a phone; what it asks for and complains of is kept."""
    chromium.page = chromium.new_page(viewport={"width": 360, "height": 740})
    chromium.requests, chromium.complaints = [], []
    chromium.page.on("console", lambda message: chromium.complaints.append(message.text))
    chromium.page.on("pageerror", lambda error: chromium.complaints.append(str(error)))
    chromium.page.on("dialog", lambda dialog: chromium.complaints.append(dialog.message))
    yield chromium
    chromium.page.close()


@pytest.fixture
def served(tmp_path):
    """A folder behind a web server: folder, address, the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *_):
            asked.append(self.path)

    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Handler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def outside(requests, allowed=("file", "blob", "data")):
    return [address for address in requests if urlsplit(address).scheme not in allowed]


# Writing


def test_chromium_writes_what_llama_cpp_writes(tab, page, expected):
    found = drive.write(tab, page, PROMPT, 48)
    assert found["text"] == expected
    assert found["tokens"] == 48
    assert found["tokens_per_s"] > 0
    assert tab.requests
    assert not outside(tab.requests)
    assert not tab.complaints


def test_firefox_writes_what_llama_cpp_writes(page, expected):
    browser = started(drive.Firefox)
    try:
        found = drive.write(browser, page, PROMPT, 48)
        assert found["text"] == expected
        assert found["tokens"] == 48
        assert not outside(browser.requests)
    finally:
        browser.close()


def test_a_folder_behind_a_web_server_writes_the_same(tab, demo, served, expected):
    folder, address, asked = served
    for name, data in webpage._page_files(TEMPLATE, *demo, folder=True).items():
        (folder / name).write_bytes(data)
    assert {path.name for path in folder.iterdir()} == webpage._PAGE_FILES
    assert (folder / "model.gguf").read_bytes().startswith(b"GGUF")
    assert drive.write(tab, f"{address}/index.html", PROMPT, 48)["text"] == expected
    assert sorted(asked) == ["/index.html", "/model.gguf", "/runtime.bin"]
    assert {urlsplit(x).netloc for x in tab.requests if x[:4] == "http"} == {address[7:]}
    assert not tab.complaints
    tab.open((folder / "index.html").as_uri())
    status = drive.wait_for(lambda: drive.finished(tab))
    assert re.search(r"(runtime\.bin|model\.gguf): not readable", status)
    assert "web server" in status


def test_the_same_seed_writes_the_same_and_stop_stops(tab, page):
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
        drive.press_generate(tab, PROMPT, 500, temperature=1.5)
        drive.wait_for(lambda: drive.speed_of(tab)[0] > 3)
        stop()
        assert drive.wait_finished(tab) == "Stopped."
        text, count = drive.written_by(tab), drive.speed_of(tab)[0]
        assert count < 500
        tab.page.wait_for_timeout(300)
        assert drive.written_by(tab) == text


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
    papers = []
    SHOTS.mkdir(exist_ok=True)
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme)
        assert tab.ask(WORST_CONTRAST) >= 4.5  # WCAG 2, level AA
        papers.append(tab.ask("getComputedStyle(document.body).backgroundColor"))
        for width in (360, 1000):
            tab.page.set_viewport_size({"width": width, "height": 740})
            assert tab.ask(FITS), width
            tab.page.screenshot(path=SHOTS / f"page_{scheme}_{width}.png", full_page=True)
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


# Strangers' words

HACK = "globalThis.hacked=1"
HOSTILE = [
    f"<script>{HACK}</script>",
    f"</script><script>{HACK}</script>",
    f"<!--<script>{HACK}</script>-->",
    f"<!--<script><script></script>{HACK}",
    f"</title><script>{HACK}</script>",
    f"</style></textarea></noscript><img src=x onerror={HACK}>",
    f"<svg/onload={HACK}>",
    '"><iframe srcdoc="<script>parent.hacked=1</script>">',
    f"' onmouseover='{HACK}' style='position:fixed;inset:0",
    f"javascript:{HACK}",
    "<base href='https://example.com/'><meta http-equiv=refresh content='0;url=about:blank'>",
    "<style>*{display:none!important}</style><link rel=stylesheet href=//example.com/x>",
    "{{model}} {{policy}} {{facts}} ${hacked=1} \\u003cscript>",
    '"};' + HACK + ';//\\"\\',
    "&lt;b&gt;&amp;amp; &#60;script&#62;",
    "\u2028\u2029\u0000\u0008\u001b[31m\r\n\ttext",
    "\u202eright to left\u2066 for ever \u05d0\u05d1\u05d2",
    "W" * 5000,
    "Z\u0334\u0321\u0330" + "\u0301\u0323" * 400,
    "line\n" * 200 + "\U0001f469\u200d\U0001f469\u200d\U0001f467" * 100,
]
OURS = "name", "data", "author", "licence", "data_licence"


def page_about(demo, words, folder=False):
    """A page whose model tells `words` everywhere; it holds no engine that could run."""
    parts = {**demo[0], "engine": b"", "model": b""}
    told = json.loads(json.dumps(demo[1]))
    told["facts"] |= dict.fromkeys(OURS, words)
    told["prompt"] = words
    return webpage._page_files(TEMPLATE, parts, told, folder)


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


@pytest.fixture(scope="module")
def harmless(chromium, demo, tmp_path_factory):
    """The layout with a name of one word."""
    chromium.page = chromium.new_page(viewport={"width": 360, "height": 740})
    path = tmp_path_factory.mktemp("harmless") / "page.html"
    path.write_bytes(page_about(demo, "word")["index.html"])
    opened(chromium, path)
    found = layout(chromium)
    chromium.page.close()
    return found


@pytest.mark.parametrize("words", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_words_neither_run_nor_break_the_layout(words, tab, demo, harmless, tmp_path):
    path = tmp_path / "page.html"
    path.write_bytes(page_about(demo, words)["index.html"])
    opened(tab, path)
    tab.page.mouse.move(180, 60)
    assert tab.ask("globalThis.hacked") is None
    assert layout(tab) == harmless
    assert tab.ask(FITS)
    button = tab.ask("document.getElementById('generate').getBoundingClientRect().bottom")
    assert button < 740, "not on the first screen"
    assert not outside(tab.requests)
    complaints = [x for x in tab.complaints if "Content Security Policy" in x]
    assert not complaints  # nothing even tried
    shown = tab.ask("[...document.querySelectorAll('dd')].map((x) => x.textContent)")
    assert shown.count(words) == len(OURS) - 1
    plain = words.replace("\r\n", "\n")  # as HTML reads it, and without the zero byte:
    assert tab.ask("document.getElementById('name').textContent") == plain.replace("\0", "")
    title = re.sub(r"[\x01-\x20]+", " ", plain.replace("\0", "\ufffd")).strip(" ")
    assert tab.ask("document.title") == title


def test_the_read_me_of_a_folder_keeps_a_name_in_its_line(demo):
    for words in HOSTILE:
        text = page_about(demo, words, folder=True)["README.md"].decode()
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


def test_the_template_names_no_address_and_no_handler():
    assert not re.search(r"https?:|//\w+\.\w+/|\bon\w+\s*=\s*[\"']", TEMPLATE)
    assert "innerHTML" not in TEMPLATE


# The export


def test_an_exported_page_holds_the_gguf_and_what_is_known(run, runtime, tmp_path, run_cli):
    out = tmp_path / "my page.html"
    words = ("--name", HOSTILE[1], "--licence", "mit", "--runtime", runtime)
    result = run_cli("export", "--model", run, "--to", "html", "--out", out, *words)
    assert result.returncode == 0, result.stderr
    said = re.search(r"a page of ([\d.]+) MB", result.stderr)
    assert abs(float(said[1]) - out.stat().st_size / 1e6) < 0.06
    assert f"{out.stat().st_size:,} bytes, 2.0" in result.stdout
    parts, told = drive.parts_of(out)
    gguf = bit.export_gguf(run, tmp_path / "m.gguf", name=HOSTILE[1], licence="mit")
    assert parts["model"] == Path(gguf).read_bytes()
    facts = told["facts"]
    assert facts["name"] == HOSTILE[1]
    assert facts["parameters"] == bit.load_model(run)[0].config.num_parameters
    assert facts["steps"] == 2
    assert facts["data"] == "text.txt"
    assert facts["val_loss"] > 0
    assert abs(facts["bits_per_weight"] - gguf.bits_per_weight) < 1e-9
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["exported"])
    with pytest.raises(ValueError, match="exists already"):
        bit.export_html(run, out, runtime=runtime)


def test_an_exported_folder_is_replaced_only_by_its_own_kind(run, runtime, tmp_path):
    out = tmp_path / "me.github.io"
    first = bit.export_html(run, out, runtime=runtime)
    assert first.size == sum(path.stat().st_size for path in out.iterdir())
    assert "README.md" in first.usage
    assert bit.export_html(run, out, runtime=runtime, overwrite=True).size == first.size
    (out / "photograph.jpg").write_bytes(b"dear to me")
    with pytest.raises(ValueError, match="not overwritten"):
        bit.export_html(run, out, runtime=runtime, overwrite=True)
    assert (out / "photograph.jpg").exists()


def test_facts_that_are_no_json_or_no_words_are_shown_as_they_can_be(run):
    source = common._open_source(run, "last", {})
    source.facts.update(val_loss=float("nan"), author=["a"], steps=float("inf"), name="\ud800")
    told = webpage._page_told(source, 1)
    assert json.loads(json.dumps(told, allow_nan=False))["facts"]["author"] == "['a']"
    parts = dict.fromkeys(("library", "licence", "glue", "engine", "model"), b"")
    assert b"\\ud800" in webpage._page_files(TEMPLATE, parts, told, False)["index.html"]


def test_another_runtime_is_refused(run, runtime, tmp_path):
    spoilt = tmp_path / "runtime"
    shutil.copytree(runtime, spoilt)
    file = spoilt / "wllama-compat" / "wasm" / "wllama.wasm"
    with file.open("r+b") as opened:
        opened.seek(1000)
        opened.write(b"x")
    with pytest.raises(ValueError, match=r"wllama\.wasm: refused, its sha256 is"):
        bit.export_html(run, tmp_path / "page.html", runtime=spoilt)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="npm install @wllama"):
        bit.export_html(run, tmp_path / "page.html", runtime=spoilt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runtime"]


def test_a_model_that_no_page_can_run_is_told_before_anything_is_fetched(
    tmp_path, tiny_corpus, monkeypatch
):
    monkeypatch.setattr(wllama, "_fetch_runtime", None)
    out = train_tiny(tmp_path / "run", tiny_corpus)  # 64 wide
    with pytest.raises(ValueError, match="256"):
        bit.export_html(out, tmp_path / "page.html")


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "cache" / "bitllm"


def serve_runtime(runtime, folder, monkeypatch, address):
    version = wllama._WLLAMA
    for file, _ in wllama._WLLAMA_FILES.values():
        package, _, inside = file.partition("/")
        target = folder / f"{package}@{version}" / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(runtime / file, target)
    monkeypatch.setattr(wllama, "_WLLAMA_CDN", address)


def test_without_npm_the_runtime_comes_from_the_cdn_once(runtime, no_cache, served, monkeypatch):
    folder, address, asked = served
    serve_runtime(runtime, folder, monkeypatch, address)
    parts = wllama._page_runtime(None)
    assert parts == wllama._read_runtime(runtime)
    assert len(asked) == len(parts) == 4
    assert wllama._page_runtime(None) == parts
    assert len(asked) == 4  # kept
    spoilt = next(no_cache.glob("*/wllama/LICENCE"))
    spoilt.write_text("", encoding="utf-8")
    assert wllama._page_runtime(None) == parts  # and fetched again where a disk spoilt it
    assert len(asked) == 8


def test_what_the_cdn_changed_is_refused_and_not_kept(runtime, no_cache, served, monkeypatch):
    folder, address, _ = served
    serve_runtime(runtime, folder, monkeypatch, address)
    (folder / f"wllama@{wllama._WLLAMA}" / "LICENCE").write_text("other", encoding="utf-8")
    with pytest.raises(ValueError, match="LICENCE: refused"):
        wllama._page_runtime(None)
    assert not no_cache.exists()


@pytest.mark.skipif(os.name == "nt", reason="the npm of this test is a script with a first line")
def test_npm_packs_are_read(runtime, no_cache, tmp_path, monkeypatch):
    """An npm that writes the two archives as the real one does, from the files at hand."""
    for package in ("wllama", "wllama-compat"):
        with tarfile.open(tmp_path / f"{package}.tgz", "w:gz") as archive:
            for file, _ in wllama._WLLAMA_FILES.values():
                if file.startswith(package + "/"):
                    data = (runtime / file).read_bytes()
                    entry = tarfile.TarInfo("package/" + file.removeprefix(package + "/"))
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    npm = tmp_path / "bin" / "npm"
    npm.write_text(
        f"#!{sys.executable}\n"
        "import re, shutil, sys\n"
        "assert sys.argv[1:3] == ['pack', '--silent']\n"
        "for name in sys.argv[3:]:\n"
        "    package, version = re.fullmatch(r'@wllama/([\\w-]+)@([\\d.]+)', name).groups()\n"
        f"    source = {str(tmp_path)!r} + '/' + package + '.tgz'\n"
        "    shutil.copy(source, f'wllama-{package}-{version}.tgz')\n",
        encoding="utf-8",
    )
    npm.chmod(0o755)
    monkeypatch.setattr(wllama, "_WLLAMA_CDN", None)
    assert wllama._page_runtime(None) == wllama._read_runtime(runtime)


def test_with_neither_npm_nor_network_it_is_told_what_to_do(no_cache, monkeypatch):
    monkeypatch.setattr(wllama, "_WLLAMA_CDN", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"no npm on the path; .*refused.*npm install @wllama"):
        wllama._page_runtime(None)


# The demonstration


def test_the_demonstration_is_small_and_its_library_the_pinned_one(demo, runtime):
    assert (ROOT / "docs" / "demo.html").stat().st_size < 10_000_000
    assert wllama._read_runtime(runtime) == {k: v for k, v in demo[0].items() if k != "model"}
