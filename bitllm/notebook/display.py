"""The live display under a training cell: tiles, what the model says, a curve and buttons."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bitllm.notebook.kernel as kernel
from bitllm.notebook.card import card, details, duration, verdict
from bitllm.notebook.language import retold, say
from bitllm.notebook.runs import expected_steps, read_metrics, run_facts
from bitllm.notebook.samples import Samples, evaluated, read_samples
from bitllm.progress import ProgressBar
from bitllm.requests import Requests, press
from bitllm_core import Callback, MetricsLog, TrainState, first_line

log = logging.getLogger("bitllm")

BUTTONS = {"Stop": "stop", "Pause": "pause", "Continue": "continue", "Save now": "save"}
"""What they ask for. Here one button is Pause or Continue; `watch` has both."""
SHARE = 0.007
"""of the time goes to drawings, and as much to samples: below 2% with what comes first"""


class LiveDisplay(Callback):
    """Numbers, what the model says, a curve and buttons under the training cell; a progress bar
    elsewhere.

    Buttons set flags that the training loop reads between steps. Clicks reach a running cell on
    ipykernel 7 with JupyterLab 4.4 or newer (through a thread of their own), and on ipykernel 6,
    which Colab has, if jupyter_ui_poll is installed. Elsewhere they wait until the cell ends.
    Interrupting the cell (■) stops the training everywhere, and `watch` from any other notebook.

    Args:
        out: the run folder given to `train`, whose metrics.jsonl has the curve so far.
        box: a widget (VBox) to show it in, instead of the output of the cell.
    """

    def __init__(self, out: str | Path, box: Any = None) -> None:
        self.out, self.box = Path(out), box
        self.progress_bar = None if kernel.in_notebook() and _has_matplotlib() else ProgressBar()
        self.requests, self.samples = Requests(out), Samples(out)
        self.facts: dict[str, str] = {}
        self.lines: list[dict[str, Any]] = []
        self.next_drawing = self.sampling_s = 0.0
        self.ready = threading.Thread(target=_prepare_to_draw, daemon=True)
        self.drawn_state: tuple[Any, ...] = ()
        self.buttons: dict[str, Any] = {}
        self.handle: Any = None
        self.started, self.ended = time.monotonic(), False

    def on_start(self, state: TrainState) -> None:
        self.requests.on_start(state)
        if self.progress_bar:
            return self.progress_bar.on_start(state)
        self.lines = MetricsLog.read(self.out / "metrics.jsonl")
        self.samples.begin(state.step)
        if state.step:
            self.facts["last save"] = say("step {step:,}", step=state.step)
        if state.mirror:
            self.on_mirror(state, state.mirror.status())
        self.resources = contextlib.ExitStack()
        clicks = contextlib.nullcontext(lambda: None) if self.box else kernel.clicks_between_steps()
        self.poll = self.resources.enter_context(clicks)  # in a thread the kernel is free for them
        self._show_buttons(state)
        self._draw_if_due(state)
        self.ready.start()

    def on_step(self, state: TrainState, metrics: dict[str, Any] | None) -> None:
        self.requests.on_step(state, metrics)
        if self.progress_bar:
            return self.progress_bar.on_step(state, metrics)
        if metrics:
            self.lines.append(metrics)
            affordable = self.sampling_s <= SHARE * (time.monotonic() - self.started)
            if affordable and self.samples.due(state.step, self._steps(state)):
                self._sample(state)
        self.poll()
        self._draw_if_due(state)

    def on_pause(self, state: TrainState) -> None:
        self.requests.on_pause(state)
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
        if state.processes.world_size > 1:
            self.samples.add(state.step, [(False, text)])

    def on_checkpoint(self, state: TrainState, path: Path) -> None:
        when = time.strftime("%H:%M:%S", time.localtime(state.last_saved_at))
        self.facts["last save"] = say(
            "step {step:,} at {time}", step=state.last_saved_step, time=when
        )

    def on_mirror(self, state: TrainState, status: str) -> None:
        self.facts["mirror"] = retold(status.removeprefix("mirror: "))

    def on_end(self, state: TrainState) -> None:
        if self.progress_bar:
            return self.progress_bar.on_end(state)
        for button in self.buttons.values():
            button.disabled = True
        if state.stop_signal and state.step:
            _evaluate(self, state)
        self._sample(state)
        self.next_drawing, self.ended = 0.0, True
        self._draw_if_due(state)
        self._show(details(self.lines, self._steps(state)))
        self.resources.close()

    def show_end(self, state: TrainState) -> None:
        """Say how a training went that `on_end` has not shown: one that was complete before.

        Raises:
            AssertionError: it was stopped, and BITLLM_MUST_FINISH is set, as the tests do.
        """
        self.ended = True
        text = _headline(self, state)
        if self.handle is None and not self.progress_bar:
            self.lines, self.samples.taken = read_metrics(self.out), read_samples(self.out)
            self._draw_if_due(state)
            self._show(details(self.lines, self._steps(state)))
        elif self.progress_bar:
            print(text)
        assert state.finished or not os.environ.get("BITLLM_MUST_FINISH"), text

    def _steps(self, state: TrainState) -> int:
        """How many steps the run will have."""
        return max(expected_steps(asdict(state.config), self.lines), state.step)

    def _sample(self, state: TrainState) -> None:
        start = time.monotonic()
        try:
            self.samples.take(state)
        except Exception as error:  # what is only shown must not end the training
            log.warning(f"display: no sample ({type(error).__name__}: {first_line(error)})")
        self.sampling_s += time.monotonic() - start

    def _show_buttons(self, state: TrainState) -> None:
        widgets = kernel.widgets()
        if widgets is None:
            return
        for name in [name for name in BUTTONS if name != "Continue"]:
            self.buttons[name] = widgets.Button(description=say(name))
            self.buttons[name].on_click(lambda _, name=name: _click(state, name))
            kernel.deliver_to_thread(self.buttons[name].comm)
        note = widgets.HTML(say("Stop and ■ (interrupt) both save first."))
        row = widgets.HBox([*self.buttons.values(), note], layout={"flex_flow": "row wrap"})
        if self.box:
            self.box.children = [*self.box.children, row]
        else:
            kernel.show(row, say("buttons: Stop, Pause, Save now"))

    def _show(self, page: str, plain: str = "") -> Any:
        """Show HTML below what is there; returns what updates it."""
        if not page:
            return None
        if self.box:
            place = kernel.Place(self.box)
            place.update({"text/html": page})
            return place
        from IPython.display import display

        return display({"text/html": page, "text/plain": plain}, raw=True, display_id=True)

    def _draw_if_due(self, state: TrainState) -> None:
        """Draw at once after a click or save; otherwise at most once a second, 0.7% of the time.

        Drawings become rarer over the hours: a tab that is opened again gets all it missed at once.
        """
        start = time.monotonic()
        shown = (state.paused, state.stop_signal, self.facts.get("last save"), len(self.lines) > 0)
        if start < self.next_drawing and shown == self.drawn_state:
            return
        self.drawn_state = shown
        if self.lines and self.ready.is_alive():
            self.ready.join()
        if self.buttons:
            self.buttons["Pause"].description = say("Continue") if state.paused else say("Pause")
        try:
            page = self._card(state)
            if self.handle is None:
                self.handle = self._show(page["text/html"], page["text/plain"])
            else:
                self.handle.update(page, raw=True)
        except Exception as error:  # a failed drawing must not end the training
            log.warning(f"display: not drawn ({type(error).__name__}: {first_line(error)})")
        now = time.monotonic()
        self.next_drawing = now + max(1.0, (now - start) / SHARE, (now - self.started) / 600)

    def _card(self, state: TrainState) -> dict[str, str]:
        head, max_steps = _headline(self, state), self._steps(state)
        facts = run_facts(self.lines, max_steps, state.config.batch_tokens)
        facts |= {"step": say("{step:,} of {steps:,}", step=state.step, steps=max_steps)}
        facts |= self.facts
        if self.ended and "time left" in facts:
            facts["time left"] = say("done") if state.finished else say("stopped")
        hint = ""
        if not self.ended:
            hint = say(
                "If this page is closed or reloaded, training continues. To see it again, run "
                "<code>{code}</code> in another notebook.",
                code=f"bit.watch({self.out.as_posix()!r})",
            )
        page = card(head, facts, self.lines, max_steps, self.samples.taken, hint)
        text = ", ".join(
            [head, *(f"{say(name)} {value}" for name, value in facts.items() if value)]
        )
        return {"text/html": page, "text/plain": text}


def _evaluate(display: LiveDisplay, state: TrainState) -> None:
    """Validate a run that was stopped, once, for the display alone."""
    if any(line["step"] == state.step and "val_loss" in line for line in display.lines):
        return
    try:
        display.lines.append(evaluated(display.out, state))
    except Exception as error:
        log.warning(f"display: not evaluated ({type(error).__name__}: {first_line(error)})")


def _headline(display: LiveDisplay, state: TrainState) -> str:
    """What is going on, in a sentence."""
    place = display.out.as_posix()
    steps = say("step {step:,} of {steps:,}", step=state.step, steps=display._steps(state))
    if not display.ended and not state.stop_signal:
        if state.paused:
            return say("Paused: press Continue.")
        first = say("Getting ready: the first step takes longest.")
        return say("Training") if display.lines else first
    if not display.ended:
        return say("Stopping: saving ...")
    if not state.finished:
        return say(
            "Stopped at {steps}, saved in {place}. To resume, run this cell again.",
            steps=steps,
            place=place,
        )
    what = verdict(display.lines, state.model.config.vocab_size)
    if display.handle is None:
        return say(
            "Complete already: {step:,} steps, in {place}. {verdict} To train longer give "
            'more minutes; to start over choose "start over" under Advanced.',
            step=state.step,
            place=place,
            verdict=what,
        )
    early = say(" at {steps}: it got no better", steps=steps) if state.out_of_patience else ""
    took = duration(max(time.monotonic() - display.started, state.train_seconds))  # all sessions
    return say(
        "Done in {time}{early}. {verdict} Saved in {place}. Try it below.",
        time=took,
        early=early,
        verdict=what,
        place=place,
    )


def _click(state: TrainState, name: str) -> None:
    press(state, BUTTONS["Continue" if name == "Pause" and state.paused else name])


def _prepare_to_draw() -> None:
    """Draw once for nobody, beside the first step: imports and fonts take a second."""
    with contextlib.suppress(Exception):  # the first real drawing says why it fails
        card("", {}, [{"step": step, "loss": 1.0} for step in (1, 2, 3)], 3, [], "")


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None
