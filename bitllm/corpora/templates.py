"""The companion's template files: tables of facts, and kinds of exchanges filled from them.

A file `<language>.json` has four parts. `persona`: who the companion is unless a user says
otherwise. `shown`: what a user says in the conversation that a training ends with. `tables`: a line
of column names, then the rows; the first column names a row. `kinds`: for each kind of exchange

- `ask`: ways to ask, and in `held_out` those that training never sees;
- `answer`: ways to answer, each of which must satisfy `needs`;
- `needs`: what a right answer contains; a list in it means any one of these;
- `then`: ways to ask the same about something else straight after ("And a cow?");
- `after`: the kind that has to come first in the conversation, whose slots are remembered;
- `unless`: a kind that must not have come before;
- `last`: whether the conversation ends here;
- `weight`: how often it comes, 1 where nothing is said.

`{animal}` is the first column of a row of the table `animal`, `{animal.sound}` another column,
`{Animal.a}` one with a capital letter. `{animal2}` is a second row of the same table: it differs
from the first in each column that the kind uses of it. `{me.name}` comes from the persona.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Row = Mapping[str, str]
Rows = Mapping[str, Row]  # a row of a table for each slot
Random = Callable[[], float]  # random.Random(seed).random: the one method that stays the same

LANGUAGES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.json")))
SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?\}")
HELD_OUT = 0.1  # of the combinations of a kind's fillers


@dataclass(frozen=True)
class Kind:
    """One kind of exchange, as its template file describes it."""

    name: str
    ask: list[str]
    held_out: list[str]
    answer: list[str]
    needs: list[str | list[str]]
    then: list[str] = field(default_factory=list)
    after: str = ""
    unless: str = ""
    last: bool = False
    weight: int = 1

    @cached_property
    def slots(self) -> list[str]:
        """The slots that a user fills in by asking."""
        return _slots(self.ask)

    def fillers(self, rows: Rows) -> tuple[str, ...]:
        """What a user says of these rows."""
        return tuple(_cell(rows[slot], column) for slot, column in self._said)

    @cached_property
    def _said(self) -> list[tuple[str, str]]:
        found = SLOT.findall(" ".join([*self.ask, *self.held_out, *self.then]))
        return sorted({(slot.lower(), column) for slot, column in found})

    @cached_property
    def columns(self) -> dict[str, set[str]]:
        """The columns that are used of each slot, "" for the first."""
        used: dict[str, set[str]] = {}
        for slot, column in SLOT.findall(" ".join([*self.ask, *self.answer])):
            used.setdefault(slot.lower(), set()).add(column)
        used.pop("me", None)
        return used


class Book:
    """The kinds of exchanges of a language and the tables behind them."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.persona: Row = content["persona"]
        self.shown: list[str] = content["shown"]
        self.tables: dict[str, list[Row]] = {
            name: [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
            for name, lines in content["tables"].items()
        }
        self.kinds = {name: Kind(name, **kind) for name, kind in content["kinds"].items()}
        begin = (kind for kind in self.kinds.values() if not kind.after)
        self.often = [kind for kind in begin for _ in range(kind.weight)]

    def remembered(self, kind: Kind) -> Kind:
        """The kind whose fillers an exchange is about: this one, or what was told before."""
        return self.kinds[kind.after] if kind.after else kind

    def draw(
        self,
        kind: Kind,
        ways: Sequence[str],
        random: Random,
        held_out: bool = False,
        other: Rows | None = None,
    ) -> tuple[str, Rows]:
        """One of these ways to ask and the fillers that are asked about (or were told before), none
        of them among `other`, those of the turn before."""
        while True:
            way, rows = pick(ways, random), self._rows(self.remembered(kind).slots, random)
            again = other and any(rows[slot] == other[slot] for slot in rows)
            fits = not again and self._differ(self.remembered(kind), rows)
            if fits and self.is_held_out(kind, way, rows) is held_out:
                return way, rows

    def ways(self, kind: Kind, rows: Rows) -> list[str]:
        """The ways to ask that training has together with these fillers."""
        return [way for way in kind.ask if not self.is_held_out(kind, way, rows)]

    def complete(self, kind: Kind, rows: Rows, random: Random) -> Rows:
        """The same rows, and some for the slots that only the answers have."""
        free = [slot for slot in kind.columns if slot not in rows]
        while True:
            found = {**rows, **self._rows(free, random)}
            if self._differ(kind, found):
                return found

    def is_held_out(self, kind: Kind, way: str, rows: Rows) -> bool:
        """Whether training never has this combination in an exchange of this kind.

        Of two fillers or more it is they, whatever the way to ask; a single one, also one that was
        told before, is combined with the way to ask: what is not known at all cannot be answered.
        """
        asked = self.remembered(kind)
        texts = asked.fillers(rows)
        if len(asked.slots) == 1:
            texts = (_letters(way), *texts)
        return bool(texts) and _share(kind.name, texts) < HELD_OUT

    def _rows(self, slots: Iterable[str], random: Random) -> dict[str, Row]:
        return {slot: pick(self.tables[_table(slot)], random) for slot in slots}

    def _differ(self, kind: Kind, rows: Rows) -> bool:
        pairs = ((slot, _table(slot)) for slot in rows if slot != _table(slot))
        return all(
            _cell(rows[slot], column) != _cell(rows[first], column)
            for slot, first in pairs
            if first in rows
            for column in kind.columns[slot]
        )


@lru_cache
def book(language: str) -> Book:
    """The templates of a language. ValueError: there are none."""
    if language not in LANGUAGES:
        expected = ", ".join(LANGUAGES)
        raise ValueError(f"language={language!r}: expected one of {expected}")
    path = Path(__file__).with_name(f"{language}.json")
    return Book(json.loads(path.read_text(encoding="utf-8")))


def fill(template: str, rows: Rows) -> str:
    """A template with its slots filled in, in one pass: what is filled in is never a slot."""

    def filler(match: re.Match[str]) -> str:
        slot, column = match.groups()
        text = _cell(rows[slot.lower()], column)
        return text[:1].upper() + text[1:] if slot[0].isupper() else text

    return SLOT.sub(filler, template)


def pick(choices: Sequence[T], random: Random) -> T:
    """One of the choices; random.choice may pick others in other versions of Python."""
    return choices[int(random() * len(choices))]


def _slots(templates: Iterable[str]) -> list[str]:
    found = (slot.lower() for slot, _ in SLOT.findall(" ".join(templates)))
    return sorted({*found} - {"me"})


def _table(slot: str) -> str:
    return slot.rstrip("0123456789")


def _cell(row: Row, column: str | None) -> str:
    return row[column] if column else next(iter(row.values()))


@cache
def _letters(text: str) -> str:
    """What is left of a text however it is typed: lower case letters without their accents."""
    decomposed = unicodedata.normalize("NFD", text.casefold())
    return "".join(c for c in decomposed if c.isalpha())


@cache
def _share(kind: str, texts: tuple[str, ...]) -> float:
    """A number from 0 to 1 that belongs to this kind with these fillers, on every machine."""
    digest = hashlib.sha256("\0".join([kind, *texts]).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32
