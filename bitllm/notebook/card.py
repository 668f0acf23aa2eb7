"""The live display as HTML: a headline, four tiles, what the model says, and its curve."""

from __future__ import annotations

import base64
import html
import math
from typing import Any

from bitllm.notebook.figures import ACCENT, INK, figure_png, loss_figure, ternary_figure
from bitllm.notebook.language import say

Sample = tuple[int, list[tuple[bool, str]]]
"""A step, and what was said: whether by the user, and the text."""
CARD = f"color:{INK};line-height:1.4;max-width:900px"
_EDGE = "border:1px solid rgba(130,130,130,.35);border-radius:8px"
_SOFT = "opacity:.75;font-size:12px"
_BUBBLE = "display:inline-block;max-width:90%;text-align:left;white-space:pre-wrap;"
_BUBBLE += "overflow-wrap:anywhere;padding:4px 10px;border-radius:12px;margin:2px 0"
_ASKED, _ANSWERED = "background:#0b5cad;color:#ffffff", "background:rgba(130,130,130,.18)"


def duration(seconds: float) -> str:
    """Time for people: seconds, minutes, hours or days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return say("{hours:.1f} hours", hours=seconds / 3600)
    return say("{days:.1f} days", days=seconds / 86_400)


def bubbles(turns: list[tuple[bool, str]]) -> str:
    """A conversation as HTML: the user's turns on the right, the answers on the left."""
    return "".join(
        f'<div style="text-align:{"right" if user else "left"}"><span style="'
        f'{_ASKED if user else _ANSWERED};{_BUBBLE}">{html.escape(text)}</span></div>'
        for user, text in turns
    )


def continued(prompt: str, text: str) -> str:
    """A text that the model wrote, after its beginning in grey."""
    return (
        f'<div style="{CARD};white-space:pre-wrap;overflow-wrap:anywhere"><span style="'
        f'opacity:.6">{html.escape(prompt)}</span>{html.escape(text)}</div>'
    )


def card(
    head: str,
    facts: dict[str, str],
    lines: list[dict[str, Any]],
    max_steps: int,
    samples: list[Sample],
    hint: str = "",
) -> str:
    """The whole display. `facts` are those of `run_facts` and more; `hint` is a small line."""
    known = dict(facts)
    step = known.pop("step", "0")
    done = min(1.0, max((line["step"] for line in lines), default=0) / max_steps)
    shape = "border-radius:4px;height:6px"
    bar = (
        f'<div style="background:rgba(130,130,130,.25);{shape};margin:6px 0">'
        f'<div style="background:{ACCENT};{shape};width:{done:.0%}"></div></div>'
    )
    left = known.pop("time left", "")
    where = known.pop("validated at", "")
    tiles = [
        _tile(
            say("progress"), say("step {step}", step=step), f"{bar}<span>{html.escape(left)}</span>"
        ),
        _tile(say("loss"), known.pop("loss", "–"), say("on the text it learns from")),
        _tile(
            say("validation loss"),
            known.pop("validation loss", "–"),
            say("on text it has not seen, {where}", where=where).strip(", "),
        ),
        _tile(say("speed"), known.pop("tokens/s", "–"), say("tokens per second")),
    ]
    more = " · ".join(f"{html.escape(say(k))} {html.escape(v)}" for k, v in known.items())
    small = "".join(f'<div style="{_SOFT}">{text}</div>' for text in (more, hint) if text)
    return (
        f'<div style="{CARD}"><div style="font-size:15px;font-weight:600;margin:6px 0">'
        f"{html.escape(head)}</div>"
        f'<div style="display:flex;flex-wrap:wrap;gap:8px">{"".join(tiles)}</div>'
        f"{_samples(samples)}{_picture(lines, max_steps)}{small}</div>"
    )


def _tile(name: str, value: str, below: str) -> str:
    return (
        f'<div style="{_EDGE};padding:6px 12px;flex:1 1 130px;min-width:0">'
        f'<div style="{_SOFT}">{name}</div><div style="font-size:18px">{html.escape(value)}</div>'
        f'<div style="{_SOFT}">{below}</div></div>'
    )


def _samples(samples: list[Sample]) -> str:
    """The first, a middle and the newest of what the model said, side by side."""
    if not samples:
        return ""
    numbers = sorted({0, (len(samples) - 1) // 2, len(samples) - 1})
    shown = [
        f'<div style="{_EDGE};padding:6px 12px;flex:1 1 220px;min-width:0">'
        f'<div style="{_SOFT}">{say("what it says at step {step:,}", step=samples[i][0])}</div>'
        f"{bubbles(samples[i][1])}</div>"
        for i in numbers
    ]
    return f'<div style="display:flex;flex-wrap:wrap;gap:8px;margin:8px 0">{"".join(shown)}</div>'


def _picture(lines: list[dict[str, Any]], max_steps: int) -> str:
    figure = loss_figure(lines, max_steps)
    if figure is None:
        return ""
    text = say("loss by step, on the text it learns from and on text it has not seen")
    return _image(figure, text)


def _image(figure: Any, alt: str) -> str:
    data = base64.b64encode(figure_png(figure)).decode()
    style = "width:100%;min-width:600px;max-width:900px;background:transparent"
    image = f'<img alt="{alt}" style="{style}" src="data:image/png;base64,{data}">'
    return f'<div style="overflow-x:auto">{image}</div>'


def details(lines: list[dict[str, Any]], max_steps: int) -> str:
    """What the ternary weights did, folded; empty where there is nothing to see."""
    figure = ternary_figure(lines, max_steps)
    if figure is None:
        return ""
    alt = say("zeros and flips of the ternary weights by layer, and learning rate")
    summary = say("Details: what the weights do")
    note = say(
        "Each weight is -1, 0 or 1. A network that is still learning keeps changing them; they "
        "freeze as the learning rate falls."
    )
    return (
        f'<details style="{CARD}"><summary style="cursor:pointer">{summary}</summary>'
        f"{_image(figure, alt)}<div>{note}</div></details>"
    )


def verdict(lines: list[dict[str, Any]], vocab_size: int) -> str:
    """The last evaluation in words, with a warning where the text was learned by heart."""
    evals = [line for line in lines if "val_loss" in line]
    if not evals:
        return ""
    last = evals[-1]["val_loss"]
    perplexity = math.exp(min(last, 700))
    text = say(
        "Perplexity {perplexity:,.1f} (random guessing: {vocab_size:,}).",
        perplexity=perplexity,
        vocab_size=vocab_size,
    )
    watched = [line["val_loss"] for line in evals if not line.get("final")]  # of the same text
    if watched and watched[-1] > 1.05 * min(watched):
        heart = say("It began to learn its text by heart: more text, or fewer steps, would help.")
        text = f"{text} {heart}"
    return text


def calm(text: str) -> str:
    """A sentence in a quiet box."""
    return f'<div style="{CARD};{_EDGE};padding:8px 12px">{html.escape(text)}</div>'
