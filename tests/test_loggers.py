"""TensorBoard and Weights & Biases hold what metrics.jsonl holds, also after a kill."""

import dataclasses
import os
import shutil
import signal
import struct
import sys
import types

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

import bitllm_core as bit
from bitllm import cli, loggers


class Events(bit.Callback):
    """Stops or breaks off after a step, as a signal or a kill would."""

    def __init__(self, stop=0, die=0):
        self.stop, self.die = stop, die

    def on_step(self, state, metrics):
        if state.step == self.die:
            raise InterruptedError("killed")
        if state.step == self.stop:
            state.stop_signal = signal.SIGTERM


@pytest.fixture
def session(tmp_path, tiny_config, tiny_train, tiny_corpus):
    def run(*callbacks, stop=0, die=0, folder="run", **changes):
        data, train = bit.DataConfig(data=str(tiny_corpus)), dataclasses.replace(tiny_train)
        callbacks = [*callbacks, Events(stop, die)]
        train = dataclasses.replace(train, **changes)
        return bit.train(tiny_config, data, train, tmp_path / folder, callbacks=callbacks)

    return run


def metrics(folder):
    """{tag: [(step, value), ...]} of metrics.jsonl."""
    curves = {}
    for line in bit.MetricsLog.read(folder / "metrics.jsonl"):
        for tag, value in loggers.curve_points(line).items():
            curves.setdefault(tag, []).append((line["step"], np.float32(value)))
    return curves


def shown(reader):
    """The same of what TensorBoard shows."""
    reader.Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(x.step, np.float32(x.value)) for x in reader.Scalars(tag)] for tag in tags}


def test_points_are_named_for_charts_and_nothing_is_left_out():
    line = {"step": 3, "loss": 2.0, "flip_rate": [0.1, 0.2]}
    expected = {"train/loss": 2.0, "flip_rate/layer_00": 0.1, "flip_rate/layer_01": 0.2}
    assert loggers.curve_points(line) == expected
    assert loggers.curve_points({"step": 3, "val_loss": 2.0}) == {"validation/val_loss": 2.0}
    last = {"step": 3, "val_loss": 2.0, "final": True}
    assert loggers.curve_points(last) == {"final/val_loss": 2.0}


def test_tensorboard_shows_the_log_after_a_kill_and_a_session_without_it(tmp_path, session):
    run, seen = tmp_path / "run", []

    def look(state, path):
        losses = shown(EventAccumulator(str(run / "tensorboard")))["train/loss"]
        seen.append(losses[-1][0] == state.step)

    board = loggers.TensorBoard(run)
    board.on_checkpoint = look
    with pytest.raises(InterruptedError):
        session(board, die=8, log_every_steps=1)  # back to step 6
    assert seen
    assert all(seen)  # at once, not in two minutes
    viewer = EventAccumulator(str(run / "tensorboard"))
    assert [step for step, _ in shown(viewer)["train/loss"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    session(stop=10)
    session(loggers.TensorBoard(run))
    curves = metrics(run)
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4, 5, 6, 8, 10, 12]
    assert {"validation/val_loss", "final/val_loss", "zero_fraction/layer_01"} <= set(curves)
    assert shown(EventAccumulator(str(run / "tensorboard"))) == curves
    assert shown(viewer) == curves  # one that was open all the time


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_the_curve_and_not_the_training(tmp_path, session, monkeypatch, capsys):
    run, written = tmp_path / "run", []

    def write(self, data):
        written.append(data)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        board = loggers.TensorBoard(run)
        board.on_checkpoint = lambda state, path: patch.setattr(RecordWriter, "write", write)
        assert session(board, stop=9).step == 9
    told = capsys.readouterr().err
    assert told.count("TensorBoard: OSError: [Errno 28] No space left on device") == 1
    assert len(written) == 1
    assert session(loggers.TensorBoard(run)).finished
    assert shown(EventAccumulator(str(run / "tensorboard"))) == metrics(run)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_before_any_work(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "run"
    assert cli.main(["train", "--preset", "ci", "--out", str(out), f"--{name}"]) == 1
    assert f"needs the package {name}: pip install {name}" in capsys.readouterr().err
    assert not out.exists()


class Server(types.ModuleType):
    """What W&B keeps, and its rule that steps only rise; `wandb` itself is tried below."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.logged, self.finished = {}, [], 0

    def init(self, *, project, dir, id, name, resume, config):
        assert resume == "allow"
        assert config["train"]["max_steps"] == 12
        history = self.runs.setdefault(id, {})

        def log(points, step):
            assert step >= max(history, default=0), "W&B would drop it"
            history.setdefault(step, {}).update(points)
            self.logged.append((step, *points))

        following = max(history, default=-1) + 1
        return types.SimpleNamespace(step=following, log=log, finish=self.finish)

    def finish(self):
        self.finished += 1


def test_sessions_go_on_with_one_run_and_bring_nothing_twice(
    tmp_path, session, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", server := Server())
    run = tmp_path / "run"
    early = {"eval_every_steps": 1, "log_every_steps": 2}  # an evaluation comes before all else
    with pytest.raises(InterruptedError):
        session(loggers.WandB(run, "mine"), die=8, **early)  # back to step 6
    session(loggers.WandB(run, "mine"), stop=10, **early)
    shutil.move(run, tmp_path / "moved")
    shutil.move(tmp_path / "moved", run)
    session(loggers.WandB(run, "mine"), **early)
    [history] = server.runs.values()
    there = {}
    for line in bit.MetricsLog.read(run / "metrics.jsonl"):
        there.setdefault(line["step"], {}).update(loggers.curve_points(line))
    assert list(history) == list(there)
    assert set(there[12]) == set(history[12])
    assert history[12]["train/loss"] == there[12]["train/loss"]
    assert len(set(server.logged)) == len(server.logged)
    assert server.finished == 3
    session(loggers.WandB(tmp_path / "twin"), folder="twin", stop=2, **early)
    assert len(server.runs) == 2


def test_no_network_ends_the_curve_and_not_the_training(tmp_path, session, monkeypatch, capsys):
    def init(**settings):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    assert session(loggers.WandB(tmp_path / "run")).finished
    assert capsys.readouterr().err.count("WandB: ConnectionError: no route to host") == 1


def records(path):
    """The protocol buffers of an offline run: LevelDB's log, blocks of 32 kB behind 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_the_real_wandb_keeps_every_line_offline(tmp_path, run_cli, tiny_corpus):
    out = tmp_path / "run"
    offline = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    flags = ["--preset", "ci", "--data", tiny_corpus, "--out", out, "--vocab-size", 300]
    flags += ["--max-steps", 8, "--log-every-steps", 2, "--eval-every-steps", 3]
    done = run_cli("train", *flags, "--wandb", "mine", env=offline)
    assert done.returncode == 0, done.stderr
    assert "It gets no more" not in done.stderr
    there, kept = {}, {}
    for line in bit.MetricsLog.read(out / "metrics.jsonl"):
        there.setdefault(line["step"], {}).update(loggers.curve_points(line))
    [path] = (out / "wandb").glob("offline-run-*/*.wandb")
    for record in records(path):
        if record.HasField("run"):
            assert record.run.project == "mine"
            assert record.run.display_name == "run"
        for item in record.history.item:
            name = "/".join(item.nested_key) or item.key
            if not name.startswith("_"):
                kept.setdefault(record.history.step.num, {})[name] = float(item.value_json)
    assert kept == there
