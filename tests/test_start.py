"""Training that starts from weights: they are the source's exactly, and the run is then its own."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import bitllm_core as bit
from bitllm import conversations as talk
from bitllm import start
from bitllm.cli import main
from bitllm.export import export_gguf, export_hf, export_packed
from tests import tiny
from tests.conftest import assert_same_bits, state_of, weights_of, without_times
from tests.test_distributed import run_together, train_alone
from tests.tiny import StopAt

CPU = torch.device("cpu")
TRAIN = dataclasses.replace(tiny.TRAIN, max_steps=6, eval_tokens=100_000)
ANIMALS = {"duck": "quack", "cow": "moo", "dog": "woof", "cat": "meow"}


def train(out, init_from, data, model=tiny.MODEL, resume="auto", callbacks=(), **changes):
    config = dataclasses.replace(TRAIN, init_from=str(init_from), **changes)
    data = data if isinstance(data, bit.DataConfig) else bit.DataConfig(str(data))
    return bit.train(model, data, config, out, resume=resume, callbacks=callbacks)


def first_loss(out):
    line = bit.MetricsLog.read(Path(out) / "metrics.jsonl")[0]
    assert line["step"] == 0
    return line["val_loss"]


def digests(folder):
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    return {str(p): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).digest()) for p in files}


def make_base(tiny_corpus, folder):
    """A run on the tiny corpus, and its exports."""
    data = bit.DataConfig(str(tiny_corpus))
    state = bit.train(tiny.MODEL, data, tiny.TRAIN, folder / "run", callbacks=())
    export_packed(folder / "run", folder / "exact.safetensors", embedding="float32")
    export_packed(folder / "run", folder / "half.safetensors")
    export_hf(folder / "run", folder / "hf")
    export_hf(folder / "run", folder / "dense", dense=True)
    return folder, state


@pytest.fixture(scope="module")
def base(tiny_corpus, tmp_path_factory):
    return make_base(tiny_corpus, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "a.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": s}]}
        for a, s in ANIMALS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 60))
    return path


# Master weights of ternary ones


def exact(trits, scale):
    weight = start.masters_of("it", trits, scale, CPU)
    found, again = bit.weight_quant(weight)
    assert torch.equal(found, trits.float())
    assert again.item() == scale.item()
    return weight


def test_masters_quantize_to_the_same_trits_and_scale():
    generator = torch.Generator().manual_seed(0)
    for case in range(400):
        rows, columns = torch.randint(1, 200, (2,), generator=generator).tolist()
        shape = (1, columns) if case % 9 == 0 else (rows, 1) if case % 9 == 1 else (rows, columns)
        size = 10 ** (torch.rand((), generator=generator).item() * 5 - 4)
        weight = torch.randn(shape, generator=generator) * size
        if case % 3 == 0:  # mostly zeros
            weight *= torch.rand(shape, generator=generator) < 0.1
        if case % 7 == 0:  # no zero
            weight = weight.sign() * size
        exact(*bit.weight_quant(weight))


def test_their_scale_does_not_depend_on_the_order_of_a_sum():
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(1)) * 0.03
    _, scale = bit.weight_quant(weight)
    masters = exact(*bit.weight_quant(weight)).abs().flatten()
    orders = [torch.randperm(len(masters)) for _ in range(5)]
    sums = {float(np.add.accumulate(masters[order].numpy())[-1]) for order in orders}
    assert sums == {masters.double().sum().item()}
    assert np.float32(sums.pop()) / np.float32(120_000) == scale.item()


@pytest.mark.parametrize("trits", [torch.zeros(3, 5), torch.ones(3, 5), -torch.ones(1, 1)])
def test_masters_of_extremes(trits):
    exact(trits, torch.tensor(1e-5))
    if trits.any():
        exact(trits, torch.tensor(0.37))
        exact(trits, torch.tensor(3e4))


def test_a_scale_that_no_training_gives_is_refused_and_one_between_is_said(capsys):
    trits = torch.ones(3, 5)
    with pytest.raises(ValueError, match=r"it: no master weights.*1e-07.*nearest.*1e-05"):
        start.masters_of("it", trits, torch.tensor(1e-7), CPU)
    with pytest.raises(ValueError, match="no master weights"):
        start.masters_of("it", trits, torch.tensor(float("inf")), CPU)
    # 3 sums are fewer than the scales between them: those of 3 weights, near 1.9
    scales = [torch.tensor(1.9) + k * 2**-23 for k in range(8)]
    for scale in scales:
        start.masters_of("it", torch.ones(1, 3), scale, CPU)
    assert "met but for a share of" in capsys.readouterr().err


def test_a_matrix_too_large_for_exact_sums_is_met_by_one_weight(monkeypatch):
    weight = torch.randn(64, 50, generator=torch.Generator().manual_seed(2))
    trits, scale = bit.weight_quant(weight)
    large = trits * (scale * (trits.numel() / trits.count_nonzero()))
    start.settle(large, scale, torch.arange(64), CPU)
    found, again = bit.weight_quant(large)
    assert torch.equal(found, trits)
    assert again == scale


def test_masters_of_real_exports(base):
    folder, _ = base
    for name in ("exact.safetensors", "half.safetensors", "hf", "dense"):
        model = start.open_base(str(folder / name)).model
        for layer in model.bit_linears().values():
            trits, scale = layer.ternary()
            exact(trits.float(), scale)


# A run that starts so


@pytest.mark.parametrize("name", ["run", "exact.safetensors", "hf", "dense"])
def test_before_the_first_step_the_loss_is_the_sources(base, tiny_corpus, tmp_path, name):
    folder, state = base
    before = digests(folder)
    train(tmp_path / "run", folder / name, tiny_corpus)
    assert first_loss(tmp_path / "run") == state.val_loss
    assert digests(folder) == before
    [saved] = bit.list_checkpoints(tmp_path / "run" / "checkpoints", "best")[:1]
    assert saved.exists()


def test_from_a_rounded_export_it_is_the_exports(base, tiny_corpus, tmp_path):
    folder, state = base
    model, tokenizer = bit.load_model(folder / "half.safetensors")
    train(tmp_path / "run", folder / "half.safetensors", tiny_corpus, callbacks=[StopAt(1)])
    data, _ = bit.prepare_data(bit.DataConfig(str(tiny_corpus)), 300, 16, tmp_path / "run")
    device, first = bit.choose_device("cpu", "float32"), bit.end_of_text_id(tokenizer)
    masters = bit.BitLM(tiny.MODEL)
    masters.load_state_dict(bit.load_checkpoint(tmp_path / "run", 0)["model"])
    nats = bit.total_loss(masters, data.validation, first, device)
    assert first_loss(tmp_path / "run") == nats / len(data.validation)
    assert_same_bits(masters.freeze().state_dict(), model.state_dict())
    assert first_loss(tmp_path / "run") != state.val_loss  # the embedding is rounded


def test_the_masters_of_a_run_are_taken_as_they_are(base, tiny_corpus, tmp_path):
    folder, _ = base
    train(tmp_path / "run", folder / "run", tiny_corpus, callbacks=[StopAt(1)])
    zero = bit.load_checkpoint(tmp_path / "run", 0)
    source = bit.load_checkpoint(folder / "run")["model"]
    assert_same_bits(zero["model"], source)
    assert zero["config"]["train"]["init_from"] == str(folder / "run")


def test_without_its_source_it_resumes_bit_for_bit(base, tiny_corpus, tmp_path):
    shutil.copytree(base[0] / "run", tmp_path / "base")
    for out in ("whole", "again"):
        train(tmp_path / out, tmp_path / "base", tiny_corpus)
    assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "again"))
    for out, step in (("cut", 2), ("early", 1)):
        train(tmp_path / out, tmp_path / "base", tiny_corpus, callbacks=[StopAt(step)])
    for path in (tmp_path / "early" / "checkpoints").glob("step_00000001*"):
        path.unlink()  # as if killed before its first checkpoint but that of step 0
    shutil.rmtree(tmp_path / "base")
    for out in ("cut", "early"):
        assert train(tmp_path / out, tmp_path / "base", tiny_corpus).step == 6
        assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / out))
        assert without_times(tmp_path / "whole") == without_times(tmp_path / out)
        told = json.loads((tmp_path / out / "config.json").read_text())
        assert told == json.loads((tmp_path / "whole" / "config.json").read_text())
        assert told["start"]["name"] == "base"
        assert len(told["start"]["sha256"]) == 64


def test_the_hash_tells_weights_apart_but_not_their_wrapping(base):
    folder, _ = base
    names = ("exact.safetensors", "hf", "dense", "half.safetensors", "run")
    found = [start.weights_hash(start.open_base(str(folder / name)).model) for name in names]
    assert found[0] == found[1] == found[2]
    assert len(set(found)) == 3


# What does not fit


def test_what_contradicts_the_source_is_one_error_before_any_work(base, tiny_corpus, tmp_path):
    folder, _ = base
    wide = dataclasses.replace(tiny.MODEL, hidden_size=64, vocab_size=400)
    with pytest.raises(ValueError, match=r"vocab_size=400 \(there: 300\), hidden_size=64 \(there"):
        train(tmp_path / "run", folder / "run", tiny_corpus, wide)
    pieces = bit.DataConfig(str(tiny_corpus), tokenizer="wordpiece")
    with pytest.raises(ValueError, match=r"tokenizer='wordpiece' \(there: 'bpe'\)"):
        train(tmp_path / "run", folder / "run", pieces)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    other = bit.train_tokenizer(["other words"], 270)
    other.save(str(tmp_path / "run" / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer=.*expected the tokenizer of"):
        train(tmp_path / "run", folder / "run", tiny_corpus)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["tokenizer.json"]


def test_another_source_is_refused_by_a_run_that_has_begun(base, tiny_corpus, tmp_path):
    folder, _ = base
    train(tmp_path / "run", folder / "run", tiny_corpus, callbacks=[StopAt(2)])
    with pytest.raises(ValueError, match=r"other settings: init_from \(run: .*run, asked: .*hf\)"):
        train(tmp_path / "run", folder / "hf", tiny_corpus)
    plain = dataclasses.replace(TRAIN, init_from=None)
    with pytest.raises(ValueError, match=r"init_from \(run: .*run, asked: None\)"):
        bit.train(tiny.MODEL, bit.DataConfig(str(tiny_corpus)), plain, tmp_path / "run")
    state = train(tmp_path / "run", folder / "hf", tiny_corpus, resume="never")
    assert state.step == 6


@pytest.mark.parametrize("inside", ["", "checkpoints/step_00000012.safetensors"])
def test_the_source_is_not_written_into(base, tiny_corpus, inside):
    folder, _ = base
    before = digests(folder)
    with pytest.raises(ValueError, match=r"into the folder that it starts from.*another --out"):
        train(folder / "run", folder / "run" / inside, tiny_corpus, resume="never")
    assert digests(folder) == before


def test_what_is_no_source_says_what_is(base, tiny_corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.gguf").write_text("GGUF")
    for name, error, message in (
        ("none", FileNotFoundError, r"not there; expected a run folder, an export, or hf:OWNER"),
        ("runs/t4-1h", FileNotFoundError, r"bitllm train --preset t4-1h --out .*runs/t4-1h"),
        ("empty", FileNotFoundError, "not a run folder"),
        ("a.gguf", ValueError, "a GGUF file runs in llama.cpp; give the run folder"),
    ):
        with pytest.raises(error, match=message):
            train(tmp_path / "run", tmp_path / name, tiny_corpus)
    with pytest.raises(ValueError, match="OWNER/NAME"):
        train(tmp_path / "run", "hf:nobody", tiny_corpus)
    assert not (tmp_path / "run").exists()


# Conversations


@pytest.mark.parametrize("linear", ["ternary", "weight_only", "dense"])
@pytest.mark.parametrize("tied", [True, False])
def test_marks_get_rows_and_old_tokens_keep_their_logits(
    tiny_corpus, chats, tmp_path, tied, linear
):
    shape = dataclasses.replace(tiny.MODEL, tie_word_embeddings=tied, linear=linear)
    short = dataclasses.replace(TRAIN, max_steps=2)
    bit.train(shape, bit.DataConfig(str(tiny_corpus)), short, tmp_path / "base", callbacks=())
    sources = ["base"]
    if linear != "dense":
        export_packed(tmp_path / "base", tmp_path / "p.safetensors", embedding="float32")
        sources += ["p.safetensors"]
    old, plain = bit.load_model(tmp_path / "base")
    ids = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(0))
    for number, source in enumerate(sources):
        out = tmp_path / f"run{number}"
        train(out, tmp_path / source, chats, shape, callbacks=[StopAt(1)])
        new, tokenizer = bit.load_model(out, 0)
        assert new.config.vocab_size == 302
        assert bit.num_ids(plain) == 300
        assert [tokenizer.token_to_id(name) for name in talk.SPECIAL] == [300, 301]
        logits = new(ids)
        torch.testing.assert_close(logits[..., :300], old(ids), rtol=1e-6, atol=1e-6)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights = bit.load_checkpoint(out, 0)["model"]
            if source == "base" and name in weights:
                rows = bit.load_checkpoint(tmp_path / "base")["model"][name]
                assert torch.equal(weights[name][:300], rows)
        resumed = train(out, tmp_path / source, chats, shape)
        assert resumed.step == 6
        assert resumed.model.config.vocab_size == 302


def test_new_rows_are_near_the_mean_and_differ(base, chats, tmp_path):
    folder, _ = base
    train(tmp_path / "run", folder / "run", chats, callbacks=[StopAt(1)])
    rows = bit.load_checkpoint(tmp_path / "run", 0)["model"]["model.embed_tokens.weight"]
    mean, spread = rows[:300].mean(0), rows[:300].std(0)
    for row in rows[300:]:
        assert 0.02 < ((row - mean) / spread).abs().mean() < 0.2
    assert not torch.equal(rows[300], rows[301])
    again = dataclasses.replace(TRAIN, seed=1)
    train(tmp_path / "other", folder / "run", chats, seed=again.seed, callbacks=[StopAt(1)])
    other = bit.load_checkpoint(tmp_path / "other", 0)["model"]["model.embed_tokens.weight"]
    assert torch.equal(other[:300], rows[:300])
    assert not torch.equal(other[300:], rows[300:])


def test_a_tuned_run_is_a_source_itself_and_needs_no_new_rows(base, chats, tmp_path):
    folder, _ = base
    first = train(tmp_path / "one", folder / "run", chats)
    grown = first.model.config
    train(tmp_path / "two", tmp_path / "one", chats, grown)
    assert first_loss(tmp_path / "two") == first.val_loss


# Around it


def test_the_command_line_takes_the_shape_of_the_source(base, chats, tmp_path, capsys):
    folder, _ = base
    out = tmp_path / "run"
    flags = ["--init-from", str(folder / "hf"), "--data", str(chats), "--batch-tokens", "128"]
    flags += ["--max-steps", "3", "--compile", "off", "--dtype", "float32"]
    command = ["train", "--out", str(out), *flags]
    assert main([*command, "--hidden-size", "64"]) == 2
    assert "hidden_size=64 (there: 32)" in capsys.readouterr().err
    assert main(command) == 0
    settings = bit.read_json(out / "config.json")
    assert settings["model"] == {
        **dataclasses.asdict(tiny.MODEL),
        "vocab_size": 302,
    }
    shutil.move(folder / "hf", folder / "moved")
    try:
        assert main(["train", "--out", str(out), "--max-steps", "4"]) == 0
        assert main([*command[:-6], "--max-steps", "4", *command[-4:]]) == 0
    finally:
        shutil.move(folder / "moved", folder / "hf")
    assert "complete: 4 steps" in capsys.readouterr().out


def test_exports_say_what_a_model_was_tuned_from(base, chats, tmp_path):
    gguf = pytest.importorskip("gguf")
    folder, _ = base
    train(tmp_path / "run", folder / "run", chats, callbacks=[StopAt(1)])
    export_hf(tmp_path / "run", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "tuned from run with bitllm" in card
    assert "| which was trained on | text.txt |" in card
    assert str(folder) not in card + (tmp_path / "hf" / "config.json").read_text()
    export_packed(tmp_path / "hf", tmp_path / "p.safetensors")
    facts = start.open_base(str(tmp_path / "p.safetensors")).facts
    expected = start.weights_hash(start.open_base(str(folder / "run")).model)
    assert (facts["base_name"], facts["base_sha256"]) == ("run", expected)
    export_gguf(tmp_path / "run", tmp_path / "m.gguf", kind="F16")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.base_model.0.name"].contents() == "run"
    assert fields["general.description"].contents().startswith("Tuned from run on a.jsonl")
    export_hf(folder / "run", tmp_path / "plain")
    assert "trained from scratch with bitllm" in (tmp_path / "plain" / "README.md").read_text()


def test_several_processes_start_from_the_same_weights_as_one(base, tiny_corpus, tmp_path):
    shutil.copy(tiny_corpus, tmp_path / "text.txt")
    source = f'init_from="{base[0] / "hf"}":max_steps=2'
    tasks = [f"two:{source}", f"sharded:{source}:fsdp=true"]
    results = run_together(2, tmp_path, *tasks)
    assert [code for code, *_ in results] == [0, 0], results
    train_alone(tmp_path, f"one:{source}")
    models = [bit.load_checkpoint(tmp_path / n, 0)["model"] for n in ("one", "two", "sharded")]
    assert_same_bits(models[0], models[1])
    assert_same_bits(models[0], models[2])
    assert first_loss(tmp_path / "two") == pytest.approx(first_loss(tmp_path / "one"), rel=1e-6)
    assert weights_of(tmp_path / "two").keys() == weights_of(tmp_path / "one").keys()
