"""Following a training from another notebook, kernel or process."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import bitllm.notebook.kernel as kernel
from bitllm.notebook.display import BUTTONS
from bitllm.notebook.language import say
from bitllm.notebook.runs import drawing, read_metrics, run_status
from bitllm.requests import ask

LOOK_EVERY_S = 2.0


def watch(
    out: str | Path, wait_s: float = 60.0, process: subprocess.Popen[Any] | None = None
) -> None:
    """Draw the training in `out` until it ends, with buttons to stop, pause and save it.

    It may run in another notebook or process, on several GPUs, or not have begun yet: then this
    waits for it up to `wait_s`. Interrupting the cell ends the watching, not the training. Where
    clicks wait for the end of a cell, `bit.ask(out, "stop")` in yet another notebook asks it too.

    Args:
        process: what trains there, if this notebook has started it: then this waits for its end,
            and interrupting the cell ends it too, saved.

    Raises:
        FileNotFoundError: no run has begun in `out` within `wait_s`.
    """
    out, end = Path(out), time.monotonic() + wait_s
    try:
        while not (out / "config.json").exists():
            if process and process.poll() is not None:
                return
            if not process and time.monotonic() > end:
                raise FileNotFoundError(f"{out}: no training has begun there")
            time.sleep(LOOK_EVERY_S / 4)
        _follow(out, process)
    except KeyboardInterrupt:
        if process:
            process.terminate()  # saves, then ends; torchrun gives it 30 seconds
            process.wait()
            _draw(out, _head(out, False), None)
        else:
            print(say("no longer watching; the training continues"))


def _follow(out: Path, process: subprocess.Popen[Any] | None) -> None:
    """Draw until there is no more to come."""
    buttons, handle = _buttons(out), None
    try:
        with kernel.clicks_between_steps() as poll:
            while True:
                running = process.poll() is None if process else is_training(out)
                handle = _draw(out, _head(out, running), handle)
                if not running:
                    break
                look = time.monotonic() + LOOK_EVERY_S
                while time.monotonic() < look:
                    poll()
                    time.sleep(0.1)
    finally:
        for button in buttons:
            button.disabled = True


def is_training(out: str | Path) -> bool:
    """Whether a process has the run folder: it holds its lock, which is tried for a moment."""
    import filelock

    try:
        with filelock.FileLock(Path(out) / ".lock", timeout=0, thread_local=False):
            return False
    except filelock.Timeout:
        return True


def _head(out: Path, running: bool) -> str:
    status = run_status(out)
    if running or status is None:
        training = say("Training in {place}", place=out.as_posix())
        return training if read_metrics(out) else say("Getting ready")
    steps = say("{step:,} of {steps:,} steps", step=status.step, steps=status.max_steps)
    if not status.finished:
        return say("Stopped: {steps}, saved in {place}.", steps=steps, place=out.as_posix())
    return say("Done: {steps}, in {place}.", steps=steps, place=out.as_posix())


def _draw(out: Path, head: str, handle: Any) -> Any:
    """Draw the run anew; returns IPython's handle. Outside a notebook, print a line."""
    page = drawing(out, head)
    if not kernel.in_notebook():
        print(f"{head} {page['text/plain']}")
        return None
    from IPython.display import display

    if handle is None:
        return display(page, raw=True, display_id=True)
    handle.update(page, raw=True)
    return handle


def _buttons(out: Path) -> list[Any]:
    """Buttons that leave a request in the run folder."""
    w = kernel.widgets()
    if w is None:
        return []
    found = []
    for name, word in BUTTONS.items():
        button = w.Button(description=say(name))
        button.on_click(lambda _, word=word: ask(out, word))
        kernel.deliver_to_thread(button.comm)
        found.append(button)
    text = say("buttons: Stop, Pause, Save now")
    kernel.show(w.HBox(found, layout={"flex_flow": "row wrap"}), text)
    return found
