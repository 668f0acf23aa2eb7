"""The companion as a source of text (`--data companion`, `companion:es`), and how right it is."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from bitllm.chat import Chat
from bitllm.conversations import IM_END, as_text, encode_messages, require_chat
from bitllm.corpora import LANGUAGES, WHICH, Persona, Question, conversations, questions, shown
from bitllm_core import BitLM, DataConfig, Part, SamplingConfig, generate_tokens, num_ids, require

COUNTS = {"train": 20_000, "validation": 400}  # conversations
ANSWER_TOKENS = 60
BATCH = 100  # questions at once


def language_of(source: str) -> str:
    """The language in `companion:LANGUAGE`; English without one. ValueError: not known."""
    language = source.partition(":")[2] or "en"
    expected = f"companion:LANGUAGE, one of {', '.join(LANGUAGES)}"
    require(language in LANGUAGES, "data", source, expected)
    return language


def recorded_persona(given: str) -> str | None:
    """What DataConfig records of a character, given as a .json file or as `Persona.parse` takes it.

    It is what the file says, not its name: so a run has its character wherever it is resumed.
    """
    path = None
    with contextlib.suppress(OSError, RuntimeError):  # a long text, "~" without a home
        path = Path(given).expanduser() if Path(given).expanduser().is_file() else None
    return (Persona.read(path) if path else Persona.parse(given)).spelled() or None


def parts(source: str, split: str, config: DataConfig) -> Iterator[Part]:
    """The conversations of a split; those of the validation split are made from another seed."""
    language = language_of(source)
    if split in COUNTS:
        yield iter(_texts(language, config.persona or "", split, COUNTS[split])), False, True


@lru_cache(maxsize=2)
def _texts(language: str, persona: str, split: str, count: int) -> list[str]:
    """Kept, for they are read twice: by who trains the tokenizer, and as training text."""
    made = conversations(language, Persona.parse(persona), seed=list(COUNTS).index(split))
    return [*map(as_text, itertools.islice(made, count))]


def is_companion(source: str) -> bool:
    """Whether DataConfig.data names the companion, and not a mixture with it."""
    return source.partition(":")[0] == "companion" and "," not in source


def talk(model: BitLM, tokenizer: Any, source: str = "companion") -> Iterator[str]:
    """A short conversation with the model, greedy, a turn at a time; a user's begins with "> "."""
    chat = Chat(model, tokenizer, SamplingConfig(max_new_tokens=ANSWER_TOKENS, temperature=0))
    for said in shown(language_of(source)):
        yield f"> {said}"
        yield chat.answer(said)


def right_answers(
    model: BitLM,
    tokenizer: Any,
    source: str = "companion",
    persona: str | None = None,
    count: int = 200,
) -> dict[str, Any]:
    """Shares of right answers, greedy: of questions as trained on ("seen"), of combinations and of
    phrasings that were held out of the training text; `count` of each. And "wrong": how many
    answers of each kind of exchange were not. `persona` as in DataConfig."""
    require_chat(tokenizer)
    language, character = language_of(source), Persona.parse(persona or "")
    shares, wrong = {}, {}
    for which in WHICH:
        asked = questions(language, character, which, count, seed=0)
        answers = _answers(model, tokenizer, asked)
        kinds = [q.kind for q, a in zip(asked, answers, strict=True) if not q.right(a)]
        shares[which], wrong[which] = 1 - len(kinds) / count, dict(Counter(kinds).most_common())
    return {**shares, "wrong": wrong}


def _answers(model: BitLM, tokenizer: Any, asked: Sequence[Question]) -> Iterator[str]:
    sampling = SamplingConfig(max_new_tokens=ANSWER_TOKENS, temperature=0)
    end, size = tokenizer.token_to_id(IM_END), num_ids(tokenizer)
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        prompts = [encode_messages(tokenizer, question.messages) for question in batch]
        rows = zip(*generate_tokens(model, prompts, sampling, end, size), strict=True)
        for row in rows:
            yield tokenizer.decode([token for token in row if token is not None])
