"""Boxes under a cell: a conversation or a prompt, answered once and ready for more."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import bitllm.notebook.kernel as kernel
from bitllm.chat import SAMPLING, Chat
from bitllm.conversations import can_chat
from bitllm.notebook.card import CARD, bubbles, continued
from bitllm.notebook.language import say
from bitllm_core import BitLM, SamplingConfig, generate, load_model, read_json, stream

WIDTH = {"width": "620px", "max_width": "100%"}
HELP = {  # name: label, help
    "temperature": (
        "temperature",
        "0: always the likeliest word; higher: more varied, less sensible",
    ),
    "top_k": ("top-k", "choose among this many likeliest tokens; 0: among all"),
    "top_p": ("top-p", "choose among the likeliest tokens that reach this probability together"),
    "max_new_tokens": ("length", "how long an answer may become, in tokens (pieces of words)"),
    "seed": ("seed", "a number: the same answer each time; empty: a new one"),
}


def prompt_box(model: BitLM, tokenizer: Any, prompt: str = "") -> None:
    """A box for the beginning of a text, which the model continues; without widgets, prints one.

    It has answered once when it appears. With a model that was trained on conversations, it is
    `chat_box`.
    """
    if can_chat(tokenizer):
        return chat_box(model, tokenizer, prompt)
    if kernel.widgets() is None:
        print(prompt + generate(model, tokenizer, prompt, SamplingConfig(seed=0)))
        return
    box = _PromptBox(model, tokenizer, prompt or "The")
    box.show(say("a prompt box: run this cell to use it"))


def chat_box(
    model: BitLM, tokenizer: Any, prompt: str = "", sampling: SamplingConfig = SAMPLING
) -> None:
    """A conversation with history that streams its answers; without widgets, prints one answer.

    It has answered once when it appears.

    Args:
        prompt: what the user says first; default: hello, in the language of `speak`.

    Raises:
        ValueError: the model was not trained on conversations.
    """
    prompt = prompt or say("hello")
    talk = Chat(model, tokenizer, sampling)
    if kernel.widgets() is None:
        print(f"> {prompt}\n{talk.answer(prompt)}")
        return
    box = _ChatBox(talk, prompt)
    box.show(say("a chat: run this cell to talk"))


def try_out(run: str | Path, said: str = "") -> None:
    """A chat that begins with `said`, or a box with first words of the run's validation text.

    Args:
        said: what the user says first; default: hello, in the language of `speak`.
    """
    model, tokenizer = load_model(run)
    prompt_box(model, tokenizer, said if can_chat(tokenizer) else first_words(run, tokenizer))


def answer_box(run: str | Path) -> Any:
    """The widget that `try_out` shows."""
    model, tokenizer = load_model(run)
    if can_chat(tokenizer):
        return _ChatBox(Chat(model, tokenizer), say("hello")).whole
    return _PromptBox(model, tokenizer, first_words(run, tokenizer)).whole


def first_words(run: str | Path, tokenizer: Any, count: int = 3) -> str:
    """How the text begins that a run is validated on; "The" where that is not known."""
    folder = Path(run) / "data"
    manifest = read_json(folder / "manifest.json") or {}
    try:
        tokens = np.memmap(folder / "validation.bin", dtype=manifest["dtype"], mode="r")[:200]
    except (OSError, KeyError, TypeError, ValueError):
        return "The"
    text = tokenizer.decode([int(token) for token in tokens])
    words = re.findall(r"\b[^\W\d_]{2,}(?: [^\W\d_]{2,})+", text)  # not a number, not a rule
    return " ".join((words[0] if words else "The").split()[:count])


class Sampling:
    """Sliders for how the next token is chosen, folded away."""

    def __init__(self, w: Any, sampling: SamplingConfig) -> None:
        wide = {
            "layout": w.Layout(**{**WIDTH, "max_width": "calc(100% - 4px)"}),
            "style": {"description_width": "100px"},
        }
        known = dataclasses.asdict(sampling)
        self.given = sampling
        self.sliders = {
            "temperature": w.FloatSlider(min=0, max=2, step=0.05, **wide),
            "top_k": w.IntSlider(min=0, max=200, **wide),
            "top_p": w.FloatSlider(min=0.05, max=1, step=0.05, **wide),
            "max_new_tokens": w.IntSlider(min=1, max=500, **wide),
        }
        for name, slider in self.sliders.items():
            slider.value = known[name]
        self.seed = w.Text(placeholder=say("a new one each time"), **wide)
        for name, field in (*self.sliders.items(), ("seed", self.seed)):
            trait = "tooltip" if field.has_trait("tooltip") else "description_tooltip"
            label, tip = HELP[name]
            field.description = say(label)
            field.set_trait(trait, say(tip))
        notes = [f"<b>{say(label)}</b>: {say(tip)}" for label, tip in HELP.values()]
        note = w.HTML(f'<div style="{CARD};font-size:12px">{"<br>".join(notes)}</div>')
        self.whole = w.Accordion(children=[w.VBox([*self.sliders.values(), self.seed, note])])
        self.whole.selected_index, self.whole.layout = None, w.Layout(**WIDTH)
        self.whole.set_title(0, say("How it chooses its words"))

    def config(self) -> SamplingConfig:
        seed = int(self.seed.value) if self.seed.value.strip().isdecimal() else None
        values = {name: slider.value for name, slider in self.sliders.items()}
        return dataclasses.replace(self.given, **values, seed=seed)


class _PromptBox:
    """A prompt, its continuation below, Write and Stop."""

    def __init__(self, model: BitLM, tokenizer: Any, prompt: str) -> None:
        w = kernel.widgets()
        self.model, self.tokenizer = model, tokenizer
        self.text = w.Textarea(value=prompt, layout=w.Layout(**WIDTH))
        self.text.description, self.text.style.description_width = say("beginning"), "100px"
        self.sampling, self.answer = Sampling(w, SamplingConfig()), w.HTML()
        write, stop = w.Button(description=say("Write")), w.Button(description=say("Stop"))
        write.button_style = "primary"
        self.job = kernel.InThread(write, stop, self._write)
        row = w.HBox([write, stop])
        self.whole = w.VBox([self.text, row, self.answer, self.sampling.whole])
        self.sampling.seed.value = "0"
        self.job.run()
        self.sampling.seed.value = ""

    def _write(self) -> Iterator[None]:
        begun, written = self.text.value, ""
        # a space at the end would be a token of its own, which hardly any text continues
        prompt, space = (begun[:-1], " ") if begun.endswith(" ") else (begun, "")
        for piece in stream(self.model, self.tokenizer, prompt, self.sampling.config()):
            written += piece
            shown = written.removeprefix(space)
            self.answer.value = continued(begun, shown)
            yield
        if not written:
            self.answer.value = continued(begun, say(" (the model ends its text here)"))

    def show(self, text: str) -> None:
        kernel.show(self.whole, f"{text}\n\n{self.text.value}", self.answer.value)


class _ChatBox:
    """A history, what the user says, Say, Stop and New conversation."""

    def __init__(self, talk: Chat, prompt: str) -> None:
        w = kernel.widgets()
        self.talk, self.history = talk, w.HTML(layout=w.Layout(**WIDTH))
        self.text = w.Text(value=prompt, placeholder=say("Say something"))
        self.text.layout.width = "300px"
        send, stop = w.Button(description=say("Say")), w.Button(description=say("Stop"))
        new = w.Button(description=say("New conversation"))
        send.button_style = "primary"
        send.layout.width = stop.layout.width = "70px"
        new.layout.width = "170px"
        self.sampling = Sampling(w, dataclasses.replace(talk.sampling, temperature=0))
        self.job = kernel.InThread(send, stop, self._answer)
        with warnings.catch_warnings():  # Enter: later versions prefer an event that blur sends too
            warnings.simplefilter("ignore", DeprecationWarning)
            self.text.on_submit(self.job.start)
        new.on_click(self._begin)
        row = w.HBox([self.text, send, stop, new], layout={"flex_flow": "row wrap"})
        self.whole = w.VBox([self.history, row, self.sampling.whole])
        usual = talk.sampling.temperature
        self.job.run()  # the first answer is its best
        self.sampling.sliders["temperature"].value = usual

    def _answer(self) -> Iterator[None]:
        question, said = self.text.value.strip(), ""
        if not question:
            return
        self.text.value, self.talk.sampling = "", self.sampling.config()
        for piece in self.talk.reply(question):
            said += piece
            self._show(said)
            yield
        self._show()

    def _show(self, coming: str | None = None) -> None:
        turns = [(m["role"] == "user", m["content"]) for m in self.talk.messages]
        turns += [] if coming is None else [(False, coming)]
        self.history.value = f'<div style="{CARD}">{bubbles(turns)}</div>'

    def _begin(self, _: Any) -> None:
        self.job.stopped = True
        self.talk.new()
        self.history.value = ""

    def show(self, text: str) -> None:
        said = "\n".join(m["content"] for m in self.talk.messages)
        kernel.show(self.whole, f"{text}\n\n{said}", self.history.value)
