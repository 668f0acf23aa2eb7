"""Conversations out of templates, typed as people type, and questions to check a model with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bitllm.corpora.templates import Book, Kind, Random, Row, Rows, fill, pick

WORD = re.compile(r"\{[^}]*\}|[^\W\d_]{4,}")  # a slot, or a word that is long enough for a typo
ACCENTS = str.maketrans("áéíóúüÁÉÍÓÚÜ", "aeiouuAEIOUU")
TURNS = 5  # of the user, at most
# How often users ask on about something else, come back to what they told, and how they type.
ASK_ON, COME_BACK = 0.5, 0.85
LOWER, NO_MARK, NO_OPENING, NO_ACCENTS, TYPO = 0.85, 0.5, 0.8, 0.3, 0.02


@dataclass(frozen=True)
class Exchange:
    """A user's turn and its answer, and what they were made of."""

    kind: Kind
    way: str
    rows: Rows
    user: str
    assistant: str


def conversation(book: Book, me: Row, random: Random) -> list[Exchange]:
    """One conversation of the training text."""
    turns, done = 1 + int(random() * TURNS), []
    while len(done) < turns and not (done and done[-1].kind.last):
        done.append(_next(book, me, random, done))
    return done


def _next(book: Book, me: Row, random: Random, done: Sequence[Exchange]) -> Exchange:
    """The exchange that follows these."""
    before = {exchange.kind.name: exchange for exchange in done}
    if done and done[-1].kind.then and random() < ASK_ON:
        kind = done[-1].kind
        way, rows = book.draw(kind, kind.then, random, other=done[-1].rows)
        return exchange(book, kind, way, rows, me, random)
    told = [kind for kind in book.kinds.values() if kind.after in before]
    told = [kind for kind in told if kind.name not in before]
    if told and random() < COME_BACK:
        kind = pick(told, random)
        rows = before[kind.after].rows
        return exchange(book, kind, pick(book.ways(kind, rows), random), rows, me, random)
    kind = pick(book.often, random)
    while kind.name in before or kind.unless in before:
        kind = pick(book.often, random)
    return exchange(book, kind, *book.draw(kind, kind.ask, random), me, random)


def exchange(book: Book, kind: Kind, way: str, rows: Rows, me: Row, random: Random) -> Exchange:
    """Ask in this way about these fillers, and answer."""
    user = typed(way, rows, random)
    rows = book.complete(kind, rows, random)
    return Exchange(kind, way, rows, user, fill(pick(kind.answer, random), {**rows, "me": me}))


def typed(template: str, rows: Rows, random: Random) -> str:
    """A user's turn as people type it. A typo is never in what is asked about."""
    words = [match for match in WORD.finditer(template) if match[0][0] != "{"]
    if words and random() < TYPO:
        word = pick(words, random)
        at = word.start() + 1 + int(random() * (len(word[0]) - 2))
        letter, after = template[at], template[at + 1]
        wrong = pick(["", letter * 2 + after, after + letter], random) or after
        template = template[:at] + wrong + template[at + 2 :]
    text = fill(template, rows)
    if random() < LOWER:
        text = text.lower()
    if random() < NO_MARK:
        text = text.rstrip(".?!")
    if random() < NO_OPENING:
        text = text.replace("¿", "").replace("¡", "")
    return text.translate(ACCENTS) if random() < NO_ACCENTS else text


def messages(exchanges: Sequence[Exchange]) -> list[dict[str, str]]:
    """Exchanges as chat messages."""
    return [
        {"role": role, "content": text}
        for exchange in exchanges
        for role, text in (("user", exchange.user), ("assistant", exchange.assistant))
    ]


def last_exchanges(book: Book, me: Row, which: str, random: Random) -> Iterator[list[Exchange]]:
    """Endless conversations whose last exchange is one of `which`; each kind as often as others."""
    kinds = [k for k in book.kinds.values() if which != "combinations" or book.remembered(k).slots]
    held_out = which == "combinations"
    while True:
        round_of, left = [], [*kinds]
        while left:
            round_of.append(left.pop(int(random() * len(left))))
        for kind in round_of:
            ways, start = kind.held_out if which == "phrasings" else kind.ask, []
            asked_on = bool(kind.then) and which != "phrasings" and random() < 0.25
            way, rows = book.draw(kind, kind.then if asked_on else ways, random, held_out)
            if kind.after:
                first = book.kinds[kind.after]
                told = pick(book.ways(first, rows), random)
                start = [exchange(book, first, told, rows, me, random)]
            elif asked_on:
                earlier = book.draw(kind, kind.ask, random, other=rows)
                start = [exchange(book, kind, *earlier, me, random)]
            yield [*start, exchange(book, kind, way, rows, me, random)]
