"""What a training is about to do, and a progress bar in the terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

from bitllm_core import Callback, Session, TrainState, log, warmup_that_fits


def describe(session: Session) -> None:
    """Log what a training is about to do: its size, its tokens, and what was changed to fit."""
    config, tokens = session.config, session.data.manifest["train"]["tokens"]
    size = session.model_config.num_parameters / 1e6
    epochs = config.max_steps / session.data.steps_per_epoch(config, session.context)
    log.info(f"{size:.2f}M parameters on {session.device}, {session.micro_batch} windows at once")
    work = f"{epochs:.1f} epochs of them in {config.max_steps} steps"
    if config.minutes:
        used = session.state.clock_seconds / 60
        work = f"{used:.1f} of {config.minutes:g} minutes used"
    log.info(f"{tokens:,} training tokens, {work}")
    if config.save_every_epoch and epochs >= 1:
        log.info(f"a checkpoint of every epoch is kept, up to {size * 12 * epochs:,.0f} MB in all")
    if (steps := warmup_that_fits(config)) < config.warmup_steps:
        log.info(f"warmup_steps: {config.warmup_steps} -> {steps}, in so short a run")
    if session.state.step:
        log.info(f"resuming from step {session.state.step} of {config.max_steps}")


def describe_early_end(state: TrainState) -> None:
    """Log why a run ended before its last step, if patience was the reason."""
    last, evaluations = state.config.max_steps, state.evals_since_best
    if state.out_of_patience and (state.config.minutes or state.step < last):
        log.info(
            f"ended early at step {state.step} of {last}: no better validation loss in "
            f"{evaluations} evaluations. The best is of step {state.best_step} "
            "(--checkpoint best); --patience 0 trains to the end"
        )


PULSE_S = 12.0
"""Silence is broken after this, twice at most: `colab run` gives a command up after 30."""
SPOKEN = threading.Event()
"""Set by whatever is put out: what is logged, and the `Terminal`."""


def break_silence(over: threading.Event) -> None:
    """Log a line whenever nothing was put out for `PULSE_S`, until `over`."""
    while not over.wait(PULSE_S):
        if not SPOKEN.is_set():
            log.info("still at work")
        SPOKEN.clear()


@contextlib.contextmanager
def never_silent() -> Iterator[None]:
    """A block that breaks its silence where nobody may be watching: stderr is no terminal."""

    def heard(_: logging.LogRecord) -> bool:
        SPOKEN.set()
        return True

    over = threading.Event()
    if not sys.stderr.isatty():
        threading.Thread(target=break_silence, args=(over,), daemon=True).start()
    log.addFilter(heard)
    try:
        yield
    finally:
        log.removeFilter(heard)
        over.set()


class Terminal:
    """stderr or stdout, whose end (a closed window, a broken pipe) ends no training."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        SPOKEN.set()
        with contextlib.suppress(OSError, ValueError):
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


class ProgressBar(Callback):
    """tqdm on stderr: loss, tokens/s, time left; texts and evaluations above it."""

    def on_start(self, state: TrainState) -> None:
        from tqdm.auto import tqdm

        total = state.config.max_steps
        out: Any = Terminal(sys.stderr)
        self.bar = tqdm(total=total, initial=state.step, unit="step", dynamic_ncols=True, file=out)
        self.print = partial(self.bar.write, file=out)

    def on_step(self, state: TrainState, metrics: dict[str, Any] | None) -> None:
        if metrics:
            text = "loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s".format_map(metrics)
            self.bar.set_postfix_str(text, refresh=False)
        self.bar.total = state.config.max_steps  # by the clock, a guess that changes
        self.bar.update()

    def on_eval(self, state: TrainState, metrics: dict[str, Any]) -> None:
        text = "step {step}: validation loss {val_loss:.4f}, perplexity {val_perplexity:.1f}"
        self.print(text.format_map(metrics))

    def on_sample(self, state: TrainState, text: str) -> None:
        self.print(f"  | {' '.join(text.split())[:160]}")

    def on_end(self, state: TrainState) -> None:
        self.bar.close()
