"""What a model says while it trains, for the live display."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from bitllm.chat import Chat
from bitllm.companion import is_companion, language_of
from bitllm.conversations import can_chat
from bitllm.corpora import shown
from bitllm.notebook.card import Sample
from bitllm_core import (
    Processes,
    SamplingConfig,
    TrainState,
    choose_device,
    end_of_text_id,
    generate,
    load_tokenizer,
    read_json,
    total_loss,
)

TIMES = 8  # in a run
FILE = "samples.jsonl"
GREEDY = SamplingConfig(24, temperature=0)  # draws no random numbers


class Samples:
    """What the model said, by step; some eight times in a run, beginning with its first steps.

    They are kept in the run folder, for a run that is resumed and for who watches it.
    """

    def __init__(self, out: str | Path) -> None:
        self.out, self.taken = Path(out), list[Sample]()
        self.tokenizer: Any = None
        self.questions: list[str] = []

    def begin(self, step: int) -> None:
        """Take those of earlier sessions over, up to the step that this one begins with."""
        self.taken = [sample for sample in read_samples(self.out) if sample[0] <= step]
        self._write("w", self.taken)

    def due(self, step: int, steps: int) -> bool:
        """Whether it is time for another, at a step of so many that a line is logged at."""
        last = self.taken[-1][0] if self.taken else -steps
        return step - last >= steps / TIMES

    def take(self, state: TrainState) -> None:
        """Ask the model, or let it continue; nothing where several processes hold it."""
        if state.processes.world_size > 1 or (self.taken and self.taken[-1][0] == state.step):
            return
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.out / "tokenizer.json")
            self.questions = self._questions()
        turns: list[tuple[bool, str]] = []
        if can_chat(self.tokenizer):
            talk = Chat(state.model, self.tokenizer, GREEDY)
            for question in self.questions:
                turns += [(True, question), (False, talk.answer(question))]
        else:
            prompt = state.config.sample_prompt
            sampling = SamplingConfig(40, seed=0)
            text = prompt + generate(state.model, self.tokenizer, prompt, sampling)
            turns = [(False, " ".join(text.split()))]
        self.add(state.step, turns)

    def add(self, step: int, turns: list[tuple[bool, str]]) -> None:
        """Keep what was said."""
        self.taken.append((step, turns))
        self._write("a", self.taken[-1:])

    def _write(self, mode: str, samples: list[Sample]) -> None:
        with contextlib.suppress(OSError):  # what is only shown must not end the training
            with (self.out / FILE).open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(sample) + "\n" for sample in samples)

    def _questions(self) -> list[str]:
        data = (read_json(self.out / "config.json") or {}).get("data", {})
        source = str(data.get("data"))
        return shown(language_of(source))[:2] if is_companion(source) else ["Hello!"]


def read_samples(out: str | Path) -> list[Sample]:
    """What the model of a run said while it was trained, where a display was there to ask."""
    path, found = Path(out) / FILE, list[Sample]()
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError):
            step, turns = json.loads(line)
            found.append((int(step), [(bool(user), str(text)) for user, text in turns]))
    return found


def evaluated(out: Path, state: TrainState) -> dict[str, Any]:
    """The line of an evaluation as training makes them, of the model as it is now."""
    manifest = read_json(out / "data" / "manifest.json") or {}
    first = end_of_text_id(load_tokenizer(out / "tokenizer.json")) or 0
    tokens = np.memmap(out / "data" / "validation.bin", dtype=manifest["dtype"], mode="r")
    tokens = tokens[: state.config.eval_tokens]
    device = choose_device(state.config.device, state.config.dtype)
    nats = total_loss(state.model, tokens, first, device, processes=Processes())
    return {"step": state.step, "val_loss": nats / max(int((tokens >= 0).sum()), 1)}
