"""Tokenizers in llama.cpp's terms: which of its models and pre-tokenizers gives the same ids.

What is read is the tokenizer.json; what is known was compared on the difficult strings of
tests/export. Anything else is refused, for a wrong name loads and silently gives other ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from bitllm_core import log

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's types of tokens"""
SPACE = "\u2581"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS, _ONE_DIGIT = (_CONTRACTIONS + digits + _REST for digits in (r"\p{N}{1,3}", r"\p{N}"))
_BYTES, _GPT_2 = ("ByteLevel", False), ("ByteLevel", True)
_PRE_TOKENIZERS = {  # steps, and whether a word that is a token is taken as it is -> the name
    ((_GPT_2,), False): "gpt-2",
    ((("Digits", True), _GPT_2), False): "smollm",
    ((("Split", _THREE_DIGITS), _BYTES), True): "llama-bpe",
    ((("Split", _THREE_DIGITS), _BYTES), False): "dbrx",
    ((("Split", _ONE_DIGIT), _BYTES), False): "qwen2",
}


@dataclass
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str
    """llama.cpp's name of the kind: gpt2 (byte-level BPE), llama (SentencePiece's BPE), t5"""
    tokens: list[str]
    types: list[int]
    pre: str = "default"
    """name of the pre-tokenizer"""
    merges: list[str] | None = None
    scores: list[float] | None = None
    add_space_prefix: bool = False
    unknown: int | None = None
    """id of the unknown token"""


@dataclass
class _Json:
    """The parts of a tokenizer.json, and how its tokens are numbered."""

    model: dict[str, Any]
    normalizers: list[dict[str, Any]]
    pre_tokenizers: list[dict[str, Any]]
    tokens: list[str]
    types: list[int]
    ids: dict[str, int] = field(default_factory=dict)


def llama_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Tokens and settings with which llama.cpp gives the tokenizer's ids; `rows` tokens in all.

    ValueError: llama.cpp has no tokenizer that would; the message says where it differs.
    """
    described = json.loads(tokenizer.to_str())
    kinds = {"BPE": _byte_level, "Unigram": _unigram}
    parts = _Json(
        described["model"],
        _flat(described["normalizer"], "normalizers"),
        _flat(described["pre_tokenizer"], "pretokenizers"),
        *_tokens(tokenizer, described["added_tokens"], rows),
        tokenizer.get_vocab(with_added_tokens=True),
    )
    kind = parts.model["type"]
    make = _byte_fallback if parts.model.get("byte_fallback") else kinds.get(kind, _refused)
    if parts.model.get("byte_fallback") and kind != "BPE":
        raise _refusal(f"it is {kind} with a fallback to bytes")
    if any("\0" in token for token in parts.tokens):
        raise _refusal("one of its tokens has the character NUL")
    if len({*parts.tokens}) < len(parts.tokens):
        raise _refusal("two of its tokens are the same text")
    return make(parts)


def _refusal(why: str) -> ValueError:
    return ValueError(
        f"the tokenizer has no counterpart in llama.cpp: {why}. Export to hf or packed"
    )


def _flat(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, a sequence or not."""
    if part is None:
        return []
    return [s for p in part[name] for s in _flat(p, name)] if part["type"] == "Sequence" else [part]


def _tokens(tokenizer: Any, added: list[dict[str, Any]], rows: int) -> tuple[list[str], list[int]]:
    """Tokens by id and their types: special ones are marks, other added ones found in any text."""
    by_id = {i: text for text, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    types = dict.fromkeys(by_id, NORMAL)
    for token in added:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        odd = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        if odd and not token["special"]:
            raise _refusal(f"its token {token['content']!r} has {odd[0]}")
    ids = range(rows)
    return [by_id.get(i, f"[PAD{i}]") for i in ids], [types.get(i, UNUSED) for i in ids]


def _refused(parts: _Json) -> Vocabulary:
    kind = parts.model["type"]
    if kind == "WordPiece":  # its own tokenizer's beginning and end surround every prompt
        raise _refusal(
            "it is WordPiece, which llama.cpp reads for embeddings, not to continue text"
        )
    raise _refusal(f"it is {kind}")


def _byte_level(parts: _Json) -> Vocabulary:
    """Byte-level BPE, if llama.cpp splits words as it does."""
    model, ignores = parts.model, bool(parts.model.get("ignore_merges"))
    pre = _PRE_TOKENIZERS.get((tuple(map(_step, parts.pre_tokenizers)), ignores))
    if pre is None or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        names = " and ".join(step["type"] for step in parts.pre_tokenizers) or "no pre-tokenizer"
        known = ", ".join(_PRE_TOKENIZERS.values())
        raise _refusal(f"it is BPE after {names}, in a form other than that of {known}")
    for step in parts.normalizers:
        if step["type"] != "NFC":
            raise _refusal(f"it normalizes text by {step['type']}")
        log.warning(
            "llama.cpp does not compose characters (NFC): decomposed text gets other tokens"
        )
    merges = [" ".join(pair) for pair in model["merges"]]
    return Vocabulary("gpt2", parts.tokens, parts.types, pre, merges)


def _step(step: dict[str, Any]) -> tuple[str, Any]:
    """A pre-tokenizer as `_PRE_TOKENIZERS` writes it; else what is in no entry there."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step.get("use_regex", True)
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return kind, step["pattern"].get("Regex")
    return kind, None


def _byte_fallback(parts: _Json) -> Vocabulary:
    """BPE with a fallback to bytes: SentencePiece's, as Llama 2, Mistral and Gemma have it."""
    tokens, types, ids = parts.tokens, list(parts.types), parts.ids
    missing = [name for name in (f"<0x{i:02X}>" for i in range(256)) if name not in ids]
    if missing:
        raise _refusal(f"its vocabulary lacks the byte {missing[0]}")
    for i in range(256):
        types[ids[f"<0x{i:02X}>"]] = BYTE
    prefix = _space_prefix(parts)
    ranks = _ranks(parts)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    unknown = ids.get(parts.model.get("unk_token") or "")
    if unknown is not None:
        types[unknown] = UNKNOWN
    options = {"scores": scores, "add_space_prefix": prefix, "unknown": unknown}
    return Vocabulary("llama", tokens, types, **options)


def _space_prefix(parts: _Json) -> bool:
    """Whether a text gets a space in front; ValueError where spaces become anything but U+2581."""
    steps = [_spelled(step) for step in parts.normalizers]
    prefix = steps[:1] == [("Prepend", SPACE)]
    rest, splits = steps[prefix:], [_spelled(step) for step in parts.pre_tokenizers]
    inner = any(SPACE in token[1:] for token in parts.ids)
    if rest == [("Replace", " ", SPACE)] and splits in ([], [("Split", " ", "MergedWithPrevious")]):
        return prefix  # after the replacement there is no " " to split at
    if not steps and splits == [("Metaspace", SPACE, "never", False)]:
        return False
    if not steps and splits == [("Metaspace", SPACE, "never", True)] and not inner:
        return False
    names = (
        ", ".join(step["type"] for step in parts.normalizers + parts.pre_tokenizers) or "nothing"
    )
    raise _refusal(
        f"it is {parts.model['type']} after {names}; known is Replace of a space, after Prepend or "
        "not, or Metaspace that prepends never"
    )


def _spelled(step: dict[str, Any]) -> tuple[Any, ...]:
    """What matters of a step, in a form that compares."""
    kind, pattern = step["type"], step.get("pattern", {}).get("String")
    if kind == "Metaspace":
        prepend = step.get("prepend_scheme", "always")
        return kind, step["replacement"], prepend, step.get("split", True)
    if kind == "Replace":
        return kind, pattern, step["content"]
    if kind == "Split" and not step["invert"]:
        return kind, pattern, step["behavior"]
    return kind, step.get("prepend")


def _ranks(parts: _Json) -> dict[str, int]:
    """The order in which tokens are merged.

    llama.cpp joins any two neighbours whose text is a token, the first in this order. So every such
    pair has to be among the merges, and those of one token have to follow one another.
    """
    ranks: dict[str, int] = {}
    pairs: set[tuple[str, str]] = set()
    last = None
    for first, second in parts.model["merges"]:
        token = first + second
        if token != last and token in ranks:
            raise _refusal(f"the merges that make {token!r} do not follow one another")
        ranks.setdefault(token, len(ranks))
        pairs.add((first, second))
        last = token
    made = {token for token in parts.ids if len(token) == 1 or token in ranks}
    for token in parts.ids:
        for at in range(1, len(token)):
            pair = token[:at], token[at:]
            if pair not in pairs and made.issuperset(pair):
                raise _refusal(
                    f"its merges are not SentencePiece's: {pair[0]!r} and {pair[1]!r} stay apart, "
                    f"and {token!r} is a token"
                )
    return ranks


def _unigram(parts: _Json) -> Vocabulary:
    """Unigram without a table of compatible characters, which llama.cpp reads in another way."""
    types, unknown = list(parts.types), parts.model["unk_id"]
    prefix = _space_prefix(parts)
    pieces = dict(parts.model["vocab"])
    scores = [float(pieces.get(token, 0.0)) for token in parts.tokens]
    for i, token in enumerate(parts.tokens):
        if types[i] == UNUSED:
            types[i] = CONTROL  # an unused one would be read in a text
        if token in pieces and types[i] == CONTROL:
            types[i] = NORMAL  # the library, too, finds it in any text
    return Vocabulary("t5", parts.tokens, types, "default", None, scores, prefix, unknown)
