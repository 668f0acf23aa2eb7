"""The copier to a second folder: never waited for, never the end of a training, and exact."""

import dataclasses
import json
import re
import shutil
import signal
import sys
import threading
import time

import pytest
import torch

import bitllm_core as bit
from tests.conftest import ROOT, assert_same_bits, state_of, without_times
from tests.faults import Fault, inject


@pytest.fixture
def run(tiny_config, tiny_train, tiny_corpus, monkeypatch):
    monkeypatch.setattr(bit, "MIRROR_RETRY_S", (0.01, 0.05))

    def train(out, mirror=None, *, callbacks=(), resume="auto", model=None, **changes):
        return bit.train(
            model or tiny_config,
            bit.DataConfig(data=str(tiny_corpus)),
            dataclasses.replace(tiny_train, **changes),
            out,
            mirror=mirror,
            resume=resume,
            callbacks=callbacks,
        )

    return train


class StopAt(bit.Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, state, metrics):
        if state.step == self.step:
            state.stop_signal = signal.SIGINT


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_mirror_becomes_a_run_folder(run, tmp_path):
    run(tmp_path / "run", tmp_path / "mirror")
    assert files_of(tmp_path / "mirror") == files_of(tmp_path / "run")
    for name in files_of(tmp_path / "run"):
        assert (tmp_path / "mirror" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    model, tokenizer = bit.load_model(tmp_path / "mirror")
    assert bit.generate(model, tokenizer, "1 cats", bit.SamplingConfig(seed=0))


@pytest.mark.parametrize("stop", [4, 7])
def test_a_fresh_machine_goes_on_from_the_mirror_alone(run, tmp_path, stop):
    run(tmp_path / "whole")
    run(tmp_path / "first", tmp_path / "mirror", callbacks=[StopAt(stop)])
    shutil.rmtree(tmp_path / "first")
    state = run(tmp_path / "second", tmp_path / "mirror")
    assert state.mirror.last_good_step == 12
    assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "second"))
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "second")
    best = [
        bit.newest_checkpoint(tmp_path / n / "checkpoints", "best") for n in ("whole", "second")
    ]
    assert best[0]["step"] == best[1]["step"]
    assert_same_bits(best[0]["model"], best[1]["model"])


def test_one_command_without_a_preset_goes_on_from_the_mirror(run_cli, tmp_path):
    command = ["train", "--preset", "ci", "--max-steps", "12", "--save-every-steps", "3"]
    first = run_cli(*command, "--out", tmp_path / "a", "--mirror", tmp_path / "mirror")
    assert first.returncode == 0, first.stderr
    shutil.rmtree(tmp_path / "a")
    again = run_cli("train", "--out", tmp_path / "b", "--mirror", tmp_path / "mirror")
    assert again.returncode == 0, again.stderr
    assert "fetched" in again.stderr
    assert "complete: 12 steps" in again.stdout
    assert_same_bits(state_of(tmp_path / "mirror"), state_of(tmp_path / "b"))


def test_token_files_come_from_the_mirror_and_not_from_the_text(run, tmp_path, tiny_corpus):
    run(tmp_path / "a", tmp_path / "mirror", callbacks=[StopAt(4)])
    shutil.rmtree(tmp_path / "a")
    hidden = tiny_corpus.with_suffix(".hidden")
    tiny_corpus.rename(hidden)
    try:
        assert run(tmp_path / "b", tmp_path / "mirror").step == 12
    finally:
        hidden.rename(tiny_corpus)


class Hanging(bit.Folder):
    """A file system that does not answer; `go` lets it."""

    go = threading.Event()

    def write(self, name, blocks):
        if "mirror" in str(self.path):
            self.go.wait(60)
        super().write(name, blocks)


def test_training_does_not_wait_for_a_mirror_that_hangs(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bit, "Folder", Hanging)
    monkeypatch.setattr(bit, "MIRROR_FINISH_S", 0.5)
    Hanging.go.clear()
    state = run(tmp_path / "run", tmp_path / "mirror")
    assert state.step == 12
    assert state.mirror.last_good_step is None
    assert "mirror: nothing copied yet" in capsys.readouterr().err
    Hanging.go.set()
    assert state.mirror.close(60)  # or its thread would copy under the next test's eyes


def test_a_copier_that_falls_behind_skips_to_the_newest(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bit, "Folder", Hanging)
    Hanging.go.clear()
    copied = []
    plain = bit.copy_checkpoint

    def seen(source, name, target, progress=None):
        if "mirror" in str(target.path):
            copied.append(name)
        plain(source, name, target, progress)

    class GoAtTheEnd(bit.Callback):
        def on_end(self, state):
            Hanging.go.set()

    monkeypatch.setattr(bit, "copy_checkpoint", seen)
    run(tmp_path / "run", tmp_path / "mirror", callbacks=[GoAtTheEnd()])
    steps = [name for name in copied if name.startswith("step")]
    assert steps[-1] == "step_00000012.safetensors"
    assert len(steps) <= 2  # the one it hung with, and the newest


def test_failures_are_counted_shown_and_retried(run, tmp_path):
    heard = []
    drive = Fault("ENOTCONN", "write", at=8, times=10**9)  # after what step 3 needs

    class Ear(bit.Callback):
        def on_mirror(self, state, status):
            assert threading.current_thread() is threading.main_thread()
            heard.append(status)

        def on_step(self, state, metrics):
            time.sleep(0.1)  # so that the copier keeps up
            if state.step == 11:
                injection.faults = ()  # the drive is back

    with inject(tmp_path / "mirror", drive) as injection:
        state = run(tmp_path / "run", tmp_path / "mirror", callbacks=[Ear()])
    failing = [status for status in heard if "failing since" in status]
    assert len(failing) > 1
    assert re.fullmatch(
        r"mirror: failing since \d\d:\d\d \(\d+ errors?\), Errno 107, last good step 3", failing[0]
    )
    assert state.mirror.errors == 0
    assert state.mirror.status().startswith("mirror: step 12 is in")


def test_what_a_session_could_not_bring_the_next_one_does(run, tmp_path):
    with inject(tmp_path / "mirror", Fault("ENOTCONN", "write", at=8, times=10**9)):
        state = run(tmp_path / "run", tmp_path / "mirror")
    assert state.mirror.last_good_step == 3
    with inject(tmp_path / "mirror") as calls:
        state = run(tmp_path / "run", tmp_path / "mirror")  # it is finished: nothing to train
    assert state.mirror.status().startswith("mirror: step 12 is in")
    assert calls.calls["write"] > 0
    with inject(tmp_path / "mirror") as calls:
        run(tmp_path / "run", tmp_path / "mirror")
    assert calls.calls["write"] == 0  # what is there is not brought again
    assert_same_bits(state_of(tmp_path / "mirror"), state_of(tmp_path / "run"))


def test_the_last_two_are_kept_and_nothing_goes_before_the_newer_is_right(run, tmp_path):
    removed = []
    plain = bit.Folder.remove

    def watched(self, name):
        if "mirror" in str(self.path) and name.startswith("step") and (self.path / name).exists():
            steps = [bit.checkpoint_step(p) for p in bit.list_checkpoints(self.path)]
            removed.append((name, steps))
        plain(self, name)

    class Slow(bit.Callback):
        def on_step(self, state, metrics):
            time.sleep(0.05)

    bit.Folder.remove = watched
    try:
        run(tmp_path / "run", tmp_path / "mirror", callbacks=[Slow()])
    finally:
        bit.Folder.remove = plain
    left = [p.stem for p in bit.list_checkpoints(tmp_path / "mirror" / "checkpoints")]
    assert left == ["step_00000009", "step_00000012"]
    for name, steps in removed:
        if name.endswith(".safetensors"):
            assert len([s for s in steps if s > bit.checkpoint_step(name)]) >= 2


@pytest.mark.parametrize("kind", ["short write", "altered write"])
def test_a_corrupted_copy_in_the_mirror_is_made_again_on_reading_back(run, tmp_path, kind):
    with inject(tmp_path / "mirror", Fault(kind, "write", at=6, times=1)) as injection:
        state = run(tmp_path / "run", tmp_path / "mirror", max_steps=3)
    assert injection.struck == 1  # the data of the first checkpoint, after five smaller files
    assert state.mirror.errors == 0
    for path in bit.list_checkpoints(tmp_path / "mirror" / "checkpoints"):
        bit.load_checkpoint(path)


def test_folders_that_cannot_be_a_mirror_are_refused_before_any_work(run, tmp_path, tiny_config):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="Is the drive mounted"):
        run(out, tmp_path / "not" / "mounted")
    for mirror in (out, out / "inside", tmp_path):
        with pytest.raises(ValueError, match="expected a folder"):
            run(out, mirror)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a file"):
        run(out, tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        run(out, tmp_path / "mine")
    assert not out.exists()
    other = dataclasses.replace(tiny_config, hidden_size=64)
    run(tmp_path / "other", tmp_path / "mirror", model=other, max_steps=3)
    with pytest.raises(ValueError, match=r"mirror was made with other settings: hidden_size"):
        run(out, tmp_path / "mirror")


def test_an_unreadable_mirror_is_no_reason_to_begin_on_top_of_it(run, tmp_path):
    run(tmp_path / "a", tmp_path / "mirror", callbacks=[StopAt(6)])
    with inject(tmp_path / "mirror", Fault("ENOTCONN", "names", times=10**9)):
        with pytest.raises(ValueError, match="is not known"):
            run(tmp_path / "b", tmp_path / "mirror")
        assert run(tmp_path / "a", tmp_path / "mirror").step == 12  # what is local is enough


def test_two_runs_do_not_share_a_mirror(run, tmp_path):
    (tmp_path / "mirror").mkdir()
    with bit.FolderLock(tmp_path / "mirror"), pytest.raises(ValueError, match="being written by"):
        run(tmp_path / "run", tmp_path / "mirror")


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
def test_a_second_process_on_the_same_run_is_refused(tmp_path):
    import subprocess

    command = [sys.executable, str(ROOT / "bitllm_core.py"), "train", "--preset", "ci"]
    command += ["--max-steps", "100000", "--out", str(tmp_path / "run")]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        until = time.time() + 120
        while not (tmp_path / "run" / "metrics.jsonl").is_file() and time.time() < until:
            time.sleep(0.1)
        second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    finally:
        first.send_signal(signal.SIGTERM)
        assert first.wait(120) == 143
    assert second.returncode == 2
    assert f"process {first.pid} on" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run" / bit.LOCK_NAME).exists()


# What else a resume meets


def test_never_sets_the_old_run_aside_and_loses_nothing(run, tmp_path, tiny_config):
    run(tmp_path / "run", tmp_path / "mirror", max_steps=6)
    before = {place: files_of(tmp_path / place) for place in ("run", "mirror")}
    other = dataclasses.replace(tiny_config, hidden_size=64)
    state = run(tmp_path / "run", tmp_path / "mirror", resume="never", model=other, max_steps=3)
    assert state.step == 3
    for place, files in before.items():
        aside = tmp_path / place / "set-aside-1"
        kept = [f for f in files if f.startswith("data") or f == "tokenizer.json"]  # the same text
        assert files_of(aside) == sorted(set(files) - set(kept))
    run(tmp_path / "run", resume="never", max_steps=3)
    assert (tmp_path / "run" / "set-aside-2").is_dir()
    assert run(tmp_path / "run", max_steps=3).step == 3


def test_nothing_whole_is_said_and_not_begun_over(run, tmp_path):
    run(tmp_path / "run", max_steps=6)
    for path in (tmp_path / "run" / "checkpoints").glob("*.json"):
        path.unlink()
    before = files_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no checkpoint that is whole.*--resume never"):
        run(tmp_path / "run", max_steps=6)
    assert files_of(tmp_path / "run") == before
    assert run(tmp_path / "run", max_steps=6, resume="never").step == 6


def test_settings_and_metrics_come_back_from_a_checkpoint(run, tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "run", callbacks=[StopAt(7)])
    for name in ("config.json", "metrics.jsonl", "tokenizer.json"):
        (tmp_path / "run" / name).unlink()
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


def test_resuming_holds_one_copy_of_the_weights(run, tmp_path):
    """No out-of-memory after a resume that the first start did not have."""
    import gc

    options = {"model": bit.ModelConfig(vocab_size=300), "optimizer": "adamw"}
    options |= {"batch_tokens": 128, "max_steps": 4, "eval_every_steps": 0}

    def held():
        gc.collect()
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in gc.get_objects()
            if issubclass(type(x), torch.Tensor)
        }
        return sum(storages.values())

    class Weigh(bit.Callback):
        def on_step(self, state, metrics):
            if state.step == 4:
                sizes.append(held() - before)

    sizes, before = [], held()
    run(tmp_path / "whole", callbacks=[Weigh()], **options)
    run(tmp_path / "parts", callbacks=[StopAt(2)], **options)
    run(tmp_path / "parts", callbacks=[Weigh()], **options)
    assert sizes[1] <= sizes[0] * 1.02


def test_a_full_disk_is_said_and_training_goes_on(run, tmp_path, capsys):
    with inject(tmp_path / "run", Fault("ENOSPC", "write", at=1, times=3)):
        state = run(tmp_path / "run")
    said = capsys.readouterr().err
    assert "could not be saved: [Errno 28] No space left on device" in said
    assert "Training goes on" in said
    assert state.last_saved_step == 12


def test_metrics_that_could_not_be_written_are_written_later(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    log = bit.MetricsLog(path, 0)
    log.write({"step": 1})
    path.unlink()
    with inject(tmp_path, Fault("ENOSPC", "replace", times=2)):
        log.write({"step": 2})
        log.write({"step": 3})
    assert capsys.readouterr().err.count("cannot be written") == 1
    log.write({"step": 4})
    assert [line["step"] for line in bit.MetricsLog.read(path)] == [1, 2, 3, 4]


def test_metrics_of_strangers_do_no_harm(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": "x"}\n[1]\n{"step": 2, "loss": 1}\n' + "[" * 99_999 + "\n{")
    assert bit.MetricsLog.read(path) == [{"step": 2, "loss": 1}]


def test_what_does_not_fit_is_refused_before_memory_is_taken(tmp_path):
    model = bit.ModelConfig(hidden_size=65_536, num_hidden_layers=1024, num_attention_heads=512)
    train = bit.TrainConfig()
    with pytest.raises(ValueError, match="GiB for weights"):
        bit.train(model, bit.DataConfig(), train, tmp_path / "run")
    assert not (tmp_path / "run").exists()
