"""Conversations as training text: ChatML, of which only the answers are learned.

A row with `messages` (role and content) or `conversations` (from and value) becomes a text between
two characters that no text has, for `bitllm_core` to read in pieces like any other. Its tokens have
a sign: those that are read but not predicted are stored as ~id, below zero. Loss, gradient and
evaluation take the mean over the others.

    <|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n
                                                             ^^^^^^ ^^^^^^^^^^  learned
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from bitllm_core import MARKS, Piece, end_of_text_id, require

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL = (IM_START, IM_END)
COLUMNS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""the same in Jinja, as exports carry it"""

Message = dict[str, str]


def messages_of(value: Any) -> list[Message] | None:
    """The messages of a column's value, in one shape; None where it is no conversation."""
    if not isinstance(value, list) or not value:
        return None
    found = []
    for item in value:
        if not isinstance(item, dict):
            return None
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        found.append({"role": _ROLES.get(role, role), "content": content})
    return found


def as_text(messages: Iterable[Message]) -> str:
    """Messages as one text whose marks are two characters that are in no text."""
    turns = ([message["role"], message["content"].strip()] for message in messages)
    clean = (["".join("\ufffd" if c in MARKS else c for c in part) for part in t] for t in turns)
    return "".join(f"{MARKS[0]}{role}\n{content}{MARKS[1]}\n" for role, content in clean)


def as_texts(
    rows: Iterable[dict[Any, Any]], wanted: str | None, source: Any
) -> Iterator[dict[Any, Any]]:
    """Rows, in which a conversation is the text.

    ValueError: no answer in the first of them that are conversations.
    """
    answers = silent = 0
    for row in rows:
        for column in (wanted,) if wanted else COLUMNS:
            messages = messages_of(row.get(column))
            if messages is None:
                continue
            answers += any(message["role"] == "assistant" for message in messages)
            silent += 1
            expected = f"turns of an assistant to learn in {source}; its first rows have none"
            require(bool(answers) or silent < 20, "text_column", column, expected)
            row = {wanted or "text": as_text(messages)}
            break
        yield row


def _turns(text: str, separator: int | None, marks: Sequence[int]) -> list[int | tuple[str, bool]]:
    """Signed marks, and texts with whether they are learned, of what `as_text` made."""
    (start, end), parts = marks, []
    for part in re.split(f"(?={MARKS[0]})", text):
        marked, (body, *rest) = part.startswith(MARKS[0]), part.strip(MARKS[0]).split(MARKS[1])
        role, newline, content = body.partition("\n") if marked else ("", "", body)
        learned = marked and role == "assistant"
        parts += [~start] * marked + [(role + newline, False), (content, learned)]
        parts += [end if learned else ~end, (rest[0], False)] if rest else []
    return parts if separator is None else [*parts, ~separator]


def encode_batch(tokenizer: Any, pieces: Iterable[Piece]) -> list[list[int]]:
    """Signed tokens of pieces of text: ~id for what is read but not predicted.

    A conversation that was cut begins or ends amid a turn; a beginning without its role is only
    read. Of any other text all is learned. One call of the tokenizer encodes all.
    """
    marks, separator = [tokenizer.token_to_id(name) for name in SPECIAL], end_of_text_id(tokenizer)
    parts: list[list[int | tuple[str, bool]]] = []
    for text, ends in pieces:
        last = separator if ends else None
        plain = [(text, True), *([] if last is None else [last])]
        parts.append(_turns(text, last, marks) if MARKS[0] in text else plain)
    texts = [part[0] for part in chain.from_iterable(parts) if isinstance(part, tuple)]
    encoded = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    batch: list[list[int]] = []
    for piece in parts:
        ids: list[int] = []
        for part in piece:
            found = [part] if isinstance(part, int) else next(encoded).ids
            only_read = isinstance(part, tuple) and not part[1]
            ids += [~token for token in found] if only_read else found
        batch.append(ids)
    return batch


def encode_messages(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The tokens to answer to: the messages, and the beginning of the assistant's turn.

    They are those of transformers' `apply_chat_template` with `add_generation_prompt`.
    """
    text = as_text(messages) + f"{MARKS[0]}assistant\n"
    [tokens] = encode_batch(tokenizer, [(text, False)])
    return [token if token >= 0 else ~token for token in tokens]


def mean_of_counted(loss: Tensor, parameters: Iterable[Tensor], windows: Tensor) -> None:
    """Turn loss and gradients, means over all targets, into those over the ones that count.

    windows: signed tokens of the whole step, (N, T + 1). Nothing changes where none counts.
    """
    share = (windows[:, 1:] >= 0).float().mean().item()
    for tensor in (loss, *(p.grad for p in parameters if p.grad is not None)) if share else ():
        tensor /= share


def can_chat(tokenizer: Any) -> bool:
    """Whether a tokenizer has the marks of a conversation, which a model then knows."""
    return all(tokenizer.token_to_id(name) is not None for name in SPECIAL)


def require_chat(tokenizer: Any) -> None:
    """ValueError, with what would do, where a model was not trained on conversations."""
    if not can_chat(tokenizer):
        raise ValueError(
            f"this model knows no conversations (its tokenizer has no {IM_END}); expected one "
            "that was trained on rows with messages. To continue a text, use generate"
        )


def add_marks(tokenizer: Any) -> None:
    """Give a tokenizer the marks of a conversation, where it has none."""
    tokenizer.add_special_tokens([name for name in SPECIAL if tokenizer.token_to_id(name) is None])
