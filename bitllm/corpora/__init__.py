"""The built-in companion: endless small conversations of a character that users can make theirs.

A toy world of simple sentences in English and Spanish, made from the templates beside this file.
Some combinations of what is asked about and some ways to ask never occur in the conversations, and
every question carries a check of its answer: so what a model learned can be measured.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import bitllm.corpora.talk as talk
from bitllm.corpora.templates import LANGUAGES, Row, book, fill

__all__ = ["LANGUAGES", "WHICH", "Persona", "Question", "conversations", "questions", "shown"]

WHICH = ("seen", "combinations", "phrasings")
_NEXT_FIELD = re.compile(r";\s*(?=\w+\s*=)")


@dataclass(frozen=True)
class Persona:
    """Who the companion is. What is empty comes from the language's template file."""

    name: str = ""
    home: str = ""  # "I live in ..."
    likes: str = ""  # "I like ..."
    maker: str = ""  # "I was made by ..."
    motto: str = ""  # a sentence of its own

    @classmethod
    def read(cls, path: str | Path) -> Persona:
        """From a .json file with some of these fields. ValueError names the file and the field."""
        return cls._from_json(Path(path).read_bytes(), str(path))

    @classmethod
    def parse(cls, text: str) -> Persona:
        """From `name=TEXT; home=TEXT` with some of these fields, or the same as a JSON object.

        A text may have semicolons, but none before a word and "=". ValueError names the field.
        """
        where = f"persona={text!r}"
        if text.lstrip().startswith("{"):
            return cls._from_json(text, where)
        pairs = [part.partition("=") for part in _NEXT_FIELD.split(text.strip(" ;"))]
        if pairs == [("", "", "")]:
            return cls()
        names = [name.strip() for name, _, _ in pairs]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError(
                f'{where}: expected "name=TEXT; home=TEXT", of {_names(cls)}; '
                "--persona and the notebooks take a .json file that exists, too"
            )
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{where}: {min(twice)} is given twice")
        values = (value.strip() for _, _, value in pairs)
        return cls._checked(dict(zip(names, values, strict=True)), where)

    @classmethod
    def _from_json(cls, text: str | bytes, where: str) -> Persona:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: cannot be read as .json ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{where}: expected an object with {_names(cls)}")
        return cls._checked(content, where)

    @classmethod
    def _checked(cls, content: dict[str, Any], where: str) -> Persona:
        for name, value in content.items():
            if name not in _names(cls).split(", "):
                raise ValueError(f"{where}: {name!r} is no field; expected {_names(cls)}")
            lone = isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value)
            if not isinstance(value, str) or not value.strip() or lone:
                raise ValueError(f"{where}: {name}={value!r}: expected a text that is not empty")
        return cls(**content)

    def spelled(self) -> str:
        """As `parse` reads it, the same for the same character; empty: all is the language's."""
        own = {name: value for name, value in asdict(self).items() if value}
        text = "; ".join(f"{name}={value}" for name, value in own.items())
        try:
            same = Persona.parse(text) == self
        except ValueError:
            same = False
        return text if same else json.dumps(own, ensure_ascii=False)

    def row(self, language: str) -> Row:
        """Its fields, with the language's own where they are empty."""
        return {**book(language).persona, **{k: v for k, v in asdict(self).items() if v}}


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a user's turn, and what a right answer to it contains."""

    messages: list[dict[str, str]]
    kind: str
    needs: tuple[tuple[str, ...], ...]  # of each group one

    def right(self, answer: str) -> bool:
        """Whether the answer has what it needs, whatever its case, marks and spaces."""
        return all(any(_contains(answer, text) for text in group) for group in self.needs)


def conversations(
    language: str = "en", persona: Persona | None = None, seed: int = 0
) -> Iterator[list[dict[str, str]]]:
    """Endless conversations as lists of messages, the same ones for a seed on every machine."""
    templates, me = book(language), (persona or Persona()).row(language)
    number = random.Random(seed).random
    return (talk.messages(talk.conversation(templates, me, number)) for _ in repeat(None))


def shown(language: str = "en") -> list[str]:
    """What a user says in the short conversation that shows what a model has learned."""
    return book(language).shown


def questions(
    language: str = "en",
    persona: Persona | None = None,
    which: str = "seen",
    count: int = 100,
    seed: int = 0,
) -> list[Question]:
    """Questions of the kinds that training has, each kind about as often as any other.

    `which`: "seen" is asked as in training; "combinations" is about fillers that never occur there
    in exchanges of that kind; "phrasings" is asked in ways that never occur there.
    """
    if which not in WHICH:
        raise ValueError(f"which={which!r}: expected one of {', '.join(WHICH)}")
    templates, me = book(language), (persona or Persona()).row(language)
    number, found = random.Random(f"{which} {seed}").random, []
    endless = talk.last_exchanges(templates, me, which, number)
    for exchanges in islice(endless, count):
        last = exchanges[-1]
        groups = ([need] if isinstance(need, str) else need for need in last.kind.needs)
        rows = {**last.rows, "me": me}
        needs = tuple(tuple(fill(text, rows) for text in group) for group in groups)
        found.append(Question(talk.messages(exchanges)[:-1], last.kind.name, needs))
    return found


def _names(config: Any) -> str:
    return ", ".join(field.name for field in fields(config))


def _contains(answer: str, text: str) -> bool:
    """Whether these words are in the answer one after the other; what has no letters, as it is."""
    words = _words(text)
    return f" {words} " in f" {_words(answer)} " if words else text.strip() in answer


def _words(text: str) -> str:
    """Lower case, and single spaces for all that is no letter, number or accent on one."""
    text = unicodedata.normalize("NFC", text).casefold()
    kept = (c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return " ".join("".join(kept).split())
