"""Stop, pause and save asked for from outside: files in the run folder, read between steps."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

from bitllm_core import Callback, TrainState, require

WORDS = ("stop", "pause", "continue", "save")
READ_EVERY_S = 0.3


def ask(out: str | Path, word: str) -> None:
    """Leave a request for whoever trains in `out`, in this process or another.

    ValueError: not one of WORDS. FileNotFoundError: there is no such folder.
    """
    require(word in WORDS, "word", word, ", ".join(WORDS))
    (Path(out) / f".request-{word}").touch()


def press(state: TrainState, word: str) -> None:
    """Only set a flag: a click may arrive on another thread, in the middle of a step."""
    if word == "stop":
        state.stop_signal = signal.SIGINT
    elif word == "save":
        state.save_requested = True
    else:
        state.paused = word == "pause"


class Requests(Callback):
    """Reads what `ask` left in the run folder, and sets the flags that all processes read."""

    def __init__(self, out: str | Path) -> None:
        self.out, self.next_look = Path(out), 0.0

    def on_start(self, state: TrainState) -> None:
        self._taken()  # of an earlier session

    def on_step(self, state: TrainState, metrics: object) -> None:
        if time.monotonic() < self.next_look:
            return
        self.next_look = time.monotonic() + READ_EVERY_S
        for word in self._taken():
            press(state, word)

    def on_pause(self, state: TrainState) -> None:
        self.on_step(state, None)

    def _taken(self) -> list[str]:
        found = []
        for word in WORDS:
            with contextlib.suppress(OSError):
                (self.out / f".request-{word}").unlink()
                found.append(word)
        return found
