"""What a resume meets: remains, strangers' files, other versions, full disks, a second process."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch

import bitllm_core as bit
from tests import tiny, warm
from tests.conftest import ROOT, assert_same_bits, state_of, without_times
from tests.faults import Fault, inject
from tests.tiny import StopAt


def files_of(folder):
    paths = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return sorted(str(path) for path in paths if not path.name.startswith("."))


def test_nothing_whole_is_said_and_not_begun_over(run, tmp_path):
    run(tmp_path / "run", max_steps=6)
    for path in (tmp_path / "run" / "checkpoints").glob("*.json"):
        path.unlink()
    before = files_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no checkpoint that is whole.*--resume never"):
        run(tmp_path / "run", max_steps=6)
    assert files_of(tmp_path / "run") == before
    assert run(tmp_path / "run", max_steps=6, resume="never").step == 6


def test_settings_come_back_from_a_checkpoint_and_a_lost_log_does_no_harm(run, tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "run", callbacks=[StopAt(7)])
    for name in ("config.json", "metrics.jsonl", "tokenizer.json"):
        (tmp_path / "run" / name).unlink()
    run(tmp_path / "run")
    later = [line for line in without_times(tmp_path / "whole") if line["step"] > 7]
    assert without_times(tmp_path / "run") == later
    assert_same_bits(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))
    (tmp_path / "run" / "metrics.jsonl").unlink()  # of a finished run: it is evaluated again
    assert run(tmp_path / "run").val_loss == later[-1]["val_loss"]


def test_a_checkpoint_of_the_format_before_resumes(run, tmp_path):
    """It also held the lines of metrics.jsonl."""
    run(tmp_path / "whole")
    run(tmp_path / "run", callbacks=[StopAt(7)])
    folder = tmp_path / "run" / "checkpoints"
    lines = bit.MetricsLog.read(tmp_path / "run" / "metrics.jsonl")
    old = {**bit.newest_checkpoint(folder), "format_version": 2, "metrics": lines}
    path = bit.save_checkpoint(folder, old)
    manifest = path.with_suffix(".json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 2}))
    run(tmp_path / "run")
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")
    assert_same_bits(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))


def test_fewer_steps_than_are_done_are_refused(run, tmp_path):
    run(tmp_path / "run")
    with pytest.raises(ValueError, match="max_steps=8: expected at least 12"):
        run(tmp_path / "run", max_steps=8)


def test_other_versions_are_said_and_not_refused(run, tmp_path, monkeypatch, capsys):
    run(tmp_path / "run", callbacks=[StopAt(6)])
    monkeypatch.setattr(bit, "versions", lambda: {"python": "3.99", "torch": "9", "numpy": "8"})
    assert run(tmp_path / "run").step == 12
    said = capsys.readouterr().err
    assert "python" in said
    assert "-> 3.99" in said


def test_a_checkpoint_of_another_shape_is_refused_by_name(run, tmp_path):
    run(tmp_path / "run", callbacks=[StopAt(6)])
    folder = tmp_path / "run" / "checkpoints"
    good = bit.newest_checkpoint(folder)
    state = good["optimizers"][0]["state"]
    name = next(iter(state))
    for change in (
        {"optimizers": [{"state": {name: {"momentum_buffer": torch.zeros(9)}}}, {"state": {}}]},
        {"trits": {name.removesuffix(".weight"): torch.zeros(1, 1, dtype=torch.int8)}},
        {"rng": {"torch": torch.zeros(3, dtype=torch.uint8), "cuda": []}},
        {"loss": "0.1"},
        {"model": {}},
        {"scaler": 7, "trits": None},
    ):
        bit.save_checkpoint(folder, {**good, **change})
        with pytest.raises(ValueError, match="step 6 is not of this run"):
            run(tmp_path / "run")
    bit.save_checkpoint(folder, good)
    assert run(tmp_path / "run").step == 12


def test_hostile_token_files_are_made_again(run, tmp_path):
    run(tmp_path / "run", callbacks=[StopAt(6)])
    path = tmp_path / "run" / "data" / "manifest.json"
    good = json.loads(path.read_text())
    tokens = (tmp_path / "run" / "data" / "train.bin").read_bytes()
    beyond = bytes(len(tokens) - 2) + b"\xff\xff"  # an id without a row
    (tmp_path / "run" / "data" / "train.bin").write_bytes(beyond)
    digest = bit.file_hash(tmp_path / "run" / "data" / "train.bin")
    changes = [
        {"train": {**good["train"], "sha256": digest}},
        {"dtype": "O"},
        {"train": None},
        {"train": {"tokens": 10**15, "sha256": ""}},
        {"tokenizer_sha256": []},
    ]
    for change in changes:
        path.write_text(json.dumps({**good, **change}))
        state = run(tmp_path / "run", max_steps=12 + 0, callbacks=[StopAt(7)])
        assert state.step >= 7
        assert (tmp_path / "run" / "data" / "train.bin").read_bytes() == tokens


HELD = """
import gc, json, sys, torch
import bitllm_core as bit
from tests.tiny import StopAt

model, train = (kind(**values) for kind, values in zip(
    (bit.ModelConfig, bit.TrainConfig), json.loads(sys.argv[3])))

class Weigh(bit.Callback):
    def on_step(self, state, metrics):
        if state.step == train.max_steps:
            gc.collect()
            kinds = (torch.Tensor, torch.nn.Parameter)  # no compiler's fake ones
            found = [x.untyped_storage() for x in gc.get_objects() if type(x) in kinds]
            print(sum({x.data_ptr(): x.nbytes() for x in found}.values()))

callbacks = [Weigh(), StopAt(int(sys.argv[4]))]
bit.train(model, bit.DataConfig(sys.argv[1]), train, sys.argv[2], callbacks=callbacks)
"""


def test_resuming_holds_one_copy_of_the_weights(tmp_path, tiny_corpus):
    """No out-of-memory after a resume that the first start did not have.

    Each session has a process of its own: what an earlier one has left is not the resumed one's.
    """
    steps = {"batch_tokens": 128, "max_steps": 4, "eval_every_steps": 0, "save_every_steps": 0}
    steps |= {"optimizer": "adamw", "dtype": "float32", "compile": "off"}
    configs = json.dumps([{"vocab_size": 300}, steps])

    def held(out, stop_at=0):
        arguments = [str(tiny_corpus), str(tmp_path / out), configs, str(stop_at)]
        command = [sys.executable, "-c", HELD, *arguments]
        done = warm.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    whole = int(held("whole"))
    assert held("parts", stop_at=2) == ""
    assert int(held("parts")) <= whole * 1.02


def test_a_full_disk_is_said_and_training_goes_on(run, tmp_path, capsys):
    with inject(tmp_path / "run", Fault("ENOSPC", "write", at=1, times=3)):
        state = run(tmp_path / "run")
    said = capsys.readouterr().err
    assert "could not be saved: [Errno 28] No space left on device" in said
    assert "Training continues" in said
    assert state.last_saved_step == 12


def test_metrics_that_could_not_be_written_are_written_later(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    log = bit.MetricsLog(path, 0)
    log.write({"step": 1})
    path.rename(tmp_path / "aside")
    path.mkdir()
    log.write({"step": 2})
    log.write({"step": 3, "loss": math.nan})
    assert capsys.readouterr().err.count("cannot be written") == 1
    path.rmdir()
    (tmp_path / "aside").rename(path)
    log.write({"step": 4})
    lines = bit.MetricsLog.read(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert "NaN" not in path.read_text()  # which JSON does not have
    assert math.isnan(lines[2]["loss"])


def test_metrics_of_strangers_do_no_harm(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": "x"}\n[1]\n{"step": 2, "loss": 1}\n' + "[" * 99_999 + "\n{")
    assert bit.MetricsLog.read(path) == [{"step": 2, "loss": 1}]


CLOSED = """
import os, signal, sys
import bitllm_core as bit
from tests import tiny

class Terminal(bit.Callback):
    def on_step(self, state, metrics):
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGHUP)

data = bit.DataConfig(data=sys.argv[1])
state = bit.train(tiny.MODEL, data, tiny.TRAIN, sys.argv[2], callbacks=[Terminal()])
print(state.step, state.last_saved_step, state.stop_signal)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
@pytest.mark.parametrize(("ignored", "says"), [(False, "5 5 1"), (True, "12 12 0")])
def test_a_closed_terminal_saves_first_unless_nohup_is_there(tmp_path, tiny_corpus, ignored, says):
    how = "SIG_IGN" if ignored else "SIG_DFL"  # whatever these tests were started with
    code = f"import signal; signal.signal(signal.SIGHUP, signal.{how})\n{CLOSED}"
    command = [sys.executable, "-c", code, str(tiny_corpus), str(tmp_path / "run")]
    done = warm.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == says


def test_a_folder_whose_settings_are_not_a_runs_is_left_as_it_is(tmp_path, tiny_corpus):
    export = tmp_path / "export" / "config.json"
    export.parent.mkdir()
    export.write_text('{"model_type": "bitnet"}')
    mirrors = ("export", {"mirror": tmp_path / "copy"}), ("new", {"mirror": export.parent})
    for out, more in (("export", {}), *mirrors):
        with pytest.raises(ValueError, match=r"config\.json of='.*export': expected a run's"):
            bit.train(
                tiny.MODEL, bit.DataConfig(str(tiny_corpus)), tiny.TRAIN, tmp_path / out, **more
            )
    assert export.read_text() == '{"model_type": "bitnet"}'
    assert [*tmp_path.rglob("*")] == [export.parent, export]


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
def test_a_second_process_on_the_same_run_is_refused(tmp_path):
    command = [sys.executable, str(ROOT / "bitllm_core.py"), "train", "--preset", "ci"]
    command += ["--max-steps", "100000", "--compile", "off", "--out", str(tmp_path / "run")]
    first = warm.start(command, stderr=subprocess.DEVNULL)
    try:
        until = time.time() + 120
        while not (tmp_path / "run" / "metrics.jsonl").is_file() and time.time() < until:
            time.sleep(0.1)
        second = warm.run(command, capture_output=True, text=True, timeout=120, check=False)
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) == 143
    assert second.returncode == 2
    assert "another process is training in it" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
