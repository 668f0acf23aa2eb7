"""Google Drive, there and not there."""

import dataclasses
import shutil
import sys

import pytest

import bitllm_core as bit
from bitllm.notebook.drive import mount_drive
from bitllm.notebook.settings import Settings
from tests.faults import Fault, inject

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_drive_mounts(colab, tmp_path, capsys):
    asked = {}

    def mount(point, timeout_ms):
        asked[point] = timeout_ms
        (tmp_path / "drive" / "MyDrive").mkdir(parents=True)

    colab.mount = mount
    folder = mount_drive(str(tmp_path / "drive"), timeout_s=5)
    assert folder == tmp_path / "drive" / "MyDrive" / "bitllm"
    assert folder.is_dir()
    assert list(asked.values()) == [5000]
    assert "mounted" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        type("MessageError", (Exception,), {})("Error: credential propagation was unsuccessful"),
        ValueError("mount failed"),
        TimeoutError("timed out"),
        OSError(107, "Transport endpoint is not connected"),
    ],
)
def test_drive_refused_or_timed_out_is_one_line(colab, capsys, error):
    def mount(point, timeout_ms):
        raise error

    colab.mount = mount
    assert mount_drive() is None
    text = capsys.readouterr().out
    assert type(error).__name__ in text
    assert "run this cell once more" in text


def test_a_mounted_but_broken_drive_is_one_line(colab, tmp_path, capsys):
    colab.mount = lambda point, timeout_ms: None
    (tmp_path / "drive").write_text("a file where the folder should be")
    assert mount_drive(str(tmp_path / "drive")) is None
    assert "not mounted" in capsys.readouterr().out


class Stop(bit.Callback):
    def on_step(self, state, metrics):
        state.stop_signal = 2 * (state.step == 20)


def test_a_drive_that_breaks_in_the_run_and_a_new_machine_the_next_day(
    colab, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("bitllm.mirror.RETRY_S", (0.01, 0.05))
    colab.mount = lambda point, timeout_ms: (tmp_path / "drive" / "MyDrive").mkdir(parents=True)
    drive = mount_drive(str(tmp_path / "drive"))
    settings = Settings("ci", mirror=str(drive / "ci"))
    model, data, train = settings.configs()
    train = dataclasses.replace(train, save_every_steps=5)
    broken = Fault("ENOTCONN", "write", at=10, times=10**9)
    with inject(drive, broken):
        state = bit.train(model, data, train, "runs/ci", callbacks=[Stop()], **settings.options)
    assert state.step == 20
    assert "Errno 107" in capsys.readouterr().err
    first = bit.MetricsLog.read(tmp_path / "runs" / "ci" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "runs")  # the machine is gone, and with it all but the Drive
    assert "of 40 steps done; will resume, from" in settings.describe()
    state = bit.train(model, data, train, "runs/ci", callbacks=(), **settings.options)
    assert state.step == 40
    steps = [x["step"] for x in bit.MetricsLog.read(tmp_path / "runs" / "ci" / "metrics.jsonl")]
    assert steps[: len(first)] == [line["step"] for line in first]  # the curve is whole
    assert bit.list_checkpoints(drive / "ci" / "checkpoints")[-1].stem == "step_00000040"


def test_without_colab_there_is_no_drive(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "google.colab", None)
    assert mount_drive() is None
    assert "not Colab" in capsys.readouterr().out
