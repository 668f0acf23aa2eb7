"""The language of the form, the live display and the boxes: English, or what a notebook chooses."""

from __future__ import annotations

import re
import string
from typing import Any

from bitllm.notebook.spanish import MESSAGES, TEXTS
from bitllm_core import require

LANGUAGES = {"en": ({}, {}), "es": (TEXTS, MESSAGES)}
"""By code: what `say` and `retold` look up, keyed by the English text."""

SIGNS = {"en": {}, "es": str.maketrans({",": "\N{NO-BREAK SPACE}", ".": ","})}
"""In numbers: Spanish reads 1,024 as a little more than one."""
_chosen = "en"


def speak(language: str) -> None:
    """Show the form, the live display and the boxes in a language from now on.

    Log lines and exceptions stay in English.

    Args:
        language: "en", as without a call, or "es".

    Raises:
        ValueError: there is no such language.
    """
    global _chosen
    require(language in LANGUAGES, "language", language, f"one of {', '.join(LANGUAGES)}")
    _chosen = language


def say(text: str, /, **values: object) -> str:
    """A text in the chosen language, with `values` for its {placeholders}."""
    return _Formatter().format(LANGUAGES[_chosen][0].get(text, text), **values)


def number(value: float, form: str) -> str:
    """A number in a format such as ",.3f", as the chosen language writes it."""
    return format(value, form).translate(SIGNS[_chosen])


class _Formatter(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        known = isinstance(value, (int, float))
        return number(value, format_spec) if known else super().format_field(value, format_spec)


def retold(message: str) -> str:
    """An English message in the chosen language; as it is where it is not known."""
    for english, other in LANGUAGES[_chosen][1].items():
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(english))
        if found := re.fullmatch(pattern, message, re.DOTALL):
            return other.format(**found.groupdict())
    return message
