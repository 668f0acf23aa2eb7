"""The Train button: a training in a thread, shown below the form, and a talk with its model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import bitllm.notebook.kernel as kernel
from bitllm.notebook.boxes import answer_box
from bitllm.notebook.card import calm
from bitllm.notebook.display import LiveDisplay
from bitllm.notebook.language import say
from bitllm.notebook.settings import Settings
from bitllm_core import Callback, TrainState, first_line, train


class _Begun(Callback):
    """Takes the first sentence away, once there is more to see."""

    def __init__(self, place: kernel.Place) -> None:
        self.place = place

    def on_start(self, state: TrainState) -> None:
        self.place.update({"text/html": ""})


class Launch:
    """Trains in a thread, so that the kernel stays free: clicks arrive, and a page that is loaded
    again shows the training as it is.

    Args:
        box: where display, answer and errors are shown (VBox).
        button: is off while training runs.
    """

    def __init__(self, box: Any, button: Any) -> None:
        self.box, self.button = box, button
        self.thread: threading.Thread | None = None

    def start(self, settings: Callable[[], Settings]) -> None:
        """Train what the form asks for, unless a training runs."""
        if self.thread and self.thread.is_alive():
            return
        self.button.disabled, self.button.description = True, say("Training")
        self.box.children = []
        self.thread = threading.Thread(target=self._work, args=(settings,), daemon=True)
        self.thread.start()

    def _work(self, settings: Callable[[], Settings]) -> None:
        place = kernel.Place(self.box)
        place.update({"text/html": calm(say("Preparing the text: some ten seconds."))})
        try:
            asked = settings()
            run = asked.run_folder
            display, begun = LiveDisplay(run, self.box), _Begun(place)
            state = train(*asked.configs(), run, callbacks=[display, begun], **asked.options)
            begun.on_start(state)
            display.show_end(state)
            self.box.children = [*self.box.children, answer_box(run)]
        except Exception as error:  # a thread's traceback would reach nobody
            said = first_line(error) or type(error).__name__
            place.update({"text/html": calm(said)})
        finally:
            self.button.disabled, self.button.description = False, say("Train")
