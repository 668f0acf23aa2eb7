"""The export of a page: what it holds, what it replaces, and where llama.cpp for it comes from."""

import io
import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

import bitllm_core as bit
from bitllm.export import export_gguf, export_html, webpage, wllama
from bitllm.export.common import open_source
from bitllm.export.webpage import page_files, page_template, page_values
from tests.conftest import ROOT
from tests.export.helpers import train_tiny
from tests.export.hostile import HOSTILE
from tools import page_in_browsers as drive


def test_an_exported_page_holds_the_gguf_and_what_is_known(wide_run, runtime, tmp_path, run_cli):
    out = tmp_path / "my page.html"
    words = ("--name", HOSTILE[1], "--licence", "mit", "--runtime", runtime)
    result = run_cli("export", "--model", wide_run, "--to", "html", "--out", out, *words)
    assert result.returncode == 0, result.stderr
    assert f"{out.stat().st_size:,} bytes, 2.0" in result.stdout
    parts, values = drive.parts_of(out)
    gguf = export_gguf(wide_run, tmp_path / "m.gguf", name=HOSTILE[1], licence="mit")
    assert parts["model"] == Path(gguf).read_bytes()
    facts = values["facts"]
    assert facts["name"] == HOSTILE[1]
    assert facts["parameters"] == bit.load_model(wide_run)[0].config.num_parameters
    assert facts["steps"] == 2
    assert facts["data"] == "text.txt"
    assert facts["val_loss"] > 0
    assert abs(facts["bits_per_weight"] - gguf.bits_per_weight) < 1e-9
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts["exported"])
    with pytest.raises(ValueError, match="exists already"):
        export_html(wide_run, out, runtime=runtime)


@pytest.mark.parametrize(
    ("data", "title", "chips"),
    [
        ("companion", "A companion with 1.3M parameters", ["Hello!", "What is your name?"]),
        ("companion:es", "A companion with 1.3M parameters", ["¡Hola!", "¿Cómo te llamas?"]),
        ("pydocs", "A 1.3M-parameter model that has read only the docum", ["The with statement"]),
        ("mine.txt", "run", []),
    ],
)
def test_a_page_without_a_name_says_what_its_model_is(wide_run, data, title, chips):
    opened = open_source(wide_run, "last", {})
    opened.facts["data"] = data
    size = f"{opened.model.config.num_parameters / 1e6:.1f}M"
    assert webpage._title(opened).startswith(title.replace("1.3M", size))
    values = page_values(opened, 1)
    assert values["chips"][: len(chips)] == chips
    assert bool(values["chips"]) == bool(chips)
    assert values["facts"]["data"] != "pydocs"  # a word of ours


def test_only_a_model_of_conversations_is_a_chat(wide_run, chat_run, runtime, tmp_path):
    """With its tokens, and the sampling of `Chat`; the other page has none of a chat's script."""
    chats = export_html(chat_run, tmp_path / "chat.html", runtime=runtime).path
    _, values = drive.parts_of(chats)
    tokenizer = bit.load_model(chat_run)[1]
    ids = {name: tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>")}
    assert [values["chat"]["start"], values["chat"]["end"]] == list(ids.values())
    assert {*ids.values(), bit.end_of_text_id(tokenizer)} == set(values["chat"]["special"])
    assert values["chat"]["room"] == 128 - 32
    assert values["sampling"] == {"temperature": 0.3, "top_k": 20, "top_p": 1.0, "length": 200}
    assert 'role="log"' in chats.read_text(encoding="utf-8")
    plain = export_html(wide_run, tmp_path / "text.html", runtime=runtime).path
    _, values = drive.parts_of(plain)
    assert values["chat"] is None
    assert values["sampling"]["temperature"] == bit.SamplingConfig().temperature
    text = plain.read_text(encoding="utf-8")
    assert "Beginning of the text" in text
    assert 'role="log"' not in text
    assert "Tokenizer" not in text.split('id="model"')[1].rsplit("</script>", 2)[1]


def test_an_exported_folder_is_replaced_only_by_its_own_kind(wide_run, runtime, tmp_path):
    out = tmp_path / "me.github.io"
    first = export_html(wide_run, out, runtime=runtime)
    assert first.size == sum(path.stat().st_size for path in out.iterdir())
    assert "README.md" in first.usage
    assert export_html(wide_run, out, runtime=runtime, overwrite=True).size == first.size
    (out / "photograph.jpg").write_bytes(b"dear to me")
    with pytest.raises(ValueError, match="not overwritten"):
        export_html(wide_run, out, runtime=runtime, overwrite=True)
    assert (out / "photograph.jpg").exists()


def test_facts_that_are_no_valid_json_are_shown_as_text(wide_run):
    source = open_source(wide_run, "last", {})
    source.facts.update(val_loss=float("nan"), author=["a"], steps=float("inf"), name="\ud800")
    values = page_values(source, 1)
    assert json.loads(json.dumps(values, allow_nan=False))["facts"]["author"] == "['a']"
    parts = dict.fromkeys(("library", "licence", "glue", "engine", "model"), b"")
    assert b"\\ud800" in page_files(page_template(), parts, values, False)["index.html"]


def test_another_runtime_is_refused(wide_run, runtime, tmp_path):
    damaged = tmp_path / "runtime"
    shutil.copytree(runtime, damaged)
    file = damaged / "wllama-compat" / "wasm" / "wllama.wasm"
    with file.open("r+b") as opened:
        opened.seek(1000)
        opened.write(b"x")
    with pytest.raises(ValueError, match=r"wllama\.wasm: refused, its sha256 is"):
        export_html(wide_run, tmp_path / "page.html", runtime=damaged)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="npm install @wllama"):
        export_html(wide_run, tmp_path / "page.html", runtime=damaged)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runtime"]


def test_a_model_that_no_page_can_run_is_refused_before_any_download(
    tmp_path, tiny_corpus, monkeypatch
):
    monkeypatch.setattr(wllama, "fetch_runtime", None)
    out = train_tiny(tmp_path / "run", tiny_corpus)  # 64 wide
    with pytest.raises(ValueError, match="256"):
        export_html(out, tmp_path / "page.html")


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "cache" / "bitllm"


def serve_runtime(runtime, folder, monkeypatch, address):
    version = wllama.VERSION
    for file, _ in wllama.FILES.values():
        package, _, inside = file.partition("/")
        target = folder / f"{package}@{version}" / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(runtime / file, target)
    monkeypatch.setattr(wllama, "CDN", address)


def test_without_npm_the_runtime_comes_from_the_cdn_once(runtime, no_cache, served, monkeypatch):
    folder, address, asked = served
    serve_runtime(runtime, folder, monkeypatch, address)
    parts = wllama.load_runtime()
    assert parts == wllama.read_runtime(runtime)
    assert len(asked) == len(parts) == 4
    assert wllama.load_runtime() == parts
    assert len(asked) == 4  # kept
    damaged = next(no_cache.glob("*/wllama/LICENCE"))
    damaged.write_text("", encoding="utf-8")
    assert wllama.load_runtime() == parts  # and downloaded again where a file was damaged
    assert len(asked) == 8


def test_what_the_cdn_changed_is_refused_and_not_kept(runtime, no_cache, served, monkeypatch):
    folder, address, _ = served
    serve_runtime(runtime, folder, monkeypatch, address)
    (folder / f"wllama@{wllama.VERSION}" / "LICENCE").write_text("other", encoding="utf-8")
    with pytest.raises(ValueError, match="LICENCE: refused"):
        wllama.load_runtime()
    assert not no_cache.exists()


@pytest.mark.skipif(os.name == "nt", reason="the npm of this test is a script with a first line")
def test_npm_packs_are_read(runtime, no_cache, tmp_path, monkeypatch):
    """An npm that writes the two archives as the real one does, from the files at hand."""
    for package in ("wllama", "wllama-compat"):
        with tarfile.open(tmp_path / f"{package}.tgz", "w:gz") as archive:
            for file, _ in wllama.FILES.values():
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
    monkeypatch.setattr(wllama, "CDN", None)
    assert wllama.load_runtime() == wllama.read_runtime(runtime)


def test_with_neither_npm_nor_network_the_error_explains_what_to_do(no_cache, monkeypatch):
    monkeypatch.setattr(wllama, "CDN", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"no npm on the path; .*refused.*npm install @wllama"):
        wllama.load_runtime()


# The demonstration


def test_the_demonstration_is_small_and_holds_the_pinned_library(demo, runtime):
    assert (ROOT / "docs" / "demo.html").stat().st_size < 10_000_000
    assert wllama.read_runtime(runtime) == {k: v for k, v in demo[0].items() if k != "model"}
