import json
import shutil
import subprocess
import sys

import pytest

import bitllm_core as bit
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert bit.main(["train", "--preset", "ci", "--max-steps", "10", "--out", str(out)]) == 0
    return out


def test_train_writes_text_and_perplexity_and_then_says_it_is_complete(run_cli, tmp_path):
    command = ["train", "--preset", "ci", "--out", tmp_path / "run"]
    first = run_cli(*command)
    assert first.returncode == 0, first.stderr
    second = run_cli(*command)
    assert second.returncode == 0
    assert "complete: 40 steps" in first.stdout
    assert "validation loss" in first.stdout
    assert "--checkpoint last" in first.stdout
    assert first.stdout == second.stdout


def test_without_a_preset_the_settings_of_the_run_are_meant(run_cli, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    command = ["train", "--out", tmp_path / "run"]
    assert "complete: 10 steps" in run_cli(*command).stdout
    for damaged in ("", "{"):  # then they come from the checkpoint
        (tmp_path / "run" / "config.json").write_text(damaged)
        assert "complete: 10 steps" in run_cli(*command).stdout
    (tmp_path / "run" / "config.json").write_text('{"model": {"hidden_size": "wide"}}')
    result = run_cli(*command)
    assert result.returncode == 2
    assert "config.json: hidden_size='wide': expected int" in result.stderr


def test_a_run_that_ended_early_shows_its_best_model(run_cli, tmp_path):
    settings = {"patience": 1, "eval-every-steps": 1, "learning-rate": 1e-9}
    settings |= {"adamw-learning-rate": 1e-9, "eval-tokens": 64}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = ["train", "--preset", "ci", *flags, "--out", tmp_path / "run"]
    first = run_cli(*command)
    assert first.returncode == 0, first.stderr
    assert "from --checkpoint best" in first.stdout
    assert "complete: 40 steps" not in first.stdout
    assert run_cli(*command).stdout == first.stdout


def test_generate_repeats_itself_with_a_seed(run_cli, trained):
    command = ["generate", "--model", trained, "--prompt", "The ", "--max-new-tokens", 20]
    texts = [run_cli(*command, "--seed", seed).stdout for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("The ")
    assert texts[0].endswith("\n")
    numbered = run_cli(*command, "--seed", 0, "--checkpoint", 10)
    assert numbered.stdout == texts[0]


def test_evaluate_prints_one_json_object(run_cli, trained, tiny_corpus):
    result = run_cli("evaluate", "--model", trained, "--data", tiny_corpus)
    found = json.loads(result.stdout)
    keys = ["loss", "perplexity", "bits_per_byte", "word_perplexity", "tokens", "words", "bytes"]
    assert list(found) == keys
    assert found["bytes"] == tiny_corpus.stat().st_size
    slid = run_cli("evaluate", "--model", trained, "--data", tiny_corpus, "--stride", 16)
    assert json.loads(slid.stdout)["loss"] != found["loss"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "required: --out"),
        (["train", "--out", "x", "--fsdp", "perhaps"], "invalid true_or_false value: 'perhaps'"),
        (["evaluate", "--model", "x", "--data", "y", "--dtype", "int4"], "dtype='int4'"),
        (["train", "--preset", "huge", "--out", "x"], "invalid choice: 'huge'"),
        (["train", "--out", "x", "--no-such-flag", "1"], "unrecognized arguments"),
        (["train", "--out", "x", "--max-steps", "many"], "invalid int value: 'many'"),
        (["train", "--out", "x", "--num-attention-heads", "7"], "divisor of hidden_size=256"),
        (["train", "--out", "x", "--data", "nowhere.txt"], "no such file or folder"),
        (["train", "--out", "x", "--resume", "perhaps"], "auto, never or must"),
        (["generate", "--model", "nowhere"], "not a run folder"),
        (["generate", "--model", "nowhere", "--top-p", "2"], "top_p=2.0"),
        ([], "required: COMMAND"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(run_cli, tmp_path, arguments, says):
    result = run_cli(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


def test_every_field_is_a_flag_with_its_meaning(run_cli):
    text = run_cli("train", "--help").stdout
    for config in (bit.ModelConfig, bit.DataConfig, bit.TrainConfig):
        for name in config.__dataclass_fields__:
            assert f"--{name.replace('_', '-')} " in text
    assert "optimizer steps between checkpoints" in " ".join(text.split())


def test_a_seed_checkpoint_generates(run_cli, seed_script, tiny_corpus, tmp_path):
    import torch

    tokenizer = bit.train_tokenizer([tiny_corpus.read_text("utf-8")], 300, kind="wordpiece")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = seed_script.MiLLM(300, 64, 8, 128, 2, 32)
    path = tmp_path / "mi_llm_checkpoint.pth"
    torch.save({"epoch": 0, "batch": 0, "model_state_dict": model.state_dict()}, path)
    result = run_cli("generate", "--model", path, "--prompt", "cats sat", "--seed", 0)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > len("cats sat") + 10
    result = run_cli("evaluate", "--model", path, "--data", tiny_corpus)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():  # the script's model, window by window, token 0 before the text
        ids = torch.tensor(tokenizer.encode(tiny_corpus.read_text("utf-8")).ids)
        inputs = torch.cat([torch.zeros(1, dtype=torch.int64), ids[:-1]])
        whole = len(ids) // 32 * 32
        logits = model(inputs[:whole].view(-1, 32)).flatten(0, 1)
        rest = model(inputs[None, whole:])[0]
        loss = torch.nn.functional.cross_entropy(torch.cat([logits, rest]), ids)
    assert json.loads(result.stdout)["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_process_that_failed_among_others_ends_with_its_own_status():
    # once, a busy machine's process told its error and was then aborted (-6) by gloo's threads
    program = """
import atexit, runpy, sys
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
atexit.register(print, "an ordinary end")
sys.argv = ["bitllm_core.py", "generate", "--model", "nowhere"]
runpy.run_path("bitllm_core.py", run_name="__main__")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "nowhere" in done.stderr
    assert not done.stdout
