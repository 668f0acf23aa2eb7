"""Requests left in the run folder: stop, pause, continue, save."""

import dataclasses
import time

import pytest

import bitllm.requests as requests
import bitllm_core as bit
from bitllm.notebook.watch import is_training
from bitllm.requests import Requests, ask


class AskAt(bit.Callback):
    """Leaves requests as another process would, and notes what comes of them."""

    def __init__(self, out, words):
        self.out, self.words, self.paused, self.busy = out, words, [], None

    def on_step(self, state, metrics):
        if state.step in self.words:
            ask(self.out, self.words[state.step])

    def on_pause(self, state):
        self.paused.append(state.step)
        self.busy = is_training(self.out)
        ask(self.out, "continue")


def test_they_are_read_between_steps_and_reach_the_loop(
    tmp_path, tiny_config, tiny_train, tiny_corpus, monkeypatch
):
    monkeypatch.setattr(requests, "READ_EVERY_S", 0.0)
    out = tmp_path / "run"
    out.mkdir()
    ask(out, "stop")  # a remainder of an earlier session stops nothing
    asker = AskAt(out, {2: "save", 3: "pause", 5: "stop"})
    callbacks = [asker, Requests(out)]
    data = bit.DataConfig(str(tiny_corpus))
    config = dataclasses.replace(tiny_train, save_every_steps=0)
    state = bit.train(tiny_config, data, config, out, callbacks=callbacks)
    assert state.step == 5
    assert state.stop_signal
    assert set(asker.paused) == {3}
    assert asker.busy is True
    assert not is_training(out)
    steps = [bit.checkpoint_step(p) for p in bit.list_checkpoints(out / "checkpoints")]
    assert steps == [2, 5]
    assert not list(out.glob(".request-*"))


def test_looking_costs_nothing_between_looks(tmp_path, monkeypatch):
    looks = []
    reader = Requests(tmp_path)
    monkeypatch.setattr(reader, "_taken", lambda: looks.append(time.monotonic()) or [])
    for _ in range(1000):
        reader.on_step(None, None)
    assert len(looks) <= 2


def test_a_request_that_nobody_would_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"word='halt': expected stop, pause"):
        ask(tmp_path, "halt")
    with pytest.raises(FileNotFoundError):
        ask(tmp_path / "none", "stop")
