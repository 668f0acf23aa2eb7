"""A web page in which the model runs, in any browser, without a server behind it."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import html
import json
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
from bitllm_core import END_OF_TEXT, MARKS, SamplingConfig, library, require

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
"""what a page exported as a folder consists of; a second model is beside.gguf"""
PAIRS = "a pair needs two models, ternary or dense, with block=bitnet and a tied embedding"


INTRO = {
    "chat": """\
A small language model with weights of −1, 0 and 1, trained from scratch. It runs
  inside this page: nothing is fetched from or sent to anywhere else. It answers about what it was \
trained on, and gets the rest wrong.""",
    "text": """\
A small language model with weights of −1, 0 and 1, trained from scratch. It runs
  inside this page: nothing is fetched from or sent to anywhere else. It continues your text and \
answers no questions. It knows only what it has read.""",
    "beside": """\
Two small language models get the same words, the same settings and the same seed. They run
  inside this page: nothing is fetched from or sent to anywhere else. One that was trained on \
conversations answers; any other continues your words.""",
}
"""what the page says about itself"""
ONE_TALK = """\
    <div id="talk" class="talk" role="log" tabindex="0" aria-label="Conversation"></div>
"""


def _is_export(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} - {"beside.gguf"} == FOLDER_FILES


@export_format(
    "html",
    flags={
        "runtime": Flag("--runtime", "folder with llama.cpp for browsers", metavar="DIR"),
        "beside": Flag("--beside", "a second model, or a step of the first", metavar="MODEL"),
    },
    is_export=_is_export,
)
def export_html(
    source: str | Path,
    out: str | Path,
    *,
    checkpoint: str | int = "last",
    runtime: str | Path | None = None,
    beside: str | Path | None = None,
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
        beside: a second model, as `source`, or a step of the run `source`, such as "500": the page
            asks both and shows their answers side by side. Either of a pair may be dense.
        credits: as `export_packed`; they appear on the page. A pair's `name` is its title.

    Raises:
        ValueError, FileNotFoundError: no such model, one that llama.cpp has no counterpart of
            (the message says why), `out` exists, or a file of `runtime` is not the expected one.
        ImportError: the package gguf is not installed.
        OSError: llama.cpp for browsers cannot be downloaded.
    """
    out = Path(out)
    folder = out.suffix != ".html"
    library("gguf", "an html export")
    with replacing(out, overwrite, folder) as target:
        opened = _opened(source, checkpoint, beside, credits)
        written = [_gguf_of(one, len(opened) > 1) for one in opened]
        models = dict(zip(("model", "beside"), (data for data, _ in written), strict=False))
        parts = {**wllama.load_runtime(runtime), **models}
        template = page_template(can_chat(opened[0].tokenizer), len(opened) > 1)
        each = [page_values(one, size) for one, (_, size) in zip(opened, written, strict=True)]
        values = each[0]
        if len(opened) > 1:
            values = pair_values(each[0], each[1], credits.get("name"))
        elif not credits.get("name"):
            values["facts"]["name"] = _title(opened[0])
        files = page_files(template, parts, values, folder)
        for name, data in files.items():
            (target / name if folder else target).write_bytes(data)
    return result_of(out, written[0][1], opened[0].model, _usage(out.as_posix(), folder))


def _opened(
    source: str | Path, checkpoint: str | int, beside: str | Path | None, credits: dict[str, Any]
) -> list[Source]:
    """The model, or both, by names that differ."""
    if beside is None:
        return [open_source(source, checkpoint, credits)]
    credits = {**credits, "name": None}
    step = int(str(beside)) if str(beside).isdecimal() else None
    pair = [open_source(source, checkpoint, credits)]
    pair.append(open_source(source if step else beside, step or "last", credits))
    kept = step is None or pair[1].facts.get("steps") == step
    require(kept, "beside", beside, f"a step of the run {source}, or a second model")
    names = [str(one.facts.get("name")) for one in pair]
    if step:
        names = [f"{names[0]}, step {one.facts.get('steps'):,}" for one in pair]
    elif names[0] == names[1]:  # a/run and b/run
        names = ["/".join(Path(path).parts[-2:]) for path in (source, beside)]
    return [
        dataclasses.replace(one, facts={**one.facts, "name": name})
        for one, name in zip(pair, names, strict=True)
    ]


def _gguf_of(source: Source, paired: bool) -> tuple[bytes, int]:
    """A model's GGUF file, and the bytes of its matrices. Only in a pair may it be dense."""
    kind = "F16" if paired and source.model.config.linear == "dense" else "TQ2_0"
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.gguf"
        try:
            size = write_gguf(path, source, kind)
        except ValueError as error:
            if not paired:
                raise
            raise ValueError(f"{source.facts['name']}: {error}. {PAIRS}") from error
        return path.read_bytes(), size


def page_template(chats: bool = False, paired: bool = False) -> str:
    """The page for a model that was trained on conversations, for texts, or for two models."""

    def read(*names: str) -> str:
        folder = resources.files("bitllm.export")
        return "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)

    kind = "beside" if paired else "chat" if chats else "text"
    script = read("page/text.js")
    if kind != "text":
        script = read("page/tokens.js", "page/talk.js", f"page/{kind}.js")
    talk = read("page/beside.html") if paired else ONE_TALK
    form = read("page/text.html" if kind == "text" else "page/chat.html").replace("{{talk}}", talk)
    page = read("page.html").replace("{{form}}", form)
    page = page.replace("{{script}}", script).replace("{{intro}}", INTRO[kind])
    second = '<script id="beside" type="text/plain" {{beside_source}}>{{beside}}</script>\n'
    page = page.replace("{{second}}", second if paired else "")
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
    if config.linear == "dense":
        facts["bits_per_weight"] = "full precision, not ternary"
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
        "marks": MARKS,
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
    }


def pair_values(first: dict[str, Any], second: dict[str, Any], name: str | None) -> dict[str, Any]:
    """What the script of a page for two models reads, from the `page_values` of each."""
    leads = first if first["chat"] or not second["chat"] else second
    names = [values["facts"]["name"] for values in (first, second)]
    return {
        **first,
        "title": name or " and ".join(names),
        "prompt": "",
        "chips": leads["chips"] or [leads["prompt"] or "hello"],
        "sampling": leads["sampling"],
        "beside": second,
    }


def page_files(
    template: str, parts: dict[str, bytes], values: dict[str, Any], folder: bool
) -> dict[str, bytes]:
    """File name -> contents; one file unless `folder`.

    Args:
        parts: "library", "licence", "glue", "engine" (see wllama.py) and "model", a GGUF file; for
            two models also "beside".
        values: see `page_values`.
    """
    name, files = str(values.get("title") or values["facts"]["name"]), {}
    holes = {
        "policy": "{{policy}}",
        "title": html.escape(name),
        "home": html.escape(HOME),
        "licence": html.escape(parts["licence"].decode()),
        "library": parts["library"].decode(),
        # "<" alone could end the script element that the JSON stands in
        "facts": json.dumps(values).replace("<", "\\u003c"),
    }
    beside = {}
    if folder:
        beside = {"engine": "runtime.bin", "model": "model.gguf", "beside": "beside.gguf"}
    for part in ("glue", "engine", *(x for x in ("model", "beside") if x in parts)):
        data, packed = parts[part], part not in beside or part == "engine"
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
