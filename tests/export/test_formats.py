"""What holds for every format: the registry, the command line, and that files appear whole."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import bitllm_core as bit
from bitllm.export import (
    EXPORT_FORMATS,
    add_export_flags,
    export_gguf,
    export_hf,
    export_limits,
    export_packed,
    llama_cpp_stream,
    read_exported,
    run_export,
)
from bitllm.export.common import (
    FORMATS,
    Flag,
    Source,
    export_format,
    open_source,
    replacing,
    result_of,
)
from tests import warm
from tests.conftest import ROOT
from tests.export.helpers import train_tiny

# A sixth format


@pytest.fixture
def lines_format():
    """All that a new format needs, in a folder of text files."""

    def read(path):
        if not (path / "lines.txt").is_file():
            return None
        model, tokenizer, facts = read_exported((path / "lines.txt").read_text("utf-8"))
        return Source(model, tokenizer, facts)

    def is_export(folder):
        return (folder / "lines.txt").is_file()

    flag = Flag("--line-ending", "lf or crlf", ("lf", "crlf"))

    @export_format("lines", flags={"ending": flag}, read=read, is_export=is_export)
    def export_lines(source, out, *, checkpoint="last", ending="lf", overwrite=False, **credits):
        with replacing(Path(out), overwrite, folder=True) as beside:
            model = open_source(source, checkpoint, credits).model
            (beside / "lines.txt").write_text(str(source), encoding="utf-8")
            (beside / ending).touch()
        return result_of(Path(out), 1, model, "read it")

    yield export_lines
    del FORMATS["lines"]


def command_line(*arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    add_export_flags(parser)
    return run_export(parser.parse_args([str(x) for x in arguments]), "last")


def test_a_new_format_is_one_function(lines_format, tiny_run, tmp_path, capsys):
    packed, out = export_packed(tiny_run, tmp_path / "m.safetensors"), tmp_path / "out"
    asked = ("--model", packed.path, "--to", "lines", "--out", out)
    assert command_line(*asked, "--line-ending", "crlf", "--author", "me") == 0
    assert "bits per ternary weight\nread it" in capsys.readouterr().out
    assert (out / "crlf").exists()
    assert read_exported(out)[2]["data"] == "text.txt"
    assert export_hf(out, out, overwrite=True).size > 0  # reads one, and replaces it
    with pytest.raises(ValueError, match="to='hf': expected lines, the format that --line-ending"):
        command_line("--model", out, "--to", "hf", "--out", out, "--line-ending", "lf")


def test_a_new_format_is_one_line_in_the_package():
    """The names that `bitllm.export` gives come from the files of the formats, one line each."""
    folder = ROOT / "bitllm" / "export"
    lines = (folder / "__init__.py").read_text("utf-8").splitlines()
    for name, form in FORMATS.items():
        module, function = form.export.__module__, form.export.__name__
        assert f"from {module} import {function} as {function}" in lines
        others = [p for p in folder.glob("*.py") if f"export_{name}(" in p.read_text("utf-8")]
        defined = [p for p in others if f"def export_{name}(" in p.read_text("utf-8")]
        assert [p.stem for p in defined] == [module.rpartition(".")[2]]
    assert set(EXPORT_FORMATS) == {"hf", "gguf", "packed", "html"}


# The command line


def test_every_format_is_exported_and_read_by_the_command_line(
    tiny_run, tiny_corpus, tmp_path, capsys
):
    losses = []
    for to, out, flags in [
        ("packed", "m.safetensors", ["--embedding", "int8"]),
        ("hf", "hf", ["--dense", "--author", "me"]),
        ("hf", "hf", ["--overwrite"]),
    ]:
        arguments = ["--model", tiny_run, "--to", to, "--out", tmp_path / out]
        assert command_line(*arguments, *flags) == 0
        text = capsys.readouterr().out
        assert "bits per ternary weight" in text
        assert "bitllm generate --model" in text
        assert "python bitllm_core.py generate" in text
        losses.append(bit.evaluate(*bit.load_model(tmp_path / out), tiny_corpus)["loss"])
    assert max(losses) - min(losses) < 0.01
    arguments = ["--model", tiny_run, "--to", "hf", "--out", tmp_path / "x"]
    with pytest.raises(ValueError, match="to='hf': expected gguf"):
        command_line(*arguments, "--gguf-type", "F16")


def test_sizes(exports):
    largest = {"packed": 1.65, "int8": 1.65, "hf": 2.01, "TQ2_0": 2.07, "TQ1_0": 1.7, "Q2_0": 2.26}
    for name, bits in largest.items():
        assert exports[name].bits_per_weight <= bits, name
        assert os.fspath(exports[name]) == str(exports[name].path)
    assert exports["int8"].size < exports["packed"].size < exports["hf"].size


def test_a_checkpoint_can_be_chosen(run, tmp_path):
    ids = torch.arange(9)[None]
    for checkpoint in (75, "best", "last"):
        out = tmp_path / f"{checkpoint}.safetensors"
        made = export_packed(run, out, checkpoint=checkpoint, embedding="float32")
        net, _ = bit.load_model(run, checkpoint)
        assert torch.equal(bit.load_model(made)[0](ids), net(ids))


def test_a_single_checkpoint_knows_the_run_around_it(run, tmp_path):
    newest = bit.list_checkpoints(run / "checkpoints")[-1]
    made = export_packed(newest, tmp_path / "m.safetensors")
    whole = export_packed(run, tmp_path / "run.safetensors")
    alone, around = read_exported(made)[2], read_exported(whole)[2]
    assert alone.pop("name") == newest.stem
    assert around.pop("name") == run.name
    assert alone == around
    assert alone["val_loss"] > 0


# What cannot be exported


@pytest.mark.parametrize(
    ("changes", "packed", "hf", "gguf"),
    [
        ({}, True, True, "multiple of 256"),
        ({"linear": "dense"}, "no ternary form", "counterpart", "counterpart"),
        ({"linear": "weight_only"}, True, "counterpart", "counterpart"),
        ({"tie_word_embeddings": False}, True, "counterpart", "counterpart"),
        ({"intermediate_size": 98}, True, "multiples of 4", "multiple of 256"),
        (
            {"tokenizer": "wordpiece", "hidden_size": 256, "intermediate_size": 256},
            True,
            True,
            "WordPiece",
        ),
    ],
    ids=str,
)
def test_what_a_format_cannot_hold_is_explained(tmp_path, tiny_corpus, changes, packed, hf, gguf):
    source = train_tiny(tmp_path / "run", tiny_corpus, **changes)
    exports = [
        (export_packed, "m.safetensors", packed),
        (export_hf, "hf", hf),
        (export_gguf, "m.gguf", gguf),
    ]
    for export, name, wanted in exports:
        if wanted is True:
            assert export(source, tmp_path / name).size > 0
        else:
            with pytest.raises(ValueError, match=wanted):
                export(source, tmp_path / name)
            assert not (tmp_path / name).exists()


def test_options_are_checked_before_any_work(tiny_run, tmp_path):
    with pytest.raises(ValueError, match=r"kind='Q4_0': expected one of TQ2_0, TQ1_0, Q2_0, F16"):
        export_gguf(tiny_run, tmp_path / "m.gguf", kind="Q4_0")
    with pytest.raises(ValueError, match="embedding='float64'"):
        export_packed(tiny_run, tmp_path / "m.safetensors", embedding="float64")
    with pytest.raises(ValueError, match=r"ends in \.gguf"):
        export_gguf(tiny_run, tmp_path / "m.bin")
    with pytest.raises(ValueError, match="credits='autor'"):
        export_hf(tiny_run, tmp_path / "hf", autor="me")
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        export_hf(tmp_path / "nowhere", tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tiny_run, tmp_path, monkeypatch):
    for package in ("gguf", "xllamacpp"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install gguf"):
        export_gguf(tiny_run, tmp_path / "m.gguf")
    with pytest.raises(ImportError, match="pip install xllamacpp"):
        next(llama_cpp_stream(tmp_path / "m.gguf", "x"))
    assert not list(tmp_path.iterdir())


# Whole or not at all


@pytest.mark.parametrize("to", ["hf", "gguf", "packed"])
def test_an_interrupted_export_leaves_nothing_and_harms_nothing(
    tiny_run, tmp_path, monkeypatch, to
):
    name = {"hf": "out", "gguf": "out.gguf", "packed": "out.safetensors"}[to]
    options = {"kind": "F16"} if to == "gguf" else {}
    export = FORMATS[to].export

    def contents():
        return {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail(*_):
        raise OSError(28, "full")

    for before in (False, True):
        if before:
            export(tiny_run, tmp_path / name, **options)
        kept = contents()
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match="full"):
                export(tiny_run, tmp_path / name, overwrite=True, **options)
        assert contents() == kept
    with pytest.raises(ValueError, match="exists already"):
        export(tiny_run, tmp_path / name, **options)
    export(tiny_run, tmp_path / name, overwrite=True, name="another", **options)
    assert contents().keys() == kept.keys()
    assert contents() != kept


@pytest.mark.skipif(os.name == "nt", reason="Windows does not replace a file that is open")
def test_a_program_that_reads_the_old_file_reads_it_to_the_end(tiny_run, tmp_path):
    path = export_packed(tiny_run, tmp_path / "m.safetensors").path
    before = path.read_bytes()
    with path.open("rb") as old:
        export_packed(tiny_run, path, embedding="int8", overwrite=True)
        assert old.read() == before != path.read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX's")
def test_others_may_read_what_is_written(tiny_run, tmp_path):
    """safetensors' save_file makes files for their owner only, which no web server may serve."""
    (tmp_path / "plain").touch()
    export_packed(tiny_run, tmp_path / "m.safetensors")
    export_hf(tiny_run, tmp_path / "hf")
    export_gguf(tiny_run, tmp_path / "m.gguf", kind="F16")
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_a_killed_export_is_cleared_away_by_the_next(tiny_run, tmp_path):
    code = (
        "import os, sys; from bitllm.export import export_hf\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "export_hf(sys.argv[1], sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tiny_run), str(tmp_path / "out")]
    assert warm.run(command, cwd=ROOT).returncode == -9
    assert not (tmp_path / "out").exists()
    assert any(tmp_path.iterdir())
    export_hf(tiny_run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_an_export_is_overwritten(tiny_run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    for out in (mine, tiny_run):
        with pytest.raises(ValueError, match="not an exported folder"):
            export_hf(tiny_run, out, overwrite=True)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ValueError, match="not a file"):
        export_gguf(tiny_run, tmp_path / "folder.gguf", kind="F16", overwrite=True)
    assert (mine / "letter.txt").read_text() == "dear"
    assert json.loads((tiny_run / "config.json").read_text("utf-8"))


def test_presets_for_clients_have_no_export_limits():
    for name in ("demo", "laptop", "t4-1h", "t4-3h"):
        assert export_limits(bit.PRESETS[name][0]) == []
    assert export_limits(bit.PRESETS["seed"][0])
