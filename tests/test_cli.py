"""The commands that the package adds, and the three ways to give a command."""

import json
import os
import subprocess
import sys

import pytest

import bitllm
import bitllm_core as bit
from tests import warm
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert bit.main(["train", "--preset", "ci", "--max-steps", "10", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("to", ["packed", "hf"])
def test_evaluate_reads_exports_like_the_run(run_cli, trained, tiny_corpus, tmp_path, to):
    out = tmp_path / ("out.safetensors" if to == "packed" else "out")
    getattr(bitllm, f"export_{to}")(trained, out)
    device = bit.choose_device("cpu", "float32")
    losses = [
        bit.evaluate(*bit.load_model(path), tiny_corpus, device=device)["loss"]
        for path in (trained, out)
    ]
    # the embedding is rounded to float16
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_bench_prints_one_json_object(run_cli):
    found = json.loads(run_cli("bench", "--quick").stdout)
    assert found["train"].keys() >= {
        "ternary_tokens_per_s",
        "dense_tokens_per_s",
        "flop_utilization",
    }
    assert found["generate"]["tokens_per_s"] > 0
    assert {"memory", "machine"} <= found.keys()


def test_info_lists_the_presets(run_cli):
    text = run_cli("info").stdout
    assert all(name in text for name in bit.PRESETS)


def test_training_announces_which_programs_will_not_load_the_model(run_cli, tmp_path):
    done = run_cli("train", "--preset", "ci", "--max-steps", 1, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "note: not every client will load this model: llama.cpp" in done.stdout + done.stderr


def test_a_plan_needs_no_gpu(run_cli):
    done = run_cli("plan", "--preset", "t4-1h", "--gpus", 2)
    assert done.returncode == 0, done.stderr
    assert "2 x T4" in done.stdout
    assert run_cli("info", "--preset", "t4-1h", "--gpus", 2).stdout == done.stdout


def test_all_ways_to_give_a_command_are_the_same(run_cli, tmp_path):
    texts = {run_cli("plan", "--preset", "ci", cwd=tmp_path).stdout}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for start in (["-m", "bitllm"], ["-c", "from bitllm.cli import main; main()"]):
        command = [sys.executable, *start, "plan", "--preset", "ci"]
        options = {"capture_output": True, "text": True, "env": environment}
        texts.add(warm.run(command, check=True, cwd=tmp_path, **options).stdout)
    assert len(texts) == 1


def test_what_does_not_fit_is_refused_before_memory_is_taken(capsys, tmp_path):
    sizes = {"hidden-size": 65_536, "num-hidden-layers": 1024, "num-attention-heads": 512}
    flags = [str(x) for name, size in sizes.items() for x in (f"--{name}", size)]
    assert bit.main(["train", *flags, "--out", str(tmp_path / "run")]) == 2
    assert "GiB for weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_public_name_is_there_and_explained():
    for name in bitllm.__all__:
        assert getattr(bitllm, name).__doc__, name
    assert set(bit.__all__) <= set(bitllm.__all__) <= set(dir(bitllm))
    with pytest.raises(AttributeError, match="nothing"):
        _ = bitllm.nothing


def test_importing_the_package_brings_no_heavy_library():
    code = (
        "import sys, torch; before = set(sys.modules);"
        "import bitllm; new = set(sys.modules) - before;"
        "heavy = {'datasets', 'tokenizers', 'matplotlib', 'ipywidgets', 'tqdm', 'gguf'} & new;"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
