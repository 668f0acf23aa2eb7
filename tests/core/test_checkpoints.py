"""Checkpoints are whole or not there, only data, and written by one process at a time."""

import json
import pickle
import shutil
import struct
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch

import bitllm_core as bit
from tests.conftest import ROOT, Payload
from tests.faults import Fault, inject

CONTENTS = {
    "step": 3,
    "model": {"a": torch.arange(5.0), "b.weight": torch.ones(2, 3, dtype=torch.bfloat16)},
    "optimizers": [{"state": {"a": {"step": torch.tensor(3.0)}}}],
    "trits": {"t": torch.tensor([[-1, 0], [1, 1]], dtype=torch.int8)},
    "note": "plain",
    "best": float("inf"),
    "empty": {},
}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = bit.save_checkpoint(tmp_path, CONTENTS)
    loaded = bit.load_checkpoint(path)
    assert loaded["step"] == 3
    assert loaded["best"] == float("inf")
    assert loaded["empty"] == {}
    for name, tensor in CONTENTS["model"].items():
        assert torch.equal(loaded["model"][name], tensor)
        assert loaded["model"][name].dtype == tensor.dtype
    assert torch.equal(loaded["trits"]["t"], CONTENTS["trits"]["t"])
    assert loaded["optimizers"][0]["state"]["a"]["step"].shape == ()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step_00000003.json", "step_00000003.safetensors"]


def test_the_file_is_one_that_the_safetensors_library_writes_too(tmp_path):
    from safetensors.torch import load_file, save_file

    path = bit.save_checkpoint(tmp_path, CONTENTS)
    tensors = load_file(path)
    assert torch.equal(tensors["0"], CONTENTS["model"]["a"])
    save_file(tensors, tmp_path / "theirs")
    ours, theirs = (json.loads(header_of(p)) for p in (path, tmp_path / "theirs"))
    assert all(ours[name]["shape"] == theirs[name]["shape"] for name in tensors)


def header_of(path):
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-9])
    elif how == "flipped":
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 4]) + data[-2:])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no manifest":
        path.with_suffix(".json").unlink()
    elif how == "torn manifest":
        path.with_suffix(".json").write_text('{"size":')
    elif how == "another's manifest":
        shutil.copy(path.with_name("step_00000003.json"), path.with_suffix(".json"))


HOW = ["truncated", "flipped", "empty", "no manifest", "torn manifest", "another's manifest"]


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_newest_is_passed_over_with_a_line(tmp_path, capsys, how):
    folder = tmp_path / "checkpoints"
    bit.save_checkpoint(folder, {**CONTENTS, "step": 3})
    newest = bit.save_checkpoint(folder, {**CONTENTS, "step": 6})
    damage(newest, how)
    assert bit.newest_checkpoint(folder)["step"] == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "skipped" in said[0]
    with pytest.raises((ValueError, OSError), match=newest.name):
        bit.load_checkpoint(newest)


def test_foreign_files_and_duplicates_are_passed_over_with_a_line_each(tmp_path, capsys):
    path = bit.save_checkpoint(tmp_path, CONTENTS)
    shutil.copy(path, tmp_path / "step_00000009 (1).safetensors")
    (tmp_path / "holiday.jpg").touch()
    (tmp_path / "step_00000004.safetensors.part").write_bytes(b"half")
    assert bit.newest_checkpoint(tmp_path)["step"] == 3
    said = capsys.readouterr().err
    assert said.count("skipped") == 2
    assert "(1)" in said
    assert "holiday.jpg" in said


def hostile_files(folder):
    """Files as somebody else might make them, each with a manifest that agrees with it."""
    proof = folder / "executed"
    yield "a pickle", pickle.dumps(Payload(proof))
    archive = folder / "archive.pt"
    torch.save({"step": 1, "model": Payload(proof)}, archive)
    yield "torch.save of a payload", archive.read_bytes()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(50_000_000))
    yield "a zip bomb", archive.read_bytes()
    archive.unlink()
    huge = {"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]}}
    beyond = {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}
    deep = '{"__metadata__":{"contents":"' + "[" * 100_000 + '"}}'
    good = json.dumps({"format_version": bit.FORMAT_VERSION, "step": 1, "model": {"tensor": "no"}})
    texts = {
        "a shape beyond its bytes": json.dumps(huge),
        "bytes beyond the file": json.dumps(beyond),
        "deep nesting": deep,
        "no contents": "{}",
        "a tensor that is not there": json.dumps({"__metadata__": {"contents": good}}),
        "a list": json.dumps({"__metadata__": {"contents": "[]"}}),
        "not JSON": "{",
    }
    for name, text in texts.items():
        yield name, struct.pack("<Q", len(text)) + text.encode() + bytes(4)
    yield "an absurd header size", struct.pack("<Q", 2**60) + b"{}"


def test_hostile_checkpoints_are_only_data(tmp_path):
    for name, data in hostile_files(tmp_path):
        path = tmp_path / "step_00000001.safetensors"
        path.write_bytes(data)
        manifest = {
            "name": path.name,
            "format_version": bit.FORMAT_VERSION,
            "step": 1,
            "size": len(data),
            "sha256": bit.file_hash(path),
        }
        path.with_suffix(".json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=path.name):
            bit.load_checkpoint(path)
        assert not (tmp_path / "executed").exists(), name


def test_hostile_seed_checkpoints_are_only_data(tmp_path):
    for name, data in hostile_files(tmp_path):
        path = tmp_path / "mi_llm_checkpoint.pth"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"mi_llm_checkpoint\.pth"):
            bit.import_seed_checkpoint(path)
        assert not (tmp_path / "executed").exists(), name


def test_another_format_is_refused(tmp_path):
    path = bit.save_checkpoint(tmp_path, CONTENTS)
    manifest = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(ValueError, match="format 99"):
        bit.load_checkpoint(path)


@pytest.mark.parametrize("operation", ["write", "read", "rename"])
def test_a_failing_disk_leaves_the_old_checkpoint_and_no_half_file(tmp_path, operation):
    bit.save_checkpoint(tmp_path, CONTENTS)
    with inject(tmp_path, Fault("ENOSPC", operation)), pytest.raises(OSError, match="No space"):
        bit.save_checkpoint(tmp_path, {**CONTENTS, "step": 4})
    assert bit.newest_checkpoint(tmp_path)["step"] == 3
    bit.remove_unfinished(bit.Folder(tmp_path))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step_00000003.json", "step_00000003.safetensors"]


def test_pruning_keeps_the_newest_finished_ones(tmp_path):
    for step in (1, 2, 10, 11):
        bit.save_checkpoint(tmp_path, {**CONTENTS, "step": step})
    bit.save_checkpoint(tmp_path, {**CONTENTS, "step": 2}, "epoch")
    damage(tmp_path / "step_00000011.safetensors", "no manifest")
    bit.prune_checkpoints(bit.Folder(tmp_path), 2, spare="step_00000001.safetensors")
    left = {p.stem for p in tmp_path.glob("*.safetensors")}
    assert left == {f"step_{n:08d}" for n in (1, 2, 10, 11)} | {"epoch_00000002"}
    bit.save_checkpoint(tmp_path, {**CONTENTS, "step": 12})
    bit.prune_checkpoints(bit.Folder(tmp_path), 2)
    left = {p.stem for p in tmp_path.iterdir()}
    assert left == {f"step_{n:08d}" for n in (10, 11, 12)} | {"epoch_00000002"}


def test_nothing_is_written_through_links_out_of_the_folder(tmp_path):
    (tmp_path / "mine").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json.tmp", "a"):
        (run / name).symlink_to(tmp_path / "mine")
    bit.write_atomically(run / "config.json", b"{}")
    bit.Folder(run).write("a", lambda path: path.write_bytes(b"data"))
    assert (tmp_path / "mine").read_text() == "precious"


# load_model


def test_load_model_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        bit.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        bit.load_model(tmp_path)


def small_run(folder, tokenizer, shape, **changes):
    model = bit.BitLM(shape)
    contents = {
        "step": 1,
        "model": model.state_dict(),
        "config": {"model": bit.asdict(shape)},
        "tokenizer": tokenizer.to_str(),
        **changes,
    }
    bit.save_checkpoint(folder / "checkpoints", contents)
    return model


def test_a_checkpoint_alone_is_a_model(tmp_path, tokenizer, tiny_config):
    small_run(tmp_path, tokenizer, tiny_config)
    path = tmp_path / "checkpoints" / "step_00000001.safetensors"
    for place in (tmp_path, path):
        model, loaded = bit.load_model(place)
        assert bit.tokenizer_hash(loaded) == bit.tokenizer_hash(tokenizer)
        assert bit.generate(model, loaded, "1 cats", bit.SamplingConfig(seed=0))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hidden_size": 10**12}, "at most 65,536"),
        ({"num_hidden_layers": 10**9}, "at most 1,024"),
        ({"num_hidden_layers": 1000}, "Missing key"),
        ({"max_position_embeddings": 10**12}, "at most 1,048,576"),
        ({"vocab_size": 512}, "size mismatch"),
        ({"hidden_size": "32"}, "expected int"),
        ({"hidden_size": True}, "expected int"),
        ({"rope_theta": [1]}, "expected float"),
        ({"__class__": "os.system"}, "no field of ModelConfig"),
    ],
)
def test_absurd_configurations_are_refused(tmp_path, tokenizer, tiny_config, config, says):
    changes = {"config": {"model": {**bit.asdict(tiny_config), **config}}}
    small_run(tmp_path, tokenizer, tiny_config, **changes)
    with pytest.raises(ValueError, match=says) as found:
        bit.load_model(tmp_path)
    assert str(tmp_path) in str(found.value)


def test_token_ids_without_a_row_are_refused(tmp_path, tiny_config):
    big = bit.train_tokenizer(["more than three hundred tokens are learned from this"] * 9, 400)
    big.add_tokens([f"extra{i}" for i in range(100)])
    small_run(tmp_path, big, tiny_config)
    with pytest.raises(ValueError, match="vocab_size=300"):
        bit.load_model(tmp_path)


def test_shapes_are_checked_before_memory_is_taken(tmp_path, tokenizer, tiny_config):
    weights = bit.BitLM(tiny_config).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].T.contiguous()
    small_run(tmp_path, tokenizer, tiny_config, model=weights)
    with pytest.raises(ValueError, match=name):
        bit.load_model(tmp_path)


def test_a_checkpoint_that_could_not_be_read_again_is_refused(tmp_path):
    """A header of over 100 MB was written, and the older checkpoints deleted."""
    bit.save_checkpoint(tmp_path, {"step": 1, "model": {}})
    lines = [{"zeros": [0.333333] * 48}] * 120_000
    with pytest.raises(ValueError, match="less than 50 MB beside tensors"):
        bit.save_checkpoint(tmp_path, {"step": 2, "metrics": lines})
    assert [path.name for path in bit.list_checkpoints(tmp_path)] == ["step_00000001.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux shows them")
def test_a_checkpoint_in_a_thread_of_its_own_starts_no_others(tmp_path):
    """Torch's would be too many for the processor, and training's no longer wait for each other."""
    script = """
        import os, sys, threading, torch
        import bitllm_core as bit

        torch.set_num_threads(4)
        tensors, counts = {"a": torch.rand(1 << 20)}, []

        def save():
            counts.append(len(os.listdir("/proc/self/task")))
            bit.write_snapshot(folder, "step_00000001.safetensors", *parts)
            counts.append(len(os.listdir("/proc/self/task")))
            torch.equal(tensors["a"], tensors["a"].clone())
            counts.append(len(os.listdir("/proc/self/task")))

        folder = bit.Folder(bit.Path(sys.argv[1]))
        parts = bit.snapshot({"step": 1, "model": tensors})  # by the first thread and its own
        worker = threading.Thread(target=save)
        worker.start()
        worker.join()
        print(*counts)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    before, after, with_torch = map(int, done.stdout.split())
    assert after == before
    assert with_torch == before + 3  # so that is how such threads would show
