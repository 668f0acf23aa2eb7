"""The language of the form, the live display and the boxes: English, or what a notebook chooses."""

from __future__ import annotations

import re

from bitllm.notebook.spanish import MESSAGES, TEXTS
from bitllm_core import require

LANGUAGES = {"en": ({}, {}), "es": (TEXTS, MESSAGES)}
"""By code: what `say` and `retold` look up, keyed by the English text."""

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
    return LANGUAGES[_chosen][0].get(text, text).format(**values)


def retold(message: str) -> str:
    """An English message in the chosen language; as it is where it is not known."""
    for english, other in LANGUAGES[_chosen][1].items():
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(english))
        if found := re.fullmatch(pattern, message, re.DOTALL):
            return other.format(**found.groupdict())
    return message
