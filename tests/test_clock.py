"""Runs that end by the clock: their schedule, their end, their resume. The clock here is a fake."""

import dataclasses
import math
import time
from types import SimpleNamespace

import pytest
import torch

import bitllm_core as bit
from bitllm import clock
from tests import tiny
from tests.conftest import state_of

MINUTE = dataclasses.replace(
    tiny.TRAIN, minutes=1.0, log_every_steps=1, eval_every_steps=0, save_every_steps=0
)


class FakeTime(bit.Callback):
    """A clock that shows a second more after each step, as long as nothing else moves it."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(clock.Clock, "seconds_of_end", lambda _: 2.0)
        self.begun = self.paused = None
        self.lines, self.steps_shown = [], []

    def on_start(self, state):
        self.begun = state.step

    def on_step(self, state, metrics):
        self.now += 1
        self.lines.append(metrics)
        self.steps_shown.append(state.config.max_steps)


@pytest.fixture
def fake(monkeypatch):
    return FakeTime(monkeypatch)


@pytest.fixture
def train_for(tiny_config, tiny_corpus, tmp_path, fake):
    """Train in a folder, a command that starts now; returns the state."""

    def train(out="run", config=MINUTE, more=(), **options):
        data = bit.DataConfig(data=str(tiny_corpus))
        callbacks = [fake, *more]
        options = {"started": fake.now, **options}
        return bit.train(tiny_config, data, config, tmp_path / out, callbacks=callbacks, **options)

    return train


def test_the_rate_falls_by_the_time_that_has_passed():
    config = dataclasses.replace(MINUTE, warmup_steps=4, cooldown_fraction=0.4)
    factors = [bit.learning_rate_factor(config, 1000, share) for share in (0, 0.5, 0.6, 0.8, 0.99)]
    assert factors == pytest.approx([1, 1, 1, 0.5, 0.025], abs=0.05)
    assert bit.learning_rate_factor(config, 0, 0.3) == 0.25  # the warm-up counts steps
    cosine = dataclasses.replace(config, schedule="cosine", max_steps=1000)
    assert bit.learning_rate_factor(cosine, 10, 1 - 1e-9) == pytest.approx(0.1)


def test_a_run_that_counts_steps_does_not_look_at_the_time():
    steps = dataclasses.replace(MINUTE, minutes=None, max_steps=50)
    for step in range(50):
        factor = bit.learning_rate_factor(steps, step)
        assert factor == bit.learning_rate_factor(steps, step, 0.7)


def test_it_ends_by_the_clock_and_the_rate_with_it(train_for, fake):
    state = train_for(started=fake.now - 10)  # imports and tokenizing took ten seconds
    assert state.step == 48  # a minute less ten seconds less two for the end
    assert state.finished
    assert state.clock_seconds == 60
    rates = [line["learning_rate"] for line in fake.lines]
    assert rates[10] == max(rates)
    assert 0 < rates[-1] < 0.06 * max(rates)
    assert fake.steps_shown[-1] - 48 in range(-1, 3)  # what progress bars show is a guess
    assert train_for().step == 48  # it is complete: another command only reads it
    assert fake.begun == 0


def test_the_last_checkpoint_holds_that_the_time_is_over(train_for, tmp_path):
    """Also where one of the same step was just saved."""
    train_for(config=dataclasses.replace(MINUTE, save_every_steps=1))
    assert bit.load_checkpoint(tmp_path / "run")["clock_seconds"] == 60


def test_more_minutes_stretch_a_run_and_fewer_than_it_used_are_refused(train_for, fake, capsys):
    assert train_for().step == 58
    more = dataclasses.replace(MINUTE, minutes=2.0)
    assert train_for(config=more).step == 58 + 58
    assert "minutes: 1.0 -> 2.0; the schedule now ends there" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"minutes=1.0: expected at least 2, which this run"):
        train_for()


def test_a_run_of_the_clock_stays_one_and_one_of_steps_may_get_minutes(train_for, fake, tmp_path):
    steps = dataclasses.replace(tiny.TRAIN, max_steps=4)
    train_for()
    with pytest.raises(ValueError, match=r"minutes=None: expected as this run began"):
        train_for("run", steps)
    before = train_for("steps", steps)
    assert before.finished
    assert before.train_seconds > 0
    after = train_for("steps", MINUTE)
    assert after.step > 4
    assert after.clock_seconds == 60
    clock = bit.load_checkpoint(tmp_path / "steps")["config"]["train"]["minutes"]
    assert clock == 1
    with pytest.raises(ValueError, match=r"minutes=None: expected as this run began"):
        train_for("steps", steps)


def test_it_resumes_with_the_time_that_it_has_used(train_for, fake, tmp_path):
    train_for("whole")
    fake.now = 5000.0
    state = train_for("parts", more=[tiny.StopAt(20)])
    assert state.step == 20
    assert bit.load_checkpoint(tmp_path / "parts")["clock_seconds"] == 20
    fake.now += 86_400  # overnight
    train_for("parts")
    assert fake.begun == 20
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    differ = [n for n, v in whole.items() if not torch.equal(*map(torch.as_tensor, (v, parts[n])))]
    assert not differ  # the clock showed the same at each step, so the bits are the same


def test_a_pause_does_not_count_but_what_others_took_does(train_for, fake):
    class Pause(bit.Callback):
        def on_step(self, state, metrics):
            state.paused = state.step == 10
            fake.now += 20 * (state.step == 30)  # another program had the cores

        def on_pause(self, state):
            state.paused = fake.now < 5000  # asked about ten times a second
            fake.now += 3000 * state.paused

    assert train_for(more=[Pause()]).step == 58 - 20 + 1  # the paused step is not counted either


def test_a_small_text_ends_a_run_before_it_is_learned_by_heart(train_for, fake, capsys):
    hour = dataclasses.replace(MINUTE, minutes=60.0)
    state = train_for(config=hour)
    assert state.step == math.ceil(clock.USEFUL_EPOCHS * 4036 / 128)
    assert state.finished
    assert f"minutes: the text was read {clock.USEFUL_EPOCHS:g} times" in capsys.readouterr().err
    assert fake.lines[-1]["learning_rate"] < 0.05 * fake.lines[9]["learning_rate"]
    assert train_for(config=hour).step == state.step


def test_too_little_time_is_one_step_and_the_run_complete(train_for, fake):
    config = dataclasses.replace(MINUTE, minutes=0.07)  # 60 * 0.07 / 60 is more than 0.07
    for _ in range(2):
        state = train_for(config=config, started=fake.now - 100)
        assert (state.step, state.finished) == (1, True)


def test_other_processes_take_the_time_of_the_main_one(train_for, fake, monkeypatch):
    class Second(bit.Processes):
        rank, world_size, is_main = 1, 2, False

        def __init__(self):
            super().__init__()
            self.main = iter([0.1, 0.5, 1.0])

        def all_reduce_max(self, values):
            return [values[0], next(self.main)] if len(values) == 2 else list(values)

    session = SimpleNamespace(
        state=SimpleNamespace(step=9, clock_seconds=0.0, train_seconds=0.0, stop_signal=0),
        config=MINUTE,
        processes=Second(),
        model_config=tiny.MODEL,
        data=SimpleNamespace(epoch_tokens=1000),
        evaluate=None,
    )
    session.clock = clock.Clock(session, fake.now)
    shares = []
    for _ in range(3):
        fake.now += 1000
        assert not bit.Session.stop_asked(session)
        shares.append(session.state.time_share)
    assert shares == [0.1, 0.5, 1.0]


def test_the_last_evaluation_of_a_long_text_reads_a_part(train_for, fake, monkeypatch, capsys):
    tokens = 64
    monkeypatch.setattr(clock.Clock, "_tokens_at_end", lambda _: tokens)
    train_for()
    assert f"reads the first {tokens} of " in capsys.readouterr().err


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf, 1e9])
def test_minutes_that_are_no_time_are_refused(minutes):
    with pytest.raises(ValueError, match=r"minutes=.*: expected"):
        bit.TrainConfig(minutes=minutes)


def test_room_for_the_end_follows_the_speed(monkeypatch):
    validation = range(100_000)
    session = SimpleNamespace(
        state=SimpleNamespace(step=0, clock_seconds=0.0, train_seconds=0.0, paused=False, tokens=0),
        config=dataclasses.replace(MINUTE, batch_tokens=128, eval_tokens=1000),
        processes=bit.Processes(),
        model_config=tiny.MODEL,
        data=SimpleNamespace(validation=validation, epoch_tokens=10**6),
        evaluate=None,
    )
    found = clock.Clock(session, time.monotonic())
    assert found.seconds_of_end() == pytest.approx(clock.AFTERWARDS_S, abs=0.1)
    session.state.config = session.config
    session.state.step, session.state.train_seconds = 4, 4 * 0.128  # a millisecond per token
    found.read()
    assert found._tokens_at_end() in (1799, 1800)  # 0.03 of a minute
    assert found.seconds_of_end() == pytest.approx(clock.AFTERWARDS_S + 1.8 + 0.064, abs=0.1)
    found.token_s = 1e-9
    assert found._tokens_at_end() == len(validation)
    session.state.clock_seconds, session.state.train_seconds = 0.0, 45.0  # of a run of steps
    clock.Clock(session, time.monotonic())
    assert session.state.clock_seconds == 45
    assert session.state.time_share == 0.75


def test_a_command_by_the_real_clock(run_cli, tmp_path):
    start = time.monotonic()
    done = run_cli("train", "--preset", "ci", "--minutes", "0.25", "--out", tmp_path / "run")
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    assert "complete: " in done.stdout
    saved = bit.load_checkpoint(tmp_path / "run")
    assert saved["step"] > 1
    assert saved["clock_seconds"] >= 15
    assert seconds > 10  # it did not take the preset's 40 steps for the end
    assert run_cli("train", "--out", tmp_path / "run").returncode == 0
    assert bit.load_checkpoint(tmp_path / "run")["step"] == saved["step"]
