"""The model card: what is known about a model, and the lines that load it."""

from __future__ import annotations

import json
import re
from typing import Any

from bitllm.conversations import can_chat
from bitllm.export.common import Source, num_ternary_weights
from bitllm_core import KNOWN_DATA

_CARD = """\
---
{front}
---
# {title}

A ternary (BitNet b1.58) language model, {made} with bitllm. It {does}.

| | |
| --- | --- |
{table}

{loading}
"""


def card_rows(source: Source, size: int | None = None) -> dict[str, str]:
    """What is known about a model, by name; `size` is that of its files, in bytes."""
    config, facts = source.model.config, source.facts
    tuned = {
        "tuned from": facts.get("base_name"),
        "sha256 of its weights": facts.get("base_sha256"),
        "which was trained on": facts.get("base_data"),
        "licence of that": facts.get("base_data_licence"),
    }
    rows = {
        "author": facts.get("author"),
        "licence": facts.get("licence"),
        **(tuned if facts.get("base_name") else {}),
        "trained on": facts.get("data"),
        "licence of that text": facts.get("data_licence"),
        "optimizer steps": facts.get("steps"),
        "training tokens": facts.get("tokens"),
        "loss of the last logged batch, nats per token": facts.get("loss"),
        "validation loss, nats per token": facts.get("val_loss"),
        "validation perplexity": facts.get("val_perplexity"),
        "parameters": config.num_parameters,
        "of which ternary": num_ternary_weights(source.model),
        "context, tokens": config.max_position_embeddings,
        **({} if size is None else {"size of the files, bytes": size}),
    }
    return {name: _shown(value) for name, value in rows.items()}


def model_card(source: Source, size: int, loading: str, library: str = "transformers") -> str:
    """README.md of a model on the hub.

    Args:
        size: of its files, in bytes.
        loading: Markdown that says how each program loads it.
        library: the one whose lines the hub shows for it.
    """
    facts, base = source.facts, str(source.facts.get("base_name") or "")
    known = re.match("hf:([^:#]+)", KNOWN_DATA.get(str(facts.get("data")), ""))
    front = [f"library_name: {library}", "pipeline_tag: text-generation"]
    front += [f"license: {json.dumps(facts['licence'])}"] if facts.get("licence") else []
    front += ["datasets:", f"- {known[1]}"] if known else []
    front += [f"base_model: {json.dumps(base)}"] if "/" in base else []
    does = "continues text; it\nwas not trained to follow instructions or to be right"
    if can_chat(source.tokenizer):
        does = "answers in conversations\nlike those it was trained on; what it says may be wrong"
    rows = card_rows(source, size)
    return _CARD.format(
        does=does,
        made=f"tuned from {base}" if base else "trained from scratch",
        front="\n".join(front),
        title=facts.get("name") or "A ternary language model",
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        loading=loading.strip(),
    )


def _shown(value: Any) -> str:
    if value is None:
        return "not stated"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
