"""A web page in which the model runs, in any browser, without a server behind it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import logging
import math
import re
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import bitllm.export.wllama as wllama
from bitllm.chat import SAMPLING, room_of
from bitllm.companion import is_companion, language_of
from bitllm.conversations import SPECIAL, can_chat
from bitllm.corpora import shown
from bitllm.export.common import (
    Exported,
    Flag,
    Source,
    export_format,
    num_ternary_weights,
    open_source,
    replacing,
    result_of,
)
from bitllm.export.gguf import write_gguf
from bitllm_core import END_OF_TEXT, MARKS, SamplingConfig, library

log = logging.getLogger("bitllm")

HOME = "https://github.com/OWNER/bitllm/tree/main"
"""where one makes a model and a page of one's own; tools/set_repository.py writes it"""

KNOWN = {  # data: what the model has read, and what it can be asked or begin with
    "pydocs": ("the documentation of Python", ("The with statement", "def", "Changed in version")),
    "tinystories": ("stories for small children", ("Once upon a time", "One day", "The little")),
    "wikitext-2": ("articles of Wikipedia", ("The game", "In the", "He was")),
    "wikitext-103": ("articles of Wikipedia", ("The game", "In the", "He was")),
    "wikipedia-es": ("Wikipedia in Spanish", ("La ciudad", "El río", "Es una")),
    "fineweb-edu": ("pages of the web that teach", ("The most", "How to", "In this")),
}

FOLDER_FILES = {"README.md", "index.html", "model.gguf", "runtime.bin"}
"""what a page exported as a folder consists of"""


def _is_export(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} == FOLDER_FILES


@export_format(
    "html",
    flags={"runtime": Flag("--runtime", "folder with llama.cpp for browsers", metavar="DIR")},
    is_export=_is_export,
)
def export_html(
    source: str | Path,
    out: str | Path,
    *,
    checkpoint: str | int = "last",
    runtime: str | Path | None = None,
    overwrite: bool = False,
    **credits: str | None,
) -> Exported:
    """Write a web page in which the model runs, in any browser, without a server behind it.

    Args:
        source, checkpoint, overwrite: as `export_packed`.
        out: *.html: one file with everything inside, which also opens from disk. Any other name: a
            folder with the parts side by side, for GitHub Pages or a static Hugging Face Space.
        runtime: folder with llama.cpp for browsers, as npm lays it out (node_modules/@wllama);
            default: downloaded once from npm, or from a CDN where there is no npm, and kept.
        credits: as `export_packed`; they appear on the page.

    Raises:
        ValueError, FileNotFoundError: no such model, one that llama.cpp has no counterpart of
            (the message says why), `out` exists, or a file of `runtime` is not the expected one.
        ImportError: the package gguf is not installed.
        OSError: llama.cpp for browsers cannot be downloaded.
    """
    out = Path(out)
    folder = out.suffix != ".html"
    library("gguf", "an html export")
    with replacing(out, overwrite, folder) as beside, tempfile.TemporaryDirectory() as scratch:
        opened = open_source(source, checkpoint, credits)
        gguf = Path(scratch) / "model.gguf"
        ternary = write_gguf(gguf, opened, "TQ2_0")
        parts = {**wllama.load_runtime(runtime), "model": gguf.read_bytes()}
        template = page_template(can_chat(opened.tokenizer))
        values = page_values(opened, ternary)
        if not credits.get("name"):
            values["facts"]["name"] = _title(opened)
        files = page_files(template, parts, values, folder)
        log.info(f"{out}: a page of {sum(map(len, files.values())) / 1e6:.1f} MB")
        for name, data in files.items():
            (beside / name if folder else beside).write_bytes(data)
    return result_of(out, ternary, opened.model, _usage(out.as_posix(), folder))


def page_template(chats: bool = False) -> str:
    """The page for a model that was trained on conversations, or else the one for texts."""

    def read(*names: str) -> str:
        folder = resources.files("bitllm.export")
        return "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)

    form = read("page/chat.html" if chats else "page/text.html")
    script = read("page/tokens.js", "page/chat.js") if chats else read("page/text.js")
    expect = "It answers about what it was trained on, and gets the rest wrong."
    if not chats:
        expect = "It continues your text and answers no questions. It knows only what it has read."
    page = read("page.html").replace("{{form}}", form).replace("{{script}}", script)
    page = page.replace("{{expect}}", expect)
    return page.replace("{{settings}}", read("page/settings.html"))


def _title(source: Source) -> str:
    """What the model is, where nobody gave it a name."""
    data, size = str(source.facts.get("data")), f"{source.model.config.num_parameters / 1e6:.1f}M"
    if is_companion(data):
        return f"A companion with {size} parameters"
    if data in KNOWN:
        return f"A {size}-parameter model that has read only {KNOWN[data][0]}"
    return str(source.facts.get("name") or "A ternary language model")


def _chips(data: str) -> list[str]:
    """What works with a model of this data; the page begins with the first by itself."""
    if is_companion(data):
        said = shown(language_of(data))
        return [said[0], said[1], said[4]]
    return list(KNOWN.get(data, ("", ()))[1])


def page_values(source: Source, ternary_bytes: int) -> dict[str, Any]:
    """What the page's script reads. A fact may come from an unknown file, and be anything."""
    config, chats = source.model.config, can_chat(source.tokenizer)
    sampling = SAMPLING if chats else SamplingConfig()
    facts = {
        "name": "A ternary language model",
        **source.facts,
        "parameters": config.num_parameters,
        "context": config.max_position_embeddings,
        "bits_per_weight": 8 * ternary_bytes / num_ternary_weights(source.model),
        "exported": time.strftime("%Y-%m-%d"),
    }
    data = str(facts.get("data"))
    if data in KNOWN:
        facts["data"] = KNOWN[data][0]
    for key, value in facts.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            facts[key] = None if value is None else str(value)
    return {
        "facts": facts,
        "prompt": str(source.facts.get("prompt") or ""),
        "context": config.max_position_embeddings,
        "end": END_OF_TEXT,
        "chips": _chips(data),
        "chat": _chat_values(source) if chats else None,
        "sampling": {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "length": sampling.max_new_tokens,
        },
    }


def _chat_values(source: Source) -> dict[str, Any]:
    """What the page needs to make the tokens of a conversation as `encode_messages` does."""
    start, end = (source.tokenizer.token_to_id(name) for name in SPECIAL)
    added, mark = source.tokenizer.get_added_tokens_decoder(), MARKS[0].encode()
    return {
        "start": start,
        "end": end,
        "special": [i for i, x in added.items() if len(x.content.encode()) >= len(mark)],
        "room": room_of(source.model.config.max_position_embeddings),
        "marks": MARKS,
    }


def page_files(
    template: str, parts: dict[str, bytes], values: dict[str, Any], folder: bool
) -> dict[str, bytes]:
    """File name -> contents; one file unless `folder`.

    Args:
        parts: "library", "licence", "glue", "engine" (see wllama.py) and "model", a GGUF file.
        values: see `page_values`.
    """
    name, files = str(values["facts"]["name"]), {}
    holes = {
        "policy": "{{policy}}",
        "title": html.escape(name),
        "home": html.escape(HOME),
        "licence": html.escape(parts["licence"].decode()),
        "library": parts["library"].decode(),
        # "<" alone could end the script element that the JSON stands in
        "facts": json.dumps(values).replace("<", "\\u003c"),
    }
    beside = {"engine": "runtime.bin", "model": "model.gguf"} if folder else {}
    for part in ("glue", "engine", "model"):
        data, packed = parts[part], part not in beside or part != "model"
        if packed:
            data = gzip.compress(data, 9, mtime=0)
        holes[f"{part}_source"] = f'data-bytes="{len(data)}"'
        holes[part] = base64.b64encode(data).decode() if part not in beside else ""
        if part in beside:
            packing = "" if packed else ' data-packed="no"'
            holes[f"{part}_source"] += f' data-file="{beside[part]}"{packing}'
            files[beside[part]] = data
    page = re.sub(r"\{\{(\w+)\}\}", lambda hole: holes[hole[1]], template)
    page = page.replace("{{policy}}", _policy(page, folder), 1)
    if folder:
        files["README.md"] = _read_me(name).encode(errors="replace")
    return {"index.html": page.encode(errors="replace"), **files}


def _policy(page: str, folder: bool) -> str:
    """What the page may do: run its own scripts, known by hash, and nothing else."""

    def hashes(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in found)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')} 'wasm-unsafe-eval'; "
        f"style-src {hashes('style')}; worker-src blob:; img-src data:; "
        + ("connect-src 'self'; " if folder else "")
        + "base-uri 'none'; form-action 'none'"
    )


def _usage(path: str, folder: bool) -> str:
    if not folder:
        return "  any browser    open the file, from disk or from any web server"
    return f"""\
  here           python -m http.server --directory "{path}"     (from disk it does not open)
  GitHub Pages, Hugging Face   see "{path}/README.md\""""


def _read_me(name: str) -> str:
    title = json.dumps(name)  # YAML reads it as it is
    return f"""\
---
title: {title}
sdk: static
---

A small language model that runs in the visitor's browser. All files of this folder belong together.

- **GitHub Pages**: commit the files to a repository, then Settings > Pages > Deploy from a branch.
- **Hugging Face**: create a Space with the SDK "Static" and upload the files (the lines at the top
  of this file are for it), or run `hf upload OWNER/NAME . --repo-type space` in this folder.
- **Here**: `python -m http.server`, then open the address it prints.
"""
