"""Boxes under a cell: a conversation, a prompt with sliders, and a download button."""

from __future__ import annotations

import html
import shutil
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import quote

import bitllm.notebook.kernel as kernel
from bitllm.chat import SAMPLING, Chat
from bitllm.conversations import can_chat
from bitllm.notebook.figures import CARD, INK
from bitllm_core import BitLM, SamplingConfig, generate, stream

BUBBLE = "display:inline-block;max-width:80%;white-space:pre-wrap;text-align:left;"
BUBBLE += "line-height:1.4;padding:6px 12px;border-radius:12px"
ASKED, ANSWERED = "background:#0b5cad;color:#ffffff", f"background:#e7ebf0;color:{INK}"


def prompt_box(model: BitLM, tokenizer: Any, prompt: str = "") -> None:
    """A prompt box with sliders that streams the answer; without widgets, prints one text.

    With a model that was trained on conversations, it is `chat_box`.
    """
    widgets = kernel.widgets()
    if can_chat(tokenizer):
        return chat_box(model, tokenizer, prompt)
    if widgets is None:
        print(prompt + generate(model, tokenizer, prompt, SamplingConfig(seed=0)))
        return
    from IPython.display import display

    w = widgets
    wide = {"layout": w.Layout(width="520px"), "style": {"description_width": "100px"}}
    text = w.Textarea(value=prompt, description="prompt", **wide)
    sliders = {
        "temperature": w.FloatSlider(value=0.8, min=0, max=2, step=0.05, **wide),
        "top_k": w.IntSlider(value=50, min=0, max=200, **wide),
        "top_p": w.FloatSlider(value=1.0, min=0.05, max=1, step=0.05, **wide),
        "max_new_tokens": w.IntSlider(value=100, min=1, max=500, **wide),
    }
    for name, slider in sliders.items():
        slider.description = name.replace("_", " ").removesuffix(" new tokens")
    button, answer = w.Button(description="Write"), w.HTML()

    def write(_: Any) -> None:
        written = text.value
        sampling = SamplingConfig(**{name: slider.value for name, slider in sliders.items()})
        for piece in stream(model, tokenizer, text.value, sampling):
            written += piece
            answer.value = f'<pre style="{CARD};white-space:pre-wrap">{html.escape(written)}</pre>'

    button.on_click(write)
    display(w.VBox([text, *sliders.values(), button, answer]))


def _bubbles(messages: list[dict[str, str]], coming: str | None = None) -> str:
    """A conversation as HTML: the user's turns on the right, the answers on the left."""
    turns = [(m["role"] == "user", m["content"]) for m in messages]
    turns += [] if coming is None else [(False, coming)]
    rows = [
        f'<div style="text-align:{"right" if user else "left"};margin:4px 0"><span style="'
        f'{ASKED if user else ANSWERED};{BUBBLE}">{html.escape(text)}</span></div>'
        for user, text in turns
    ]
    return f'<div style="width:520px">{"".join(rows)}</div>'


def chat_box(
    model: BitLM, tokenizer: Any, prompt: str = "", sampling: SamplingConfig = SAMPLING
) -> None:
    """A conversation with history that streams its answers; without widgets, prints one answer.

    Args:
        prompt: what the user may say first.

    Raises:
        ValueError: the model was not trained on conversations.
    """
    talk, widgets = Chat(model, tokenizer, sampling), kernel.widgets()
    if widgets is None:
        question = prompt or "hello"
        print(f"> {question}\n{talk.answer(question)}")
        return
    from IPython.display import display

    text = widgets.Text(value=prompt, placeholder="Say something", layout={"width": "300px"})
    say, new = widgets.Button(description="Say"), widgets.Button(description="New conversation")
    say.layout.width, new.layout.width, history = "60px", "148px", widgets.HTML()

    def answer(_: Any) -> None:
        question, said = text.value.strip(), ""
        if not question:
            return
        text.value = ""
        for piece in talk.reply(question):
            said += piece
            history.value = _bubbles(talk.messages, said)
        history.value = _bubbles(talk.messages)

    def begin(_: Any) -> None:
        talk.new()
        history.value = ""

    say.on_click(answer)
    with warnings.catch_warnings():  # Enter: later versions prefer an event that comes on blur too
        warnings.simplefilter("ignore", DeprecationWarning)
        text.on_submit(answer)
    new.on_click(begin)
    display(widgets.VBox([history, widgets.HBox([text, say, new])]))


def download_button(path: str | Path) -> None:
    """Offer a file, or a folder as a zip: a button in Colab, a link in Jupyter, else its path."""
    path = Path(path)
    if path.is_dir():
        shutil.make_archive(str(path), "zip", path)
        path = path.with_name(path.name + ".zip")
    widgets = kernel.widgets()
    if widgets is None:
        print(f"saved as {path}")
        return
    from IPython.display import display

    try:
        from google.colab import files  # type: ignore[import-not-found]
    except ImportError:
        address, name = quote(path.as_posix()), html.escape(path.as_posix())
        link = f'<a href="{address}" download>{name}</a>'
        display({"text/html": link, "text/plain": path.as_posix()}, raw=True)
        return
    button = widgets.Button(description=f"Download {path.name}", layout={"width": "auto"})
    button.on_click(lambda _: files.download(str(path)))
    display(button)
