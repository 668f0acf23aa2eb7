"""The notebook's kernel: is there one, has it widgets, and how clicks reach a running cell."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any


def in_notebook() -> bool:
    """Whether a kernel runs this (Jupyter, Colab), so that images and widgets can be shown."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")  # IPython in a terminal has none


def widgets() -> Any:
    """The module ipywidgets, or None where widgets cannot be shown."""
    with contextlib.suppress(ImportError):
        if in_notebook():
            import ipywidgets

            return ipywidgets
    return None


def deliver_to_thread(comm: Any) -> None:
    """Keep clicks on the thread that the front end chose for them.

    ipykernel 7.4 sends them to the thread of the widget's last update instead. That is the
    training's own thread, where they would wait for the cell to end.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default


@contextlib.contextmanager
def clicks_between_steps() -> Iterator[Callable[[], None]]:
    """Yields a function that handles waiting clicks on ipykernel 6; queued cells stay queued."""
    generation = int(importlib.metadata.version("ipykernel").split(".")[0])
    poll, last = None, 0.0
    with contextlib.ExitStack() as stack:
        if generation < 7:
            with contextlib.suppress(ImportError):
                from jupyter_ui_poll import ui_events

                poll = stack.enter_context(ui_events())

        def between_steps() -> None:
            nonlocal last
            if poll and time.monotonic() - last > 0.1:
                poll(10)
                last = time.monotonic()

        yield between_steps
