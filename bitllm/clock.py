"""The clock of a run that ends after `minutes`, instead of after a number of steps.

It counts all sessions of the run, each from the start of its command: imports, reading the text,
compiling, evaluations and saving are in it, and what is lost to other programs too; only a pause
is not. A checkpoint holds the seconds that were used; of a run that had a number of steps before,
those of its training count. The schedule ends early enough for the last
checkpoint, the last evaluation and the text after it.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque

from bitllm_core import ModelConfig, Session, log

AFTERWARDS_S = 2.0
"""Seconds for what a command does after training: it reads the model and writes a text."""
SAVED_PER_S = 150e6
"""Bytes a second of the last checkpoint, written and read back: a slow disk's."""
LAST_EVALUATION = 0.03
"""Largest share of the minutes for the last evaluation, which reads less of a long text."""


def inner_parameters(model: ModelConfig) -> int:
    """Those inside the blocks; the rest is the embedding."""
    return model.num_parameters - model.vocab_size * model.hidden_size


USEFUL_EPOCHS = 6.0
"""How often to read a text before it is only learned by heart (docs/log.md)."""


class Clock:
    """Reads the time for `Session.stop_asked`, once per step, and keeps room for the end.

    `clock_seconds` and `max_steps` in the session's state follow the clock in the main process;
    `max_steps` is the guess that progress bars show.

    Args:
        session: of the core; its state was restored, its `evaluate` is timed from here on.
        started: time.monotonic() from which this session counts.
    """

    def __init__(self, session: Session, started: float) -> None:
        self.session, self.state, self.last = session, session.state, started
        self.minutes = session.config.minutes or 0.0
        tokens = session.data.epoch_tokens
        self.useful_tokens = tokens * USEFUL_EPOCHS
        self.steps: deque[float] = deque(maxlen=20)  # seconds of the last ones
        self.before = self.state.step, self.state.train_seconds
        self.first: tuple[int, float] | None = None  # step and clock when this session's began
        self.token_s = 0.0  # seconds per token of an evaluation; 0: none was made yet
        self.evaluate, session.evaluate = session.evaluate, self.timed_evaluation
        self.state.clock_seconds = self.state.clock_seconds or self.state.train_seconds
        self.state.time_share = min(self.state.clock_seconds / (60 * self.minutes), 1.0)

    def read(self) -> float:
        """Share of the time for steps that is over, in the main process; 0 in the others.

        It is below 1 until there was a step, and 1 when the next would end too late.
        """
        if not self.session.processes.is_main:
            return 0.0
        now, state, budget = time.monotonic(), self.state, 60 * self.minutes
        state.clock_seconds += 0.0 if state.paused else now - self.last
        self.last = now
        self._note_step()
        for_steps = max(budget - self.seconds_of_end(), 1e-9)
        share = max(state.clock_seconds / for_steps, state.tokens / self.useful_tokens)
        if share >= 1 and state.step:
            if state.clock_seconds < for_steps:
                early = f"after {state.clock_seconds / 60:.1f} of {self.minutes:g} minutes"
                read = f"the text was read {USEFUL_EPOCHS:g} times"
                log.info(f"ends {early}: {read}, more only overfits")
            state.clock_seconds = budget  # what is left is for the end
            return 1.0
        self.first = self.first or self._now()
        steps, seconds = (a - b for a, b in zip(self._now(), self.first, strict=True))
        if steps and seconds and state.step % self.session.config.log_every_steps == 0:
            left = (for_steps - state.clock_seconds) * steps / seconds
            total = state.step + max(round(left), 1)
            state.config = dataclasses.replace(state.config, max_steps=total)
        return min(share, 1 - 1e-9)

    def _now(self) -> tuple[int, float]:
        return self.state.step, self.state.clock_seconds

    def _note_step(self) -> None:
        step, seconds = self.before
        self.before = self.state.step, self.state.train_seconds
        if self.state.step > step:
            self.steps.append((self.state.train_seconds - seconds) / (self.state.step - step))

    def seconds_of_end(self) -> float:
        """A guess of the time from the last step to the end, and half a step."""
        step = sum(self.steps) / max(len(self.steps), 1)
        saving = 12 * self.session.model_config.num_parameters / SAVED_PER_S
        return step / 2 + saving + self._tokens_at_end() * self._token_s() + AFTERWARDS_S

    def _token_s(self) -> float:
        """Seconds per token of an evaluation; before the first one, of a step: it takes more."""
        step = sum(self.steps) / max(len(self.steps), 1)
        return self.token_s or step / self.session.config.batch_tokens

    def _tokens_at_end(self) -> int:
        """Validation tokens of the last evaluation: as many as its share of the time is enough for,
        but not fewer than of the others."""
        room, there = LAST_EVALUATION * 60 * self.minutes, len(self.session.data.validation)
        most = int(room / self._token_s()) if self._token_s() else there
        return min(there, max(most, self.session.config.eval_tokens))

    def timed_evaluation(self, final: bool = False) -> None:
        """`Session.evaluate`; the last one of as many tokens as there is time for."""
        session, there = self.session, len(self.session.data.validation)
        most = session.config.eval_tokens
        if final:
            most = session.final_tokens = int(session.processes.broadcast(self._tokens_at_end()))
            if most < there:
                tokens = f"{most:,} of {there:,} validation tokens"
                log.info(f"the last evaluation reads the first {tokens}, to end in time")
        start = time.monotonic()
        self.evaluate(final)
        tokens = min(there, most)
        self.token_s = (time.monotonic() - start) / max(tokens, 1)
