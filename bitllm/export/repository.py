"""A model as one repository of the hub: card, transformers folder, GGUF file and web page."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from bitllm.conversations import can_chat
from bitllm.export.card import model_card
from bitllm.export.common import Source, end_id, export_limits, open_source
from bitllm.export.gguf import export_gguf, llama_command, ollama_settings
from bitllm.export.hub import on_this_disk, push_to_hub, require_name
from bitllm.export.huggingface import COMPILER_NOTE, export_hf, hf_limits
from bitllm.export.llama_vocabulary import llama_vocabulary
from bitllm.export.packed import export_packed
from bitllm.export.webpage import export_html
from bitllm_core import library, log, read_json, require


def publish(
    source: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = True,
    checkpoint: str | int = "last",
    options: dict[str, dict[str, Any]] | None = None,
    **credits: str | None,
) -> str:
    """Export a model in all forms and upload them to one repository of the hub, in one commit.

    Nothing is uploaded unless every form was written: see `export_repository`.

    Args:
        source, checkpoint, options, credits: as for `export_repository`.
        repo_id, token, private: as for `push_to_hub`, which this calls.

    Returns:
        the address of the repository.

    Raises:
        ValueError, FileNotFoundError, ImportError, OSError: what the exports and the upload raise.
    """
    require_name(repo_id)
    library("huggingface_hub", "an upload to the hub")
    with tempfile.TemporaryDirectory() as scratch:
        folder, more = Path(scratch) / repo_id.partition("/")[2], {"options": options, **credits}
        export_repository(source, folder, repo_id, checkpoint=checkpoint, **more)
        return push_to_hub(folder, repo_id, token, private)


def export_repository(
    source: str | Path,
    folder: Path,
    repo_id: str,
    *,
    checkpoint: str | int = "last",
    options: dict[str, dict[str, Any]] | None = None,
    **credits: str | None,
) -> None:
    """Write what a repository holds: the model for every program that can load it, and a card.

    A model that only this program can load becomes one packed file. What else cannot hold the model
    is left out, and the log says why.

    Args:
        source, checkpoint, credits: as `export_packed`; the model's name is that of the repository.
        folder: made here.
        options: format -> keywords of its export, such as {"gguf": {"kind": "TQ1_0"}}.

    Raises:
        What the exports raise.
    """
    source, name, given = on_this_disk(source), repo_id.partition("/")[2], options or {}
    credits = {**credits, "name": credits.get("name") or name}
    opened = open_source(source, checkpoint, credits)
    config, asked = opened.model.config, {"checkpoint": checkpoint, **credits}
    if hf_limits(config):
        folder.mkdir()
        export_packed(source, folder / f"{name}.safetensors", **asked, **given.get("packed", {}))
    else:
        export_hf(source, folder, **asked, **given.get("hf", {}))
        if kind := _gguf_kind(opened, given.get("gguf", {}).get("kind")):
            export_gguf(source, folder / f"{name}-{kind}.gguf", kind=kind, **asked)
            template, parameters = ollama_settings(config, can_chat(opened.tokenizer))
            (folder / "template").write_text(template, encoding="utf-8")
            (folder / "params").write_text(json.dumps(parameters, indent=1), encoding="utf-8")
            if not export_limits(config):
                export_html(source, folder / "index.html", **asked, **given.get("html", {}))
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md")
    library = "bitllm" if hf_limits(config) else "transformers"
    card = model_card(opened, size, _loading(opened, folder, repo_id), library)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _gguf_kind(source: Source, asked: str | None) -> str | None:
    """The type of the GGUF file's matrices; None where llama.cpp cannot hold the model."""
    limits = export_limits(source.model.config)
    try:
        end_id(source.tokenizer)
        llama_vocabulary(source.tokenizer, source.model.config.vocab_size)
    except ValueError as error:
        require(not asked, "kind", asked, f"none: {error}")
        log.info(f"without GGUF file and web page: {error}")
        return None
    if limits and not asked:
        log.info(f"without web page, and F16 in the GGUF file: {'; '.join(limits)}")
    return asked or ("F16" if limits else "TQ2_0")


_TRANSFORMERS = """\
**transformers** (`pip install transformers accelerate`), in float32, this repository's dtype:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```
{note}
"""
_GGUF = """\
**ollama**, and **llama.cpp**:

```bash
ollama run hf.co/{repo}:{kind}
{llama}
```
"""
_PAGE = """\
**A browser**: the page holds the model and sends nothing anywhere. Download it and open the file:

```bash
hf download {repo} index.html --local-dir .
```
"""
_BITLLM = """\
**bitllm**, also to train on from these weights:

```bash
bitllm {command}
bitllm train --init-from hf:{repo} --data my.txt --out runs/more
```
"""


def _loading(source: Source, folder: Path, repo_id: str) -> str:
    """The part of the card that has a line for every program."""
    chats, parts = can_chat(source.tokenizer), ["## Using it\n"]
    if (folder / "config.json").exists():
        dense = "quantization_config" not in (read_json(folder / "config.json") or {})
        parts.append(_TRANSFORMERS.format(repo=repo_id, note="" if dense else COMPILER_NOTE))
    for path in folder.glob("*.gguf"):
        llama = llama_command(
            source.model.config, chats, f"--hf-repo {repo_id} --hf-file {path.name}"
        )
        kind = path.stem.rpartition("-")[2]
        parts.append(_GGUF.format(repo=repo_id, kind=kind, llama=llama))
    if (folder / "index.html").exists():
        parts.append(_PAGE.format(repo=repo_id))
    command = "chat --model" if chats else 'generate --prompt "..." --model'
    parts.append(_BITLLM.format(repo=repo_id, command=f"{command} hf:{repo_id}"))
    return "\n".join(parts)
