"""Starting from weights of the hub, of the seed guide's script, and with the preset t4-chat."""

import dataclasses
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import bitllm_core as bit
from bitllm import conversations as talk
from bitllm.cli import main
from bitllm.planner import plan
from tests import tiny
from tests.hub import Hub
from tests.test_start import ANIMALS, first_loss, make_base


@pytest.fixture(scope="module")
def base(tiny_corpus, tmp_path_factory):
    return make_base(tiny_corpus, tmp_path_factory.mktemp("base"))


# The hub


HUB_SCRIPT = """
import sys
from bitllm.cli import main
sys.exit(main(sys.argv[1:]))
"""


def with_hub(folder, home, *arguments):
    """The command line in a process of its own, whose hub serves `folder` as me/stories."""
    with Hub(folder).running() as hub:
        return hub.python(home, HUB_SCRIPT, *arguments), hub.requests


QUICK = ["--batch-tokens", 128, "--max-steps", 2, "--compile", "off", "--dtype", "float32"]


def test_a_packed_file_of_the_hub_is_a_source(base, tiny_corpus, tmp_path):
    """A transformers folder is one too: tests/export/test_hub.py."""
    folder, state = base
    served = tmp_path / "hub"
    served.mkdir()
    shutil.copy(folder / "exact.safetensors", served)
    (served / "other.gguf").write_text("not asked for")
    flags = ["--init-from", "hf:me/stories", "--data", tiny_corpus, "--eval-tokens", 100_000]
    done, requests = with_hub(
        served, tmp_path / "home", "train", "--out", tmp_path / "run", *QUICK, *flags
    )
    assert done.returncode == 0, done.stderr
    assert first_loss(tmp_path / "run") == state.val_loss
    assert bit.read_json(tmp_path / "run" / "config.json")["start"]["name"] == "me/stories"
    assert not [request for request in requests if "gguf" in request]


def test_a_seed_scripts_checkpoint_is_a_source(seed_script, tiny_corpus, tmp_path):
    tokenizer = bit.train_tokenizer([tiny_corpus.read_text("utf-8")], 300, kind="wordpiece")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "mi_llm_checkpoint.pth"
    model = seed_script.MiLLM(300, 64, 8, 128, 2, 32)
    torch.save({"epoch": 0, "batch": 0, "model_state_dict": model.state_dict()}, path)
    flags = ["--init-from", str(path), "--data", str(tiny_corpus), "--eval-tokens", "100000"]
    flags += [str(flag) for flag in QUICK]
    assert main(["train", "--out", str(tmp_path / "run"), *flags]) == 0
    known = bit.load_checkpoint(tmp_path / "run", 0)["model"]
    assert torch.equal(known["lm_head.weight"], model.state_dict()["output_layer.weight"])
    assert bit.load_tokenizer(tmp_path / "run" / "tokenizer.json").encode("cats sat").ids


# The preset


def test_the_preset_that_tunes_says_what_to_train_first(tmp_path, run_cli):
    done = run_cli("train", "--preset", "t4-chat", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "bitllm train --preset t4-1h --out runs/t4-1h" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_preset_takes_a_quarter_of_an_hour_of_a_t4():
    model, data, config = bit.PRESETS["t4-chat"]
    assert model == bit.PRESETS["t4-1h"][0]
    assert config.max_steps * config.batch_tokens <= data.max_train_tokens  # nothing twice
    assert planned_hours("t4-chat") == pytest.approx(0.25, abs=0.05)


def planned_hours(preset):
    model, _, config = bit.PRESETS[preset]
    config = dataclasses.replace(config, max_steps=100 * config.max_steps)  # for its one decimal
    line = next(line for line in plan(model, config, 1) if " x T4 " in line)
    return float(line.split()[-2].replace(",", "")) / 100


def test_the_presets_kind_of_data_arrives_while_it_tunes(base, tmp_path):
    """Rows with messages beside other columns of text, as a stream from the hub."""
    folder, _ = base
    rows = [
        [{"role": "user", "content": f"{a} {i}?"}, {"role": "assistant", "content": s}]
        for i in range(400)
        for a, s in ANIMALS.items()
    ]
    (tmp_path / "hub").mkdir()
    table = pyarrow.table({"messages": rows, "source": ["made up"] * len(rows)})
    pyarrow.parquet.write_table(table, tmp_path / "hub" / "train-00000-of-00001.parquet")
    _, column = bit.KNOWN_DATA["smol-smoltalk"].split("#")
    flags = ["--preset", "t4-chat", "--init-from", folder / "run", "--out", tmp_path / "run"]
    flags += ["--data", f"hf:me/stories#{column}", "--max-train-tokens", 4000, *QUICK]
    done, _ = with_hub(tmp_path / "hub", tmp_path / "home", "train", *flags)
    assert done.returncode == 0, done.stderr
    model, tokenizer = bit.load_model(tmp_path / "run")
    assert talk.can_chat(tokenizer)
    assert model.config == dataclasses.replace(tiny.MODEL, vocab_size=302)
    tokens = np.fromfile(tmp_path / "run" / "data" / "train.bin", dtype=np.int32)
    assert (tokens >= 0).any()
    assert (tokens < 0).any()
