"""Two models side by side: the same words, and what each of them makes of them."""

from __future__ import annotations

import dataclasses
import html
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitllm.notebook.kernel as kernel
from bitllm.chat import SAMPLING, Chat
from bitllm.conversations import can_chat
from bitllm.notebook.boxes import WIDTH, Sampling, first_words
from bitllm.notebook.card import CARD, bubbles, continued
from bitllm.notebook.language import say
from bitllm_core import (
    BitLM,
    SamplingConfig,
    checkpoint_step,
    list_checkpoints,
    load_model,
    stream,
)


def compare(first: str | Path, second: str = "", prompt: str = "") -> None:
    """A box whose words go to two models, with both answers; without widgets, prints one of each.

    Both have the same seed and sampling, and each its own history. One that was not trained on
    conversations continues the words as a text.

    Args:
        first: what `load_model` takes.
        second: the same; or a step of the run `first`, such as "500"; empty: the earliest step that
            the run has kept. Where there is no second model a sentence says why.
        prompt: the first words; default: hello, or how the run's validation text begins.
    """
    try:
        models = _models(Path(first), second)
    except (ValueError, OSError, ImportError) as error:
        print(say("nothing to compare: {error}", error=error))
        return
    sides = [_Side(name, *opened) for name, opened in models.items()]
    if any(side.talk for side in sides):
        prompt = prompt or say("hello")
    prompt = prompt or first_words(first, sides[0].tokenizer)
    if kernel.widgets() is None:
        for side in sides:
            print(f"{side.name}: {side.whole_answer(prompt)}")
        return
    box = _Beside(sides, prompt)
    text = say("two models: run this cell to ask them")
    names = "\n".join(side.name for side in sides)
    page = "".join(side.html.value for side in sides)
    kernel.show(box.whole, f"{text}\n\n{names}", page)


def _models(first: Path, second: str) -> dict[str, tuple[BitLM, Any]]:
    """Both models and tokenizers, by the names to show; the earlier step first."""
    steps = [checkpoint_step(path) for path in list_checkpoints(first / "checkpoints")]
    if second and not second.isdecimal():
        names = [first.name, Path(second).name]
        if names[0] == names[1]:  # a/run and b/run
            names = [first.as_posix(), second]
        pair = dict(zip(names, [(first, "last"), (second, "last")], strict=True))
        return {name: load_model(*what) for name, what in pair.items()}
    if len(steps) < 2 and not second:
        raise ValueError(f"{first.as_posix()} has kept one step; give another run or an export")
    step = int(second or steps[0])
    pair = {say("step {step:,}", step=step): step, say("the newest step"): "last"}
    return {f"{first.name}, {name}": load_model(first, what) for name, what in pair.items()}


class _Side:
    """One of the models, and where its answers appear."""

    def __init__(self, name: str, model: BitLM, tokenizer: Any) -> None:
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.talk = Chat(model, tokenizer) if can_chat(tokenizer) else None
        self.html: Any = None

    def pieces(self, words: str, sampling: SamplingConfig) -> Iterator[str]:
        if self.talk is None:
            return stream(self.model, self.tokenizer, words, sampling)
        self.talk.sampling = sampling
        return self.talk.reply(words)

    def whole_answer(self, words: str) -> str:
        sampling = dataclasses.replace(SAMPLING, temperature=0, seed=0)
        said = "".join(self.pieces(words, sampling))
        return said if self.talk else words + said

    def answer(self, words: str, sampling: SamplingConfig) -> Iterator[None]:
        said = ""
        for piece in self.pieces(words, sampling):
            said += piece
            self.show(words, said)
            yield
        self.show(words, said)

    def show(self, words: str = "", said: str = "") -> None:
        title = f'<b style="overflow-wrap:anywhere">{html.escape(self.name)}</b>'
        if self.talk:
            turns = [(m["role"] == "user", m["content"]) for m in self.talk.messages]
            coming = bool(turns) and turns[-1][0] and bool(said)
            text = bubbles([*turns, (False, said)] if coming else turns)
        else:
            text = continued(words, said) if words else ""
        self.html.value = f'<div style="{CARD}">{title}{text}</div>'

    def begin(self) -> None:
        if self.talk:
            self.talk.new()
        self.show()


class _Beside:
    """What the user says, Ask, Stop and New; two columns, or one below the other where narrow."""

    def __init__(self, sides: list[_Side], prompt: str) -> None:
        w = kernel.widgets()
        self.sides = sides
        for side in sides:
            side.html = w.HTML(layout=w.Layout(flex="1 1 280px", margin="4px 12px 4px 0"))
            side.show()
        self.text = w.Textarea(value=prompt, rows=2, layout=w.Layout(**WIDTH))
        ask, stop = w.Button(description=say("Ask both")), w.Button(description=say("Stop"))
        new = w.Button(description=say("New"))
        ask.button_style = "primary"
        new.on_click(self._begin)
        self.sampling = Sampling(w, dataclasses.replace(SAMPLING, temperature=0, seed=0))
        self.job = kernel.InThread(ask, stop, self._ask)
        columns = w.HBox([side.html for side in sides], layout={"flex_flow": "row wrap"})
        columns.layout.max_width = "900px"
        row = w.HBox([ask, stop, new], layout={"flex_flow": "row wrap"})
        self.whole = w.VBox([columns, self.text, row, self.sampling.whole])
        self.job.run()

    def _ask(self) -> Iterator[None]:
        if not (words := self.text.value.strip()):
            return
        sampling = self.sampling.config()
        if sampling.seed is None:  # a new one, the same for both
            sampling = dataclasses.replace(sampling, seed=random.randrange(2**31))
        for side in self.sides:
            yield from side.answer(words, sampling)

    def _begin(self, _: Any) -> None:
        self.job.stopped = True
        for side in self.sides:
            side.begin()
