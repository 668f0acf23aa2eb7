"""The live display under a training cell: curves, a sample text and buttons."""

from __future__ import annotations

import base64
import contextlib
import html
import importlib.util
import logging
import signal
import time
from pathlib import Path
from typing import Any

import bitllm.notebook.kernel as kernel
from bitllm.notebook.figures import CARD, figure_png, run_figure
from bitllm.notebook.runs import run_facts
from bitllm.progress import ProgressBar
from bitllm_core import Callback, MetricsLog, TrainState, first_line

log = logging.getLogger("bitllm")


class LiveDisplay(Callback):
    """Curves, numbers, a sample and buttons under the training cell; a progress bar elsewhere.

    Buttons set flags that the training loop reads between steps. Clicks reach a running cell on
    ipykernel 7 with JupyterLab 4.4 or newer (through a thread of their own), and on ipykernel 6,
    which Colab has, if jupyter_ui_poll is installed. Elsewhere they wait until the cell ends.
    Interrupting the cell (■) stops the training everywhere.

    Args:
        out: the run folder given to `train`, whose metrics.jsonl has the curve so far.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.progress_bar = None if kernel.in_notebook() and _has_matplotlib() else ProgressBar()
        self.facts: dict[str, str] = {}
        self.sample = ""
        self.next_drawing = 0.0
        self.drawn_state: tuple[Any, ...] = ()
        self.buttons: dict[str, Any] = {}
        self.handle: Any = None
        self.started, self.ended = time.monotonic(), False

    def on_start(self, state: TrainState) -> None:
        if self.progress_bar:
            return self.progress_bar.on_start(state)
        self.lines = MetricsLog.read(self.out / "metrics.jsonl")
        if state.step:
            self.facts["last save"] = f"step {state.step:,}"
        if state.mirror:
            self.on_mirror(state, state.mirror.status())
        self.resources = contextlib.ExitStack()
        self.poll = self.resources.enter_context(kernel.clicks_between_steps())
        self._show_buttons(state)
        from IPython.display import display

        self.handle = display({"text/plain": "drawing"}, raw=True, display_id=True)
        self._draw_if_due(state)

    def on_step(self, state: TrainState, metrics: dict[str, Any] | None) -> None:
        if self.progress_bar:
            return self.progress_bar.on_step(state, metrics)
        if metrics:
            self.lines.append(metrics)
        self.poll()
        self._draw_if_due(state)

    def on_pause(self, state: TrainState) -> None:
        if not self.progress_bar:
            self.poll()
            self._draw_if_due(state)

    def on_eval(self, state: TrainState, metrics: dict[str, Any]) -> None:
        if self.progress_bar:
            return self.progress_bar.on_eval(state, metrics)
        self.lines.append(metrics)

    def on_sample(self, state: TrainState, text: str) -> None:
        if self.progress_bar:
            return self.progress_bar.on_sample(state, text)
        self.sample = text

    def on_checkpoint(self, state: TrainState, path: Path) -> None:
        when = time.strftime("%H:%M:%S", time.localtime(state.last_saved_at))
        self.facts["last save"] = f"step {state.last_saved_step:,} at {when}"

    def on_mirror(self, state: TrainState, status: str) -> None:
        self.facts["mirror"] = status.removeprefix("mirror: ")

    def on_end(self, state: TrainState) -> None:
        if self.progress_bar:
            return self.progress_bar.on_end(state)
        for button in self.buttons.values():
            button.disabled = True
        self.next_drawing, self.ended = 0.0, True
        self._draw_if_due(state)
        self.resources.close()

    def _show_buttons(self, state: TrainState) -> None:
        widgets = kernel.widgets()
        if widgets is None:
            return
        from IPython.display import display

        for name in ("Stop", "Pause", "Save now"):
            self.buttons[name] = widgets.Button(description=name)
            self.buttons[name].on_click(lambda _, name=name: _press(state, name))
            kernel.deliver_to_thread(self.buttons[name].comm)
        note = widgets.HTML("to stop, or interrupt the cell (■): both save first")
        display(widgets.HBox([*self.buttons.values(), note]))

    def _draw_if_due(self, state: TrainState) -> None:
        """Draw at once after a click or save; otherwise at most once a second, 5% of the time.

        Drawings become rarer over the hours: a tab that is opened again gets all it missed at once.
        """
        start = time.monotonic()
        shown = (state.paused, state.stop_signal, self.facts.get("last save"))
        if start < self.next_drawing and shown == self.drawn_state:
            return
        self.drawn_state = shown
        if self.buttons:
            self.buttons["Pause"].description = "Continue" if state.paused else "Pause"
        try:
            self.handle.update(self._card(state), raw=True)
        except Exception as error:  # a failed drawing must not end the training
            log.warning(f"display: not drawn ({type(error).__name__}: {first_line(error)})")
        now = time.monotonic()
        self.next_drawing = now + max(1.0, 19 * (now - start), (now - self.started) / 600)

    def _card(self, state: TrainState) -> dict[str, str]:
        facts = run_facts(self.lines, state.config.max_steps, state.config.batch_tokens)
        facts |= {"step": f"{state.step:,} of {state.config.max_steps:,}", **self.facts}
        if state.stop_signal:
            facts["stopped"] = "saved; run this cell again to resume" if self.ended else "saving"
        elif state.paused:
            facts["paused"] = "press Continue"
        figure = base64.b64encode(figure_png(run_figure(self.lines))).decode()
        cells = " · ".join(f"{k} <b>{html.escape(v)}</b>" for k, v in facts.items())
        sample = html.escape(self.sample or "(at the first evaluation)")
        alt = "loss, learning rate and speed by step; zeros and flipped trits by layer"
        text = ", ".join(f"{name} {value}" for name, value in facts.items())
        page = (
            f'<div style="{CARD}"><div>{cells}</div>'
            f'<img alt="{alt}" style="max-width:100%" src="data:image/png;base64,{figure}">'
            f'<div>sample text</div><pre style="{CARD};white-space:pre-wrap">{sample}</pre></div>'
        )
        return {"text/html": page, "text/plain": text}


def _press(state: TrainState, name: str) -> None:
    """Only set a flag: the click may arrive on another thread, in the middle of a step."""
    if name == "Stop":
        state.stop_signal = signal.SIGINT
    elif name == "Pause":
        state.paused = not state.paused
    else:
        state.save_requested = True


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None
