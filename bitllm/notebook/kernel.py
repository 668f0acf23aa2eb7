"""The notebook's kernel: is there one, has it widgets, and how clicks reach a running cell."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
import threading
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


def show(widget: Any, text: str, page: str = "") -> None:
    """Display a widget; `text` and `page` (HTML) are for readers who have no kernel."""
    from IPython.display import display

    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    data = {"application/vnd.jupyter.widget-view+json": view, "text/plain": text}
    display(data | ({"text/html": page} if page else {}), raw=True)


class InThread:
    """Work for a button that another button stops: in a thread, so that both clicks arrive.

    Args:
        go, stop: the buttons; `stop` can be pressed while the work lasts, `go` meanwhile not.
        work: yields now and then, and ends there once stopped.
    """

    def __init__(self, go: Any, stop: Any, work: Callable[[], Iterator[None]]) -> None:
        self.go, self.stop, self.work, self.stopped = go, stop, work, False
        self.thread: threading.Thread | None = None
        stop.disabled = True
        go.on_click(self.start)
        stop.on_click(self._ask_to_stop)

    def start(self, _: Any = None) -> None:
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self.run, daemon=True)
            self.thread.start()

    def run(self) -> None:
        """The work itself, here and now."""
        self.stopped, self.go.disabled, self.stop.disabled = False, True, False
        try:
            for _ in self.work():
                if self.stopped:
                    break
        finally:
            self.go.disabled, self.stop.disabled = False, True

    def _ask_to_stop(self, _: Any) -> None:
        self.stopped = True


class Place:
    """A place for HTML in a box of widgets, updated like IPython's handle of a display."""

    def __init__(self, box: Any) -> None:
        self.html = widgets().HTML()
        box.children = [*box.children, self.html]

    def update(self, data: dict[str, str], raw: bool = True) -> None:
        self.html.value = data["text/html"]


def brief_errors() -> None:
    """Show an error as its last line; `%tb` shows where it came from."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is not None:
        shell.InteractiveTB.set_mode("Minimal")


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
