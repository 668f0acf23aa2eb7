import json

import pytest
import torch

import bitllm_core as bit
from tests.conftest import Payload

CONTENTS = {"step": 3, "model": {"a": torch.arange(5.0)}, "note": "plain"}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = bit.save_checkpoint(tmp_path, CONTENTS)
    loaded = bit.load_checkpoint(path)
    assert torch.equal(loaded["model"]["a"], CONTENTS["model"]["a"])
    assert loaded["step"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003.json", "step_00000003.pt"]


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-9])
    elif how == "flipped":
        path.write_bytes(data[:40] + bytes([data[40] ^ 4]) + data[41:])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no manifest":
        path.with_suffix(".json").unlink()
    elif how == "torn manifest":
        path.with_suffix(".json").write_text('{"size":')


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "no manifest", "torn manifest"])
def test_a_damaged_newest_is_passed_over_with_a_line(tmp_path, capsys, how):
    bit.save_checkpoint(tmp_path, {**CONTENTS, "step": 3})
    newest = bit.save_checkpoint(tmp_path, {**CONTENTS, "step": 6})
    damage(newest, how)
    assert bit.newest_checkpoint(tmp_path)["step"] == 3
    assert "passed over" in capsys.readouterr().err
    with pytest.raises(ValueError, match=newest.name):
        bit.load_checkpoint(newest)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    proof = tmp_path / "executed"
    path = bit.save_checkpoint(tmp_path, {"step": 1, "model": Payload(proof)})
    with pytest.raises(ValueError, match="not a checkpoint"):
        bit.load_checkpoint(path)
    assert not proof.exists()


def test_another_format_is_refused(tmp_path):
    path = bit.save_checkpoint(tmp_path, {"step": 1, "format_version": 99})
    with pytest.raises(ValueError, match="format 99"):
        bit.load_checkpoint(path)


def test_a_failing_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old = bit.save_checkpoint(tmp_path, CONTENTS)
    monkeypatch.setattr(bit.os, "fsync", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        bit.save_checkpoint(tmp_path, {**CONTENTS, "step": 4})
    assert bit.newest_checkpoint(tmp_path)["step"] == 3
    assert old.is_file()


def test_pruning_keeps_the_newest(tmp_path):
    for step in (1, 2, 10, 11):
        bit.save_checkpoint(tmp_path, {**CONTENTS, "step": step})
    bit.save_checkpoint(tmp_path, {**CONTENTS, "step": 2}, "epoch")
    bit.prune_checkpoints(tmp_path, 2)
    names = {p.stem for p in tmp_path.iterdir()}
    assert names == {"step_00000010", "step_00000011", "epoch_00000002"}


def test_load_model_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        bit.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not a run's configuration"):
        bit.load_model(tmp_path)
    config = {"model": {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        bit.load_model(tmp_path)
