"""The copier to a second folder: never waited for, never the end of a training, and exact."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import threading
import time

import pytest
import torch

import bitllm_core as bit
from bitllm import mirror as mirroring
from tests import warm
from tests.conftest import ROOT, assert_same_bits, state_of, without_times
from tests.faults import Fault, inject
from tests.tiny import StopAt


@pytest.fixture
def run(tiny_config, tiny_train, tiny_corpus, monkeypatch):
    monkeypatch.setattr(mirroring, "RETRY_S", (0.01, 0.05))

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


def files_of(folder):
    paths = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return sorted(str(path) for path in paths if not path.name.startswith("."))


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


class Hanging(mirroring.Folder):
    """A file system that does not answer; `go` lets it."""

    go = threading.Event()

    def write(self, name, fill):
        if "mirror" in str(self.path):
            self.go.wait(60)
        super().write(name, fill)


def test_training_does_not_wait_for_a_mirror_that_hangs(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mirroring, "Folder", Hanging)
    monkeypatch.setattr(mirroring, "FINISH_S", 0.5)
    Hanging.go.clear()
    state = run(tmp_path / "run", tmp_path / "mirror")
    assert state.step == 12
    assert state.mirror.last_good_step is None
    assert "mirror: nothing copied yet" in capsys.readouterr().err
    Hanging.go.set()
    assert state.mirror.close(60)  # or its thread would copy under the next test's eyes


def test_a_copier_that_falls_behind_skips_to_the_newest(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mirroring, "Folder", Hanging)
    Hanging.go.clear()
    copied = []
    plain = mirroring.copy_checkpoint

    def seen(source, name, target, progress=None):
        if "mirror" in str(target.path):
            copied.append(name)
        plain(source, name, target, progress)

    class GoAtTheEnd(bit.Callback):
        def on_end(self, state):
            Hanging.go.set()

    monkeypatch.setattr(mirroring, "copy_checkpoint", seen)
    run(tmp_path / "run", tmp_path / "mirror", callbacks=[GoAtTheEnd()])
    steps = [name for name in copied if name.startswith("step")]
    assert steps[-1] == "step_00000012.safetensors"
    assert len(steps) <= 2  # the one it hung with, and the newest


def test_failures_are_counted_shown_and_retried(run, tmp_path, capsys):
    heard = []
    drive = Fault("ENOTCONN", "write", at=9, times=10**9)  # after what step 3 needs

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
    said = capsys.readouterr().err  # once when it begins and once when it ends
    assert said.count("mirror: failing since") == said.count("it works again") == 1


def test_what_a_session_could_not_bring_the_next_one_does(run, tmp_path):
    with inject(tmp_path / "mirror", Fault("ENOTCONN", "write", at=9, times=10**9)):
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
    with inject(tmp_path / "mirror", Fault(kind, "write", at=7, times=1)) as injection:
        state = run(tmp_path / "run", tmp_path / "mirror", max_steps=3)
    assert injection.struck == 1  # the data of the first checkpoint, after six smaller files
    assert state.mirror.errors == 0
    for path in bit.list_checkpoints(tmp_path / "mirror" / "checkpoints"):
        bit.load_checkpoint(path)


def test_what_is_removed_is_emptied_first_unless_it_is_someone_elses_too(tmp_path):
    """In Drive's trash a deleted file goes on using the quota, so it is made empty."""
    path, folder = tmp_path / "a", mirroring.Folder(tmp_path)
    path.write_bytes(b"300 MB")
    with path.open("rb") as trash:
        folder.remove("a")
        assert trash.read() == b""
    path.write_bytes(b"300 MB")
    os.link(path, tmp_path / "backup")
    folder.remove("a")
    assert (tmp_path / "backup").read_bytes() == b"300 MB"
    path.symlink_to(tmp_path / "backup")
    folder.remove("a")
    assert (tmp_path / "backup").read_bytes() == b"300 MB"


def test_links_are_not_copied(tmp_path):
    (tmp_path / "mine").write_text("private")
    folder = mirroring.Folder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "a").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="not a regular file"):
        mirroring.copy_file(folder, "a", mirroring.Folder(tmp_path / "copy"))
    assert not (tmp_path / "copy" / "a").exists()


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


def test_two_runs_do_not_share_a_mirror(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mirroring, "LEASE_RENEW_S", 0.05)
    (tmp_path / "mirror").mkdir()
    with held(tmp_path / "mirror"), pytest.raises(ValueError, match="being written by"):
        run(tmp_path / "run", tmp_path / "mirror")


def saved(folder, step):
    contents = {"step": step, "config": SETTINGS, "model": {"a": torch.ones(2)}, "tokenizer": ""}
    return bit.save_checkpoint(folder / "checkpoints", contents)


MODEL, DATA, TRAIN = bit.PRESETS["ci"]
SETTINGS = {"model": bit.asdict(MODEL), "data": bit.asdict(DATA), "train": bit.asdict(TRAIN)}


def test_the_newest_of_run_and_mirror_counts(tmp_path):
    local, folder = tmp_path / "local", tmp_path / "mirror"
    saved(local, 3)
    saved(folder, 6)
    torn = saved(folder, 9)
    torn.write_bytes(torn.read_bytes()[:-9])
    mirror = mirroring.Mirror(local, folder, 2)
    assert mirror.newest_checkpoint(SETTINGS)["step"] == 6
    assert bit.newest_checkpoint(local / "checkpoints")["step"] == 6  # it was fetched
    copy = local / "checkpoints" / "step_00000006.safetensors"
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    assert mirror.newest_checkpoint(SETTINGS)["step"] == 6  # and is again
    mirror.close()


# The lease


@contextlib.contextmanager
def held(folder, run=None):
    """A lease on a folder, as of a process with another run folder."""
    other = run or folder.parent / "another"
    other.mkdir(exist_ok=True)
    lease = mirroring.Lease(folder, other)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def elsewhere(folder, age):
    """A lease as another machine has written it, `age` seconds ago."""
    lease = {"host": "colab-1", "id": "x", "alive": time.time() - age}
    (folder / mirroring.LEASE_NAME).write_text(json.dumps(lease))


def test_a_lease_is_taken_over_when_it_has_run_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mirroring, "LEASE_STALE_S", 1.0)
    elsewhere(tmp_path, age=0.5)
    start = time.time()
    with held(tmp_path, tmp_path) as lease:
        assert 0.3 < time.time() - start < 5
        assert json.loads((tmp_path / mirroring.LEASE_NAME).read_text())["id"] == lease.id
    said = capsys.readouterr().err
    assert "a process on colab-1" in said
    assert "is taken over at" in said


def test_a_writer_that_shows_signs_of_life_keeps_its_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(mirroring, "LEASE_STALE_S", 2.0)
    elsewhere(tmp_path, age=0)
    timer = threading.Timer(0.5, elsewhere, [tmp_path, 0])
    timer.start()
    with pytest.raises(ValueError, match="colab-1"), held(tmp_path, tmp_path):
        pass
    timer.join()


def test_a_lease_holds_between_containers_of_one_host_name(tmp_path, monkeypatch):
    """Process numbers and start times tell nothing there; only the id and the signs of life do."""
    monkeypatch.setattr(mirroring, "LEASE_STALE_S", 1.0)
    monkeypatch.setattr(mirroring, "LEASE_RENEW_S", 0.05)
    with held(tmp_path), pytest.raises(ValueError, match="being written by"):
        mirroring.Lease(tmp_path, tmp_path).acquire()


def test_a_killed_run_takes_its_own_lease_over_at_once(tmp_path):
    code = "import sys; from pathlib import Path; from bitllm.mirror import Lease; import os;"
    code += "Lease(Path(sys.argv[1]), Path(sys.argv[1])).acquire(); os.kill(os.getpid(), 9)"
    warm.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert (tmp_path / mirroring.LEASE_NAME).is_file()
    start = time.time()
    with held(tmp_path, tmp_path):
        assert time.time() - start < 5


def test_a_lease_is_renewed_and_its_loss_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(mirroring, "LEASE_RENEW_S", 0.05)
    path = tmp_path / mirroring.LEASE_NAME
    with held(tmp_path) as lease:
        before = json.loads(path.read_text())["alive"]
        time.sleep(0.5)
        assert json.loads(path.read_text())["alive"] > before
        elsewhere(tmp_path, age=0)
        assert lease.lost()
        time.sleep(0.2)
    assert "colab-1" in path.read_text()  # it is not ours to delete


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 1}', '{"id": "a", "alive": null}'])
def test_a_torn_lease_is_nobodys(tmp_path, text):
    (tmp_path / mirroring.LEASE_NAME).write_text(text)
    with held(tmp_path):
        pass


def test_a_lease_is_not_written_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / mirroring.LEASE_NAME).symlink_to(tmp_path / "mine")
    with held(run):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


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
