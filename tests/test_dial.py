"""What the dial chooses: for more time, other machines, less text; what is given stays."""

import dataclasses
import json
import math
import os

import pytest
import torch

import bitllm_core as bit
from bitllm import cli, clock, dial
from tests import tiny
from tests import tokenizer_kinds as kinds

CPU = dial.Machine(bit.Device(torch.device("cpu"), torch.bfloat16, ""), 1.8e12, True, amx=True)
OLD = dial.Machine(bit.Device(torch.device("cpu"), torch.float32, ""), 0.17e12, True)
T4 = dial.Machine(bit.Device(torch.device("cuda"), torch.float16, ""), 25e12, True)
BOOK, WIKI = dial.Text(200e3, "book.txt"), dial.Text(10.8e6, "wiki.txt")
STREAM = dial.Text(math.inf, "tinystories")


def choose(minutes, machine=CPU, text=WIKI, **given):
    return dial.choose(minutes, bit.DataConfig(data=text.name), given, machine, text)


@pytest.mark.parametrize("machine", [CPU, OLD, T4], ids=["CPU", "OLD", "T4"])
@pytest.mark.parametrize("text", [BOOK, WIKI, STREAM], ids=["book", "wiki", "stream"])
def test_every_choice_is_a_run_that_exports(machine, text):
    from bitllm.export import export_limits

    for minutes in (0.1, 1, 3, 10, 60, 600):
        choice = choose(minutes, machine, text)
        bit.check_configs(choice.model, choice.train)
        assert not export_limits(choice.model)
        assert choice.train.minutes == minutes
        assert choice.train.max_steps >= 1
        assert len(choice.why) == 3


def test_more_time_or_a_faster_machine_is_a_larger_model_and_more_tokens():
    for machines in ([CPU] * 4, [OLD, OLD, CPU, T4]):
        choices = [choose(m, k, STREAM) for m, k in zip((1, 10, 60, 60), machines, strict=True)]
        sizes = [clock.inner_parameters(c.model) for c in choices]
        tokens = [c.train.max_steps * c.train.batch_tokens for c in choices]
        assert sizes == sorted(sizes)
        assert tokens == sorted(tokens)
        assert sizes[0] < sizes[2]


def test_a_small_text_has_a_small_vocabulary_and_is_not_read_for_ever():
    for minutes in (3, 10, 600):
        choice = choose(minutes, CPU, BOOK)
        assert choice.model.vocab_size <= 2048
        tokens = BOOK.bytes / dial.bytes_per_token(choice.model.vocab_size)
        epochs = choice.train.max_steps * choice.train.batch_tokens / tokens
        assert epochs == pytest.approx(clock.USEFUL_EPOCHS, rel=0.1)
        assert (choice.train.weight_decay, choice.train.adamw_learning_rate) == (0.5, 0.005)
        assert choice.train.compile == "off"  # it would take longer than the training
        assert "more would only overfit, so it ends after" in choice.why[1]
    assert choose(1, CPU, dial.Text(3e3, "note.txt")).model.vocab_size == 1024


def test_a_short_run_reads_short_windows():
    assert choose(2).model.max_position_embeddings == 128  # 2M tokens; 5M are better at 256
    assert choose(10).model.max_position_embeddings == 256


def test_what_is_read_often_learns_more_slowly_and_decays():
    for minutes, recipe in ((10, (0.0, 0.015)), (60, (0.5, 0.005))):
        choice = choose(minutes, CPU, WIKI)
        tokens = WIKI.bytes / dial.bytes_per_token(choice.model.vocab_size)
        epochs = choice.train.max_steps * choice.train.batch_tokens / tokens
        assert (epochs > dial.OFTEN) is (minutes == 60)
        assert (choice.train.weight_decay, choice.train.adamw_learning_rate) == recipe


def test_muon_has_less_momentum_where_there_are_few_steps():
    assert choose(10).train.momentum == 0.9
    assert choose(180, T4, STREAM).train.momentum == 0.95
    assert choose(10, momentum=0.8).train.momentum == 0.8
    assert choose(10, optimizer="adamw").train.momentum == 0.95


def test_a_text_of_few_words_has_a_small_vocabulary():
    assert choose(10, text=dataclasses.replace(WIKI, words=1500)).model.vocab_size <= 2048


def test_what_is_given_stays_and_the_rest_follows():
    given = {"hidden_size": 192, "vocab_size": 300, "batch_tokens": 1536, "learning_rate": 0.1}
    choice = choose(10, max_position_embeddings=64, seed=3, **given)
    fields = {**vars(choice.model), **vars(choice.train)}
    given |= {"max_position_embeddings": 64, "seed": 3, "num_attention_heads": 3}
    assert {name: fields[name] for name in given} == given
    smaller = choose(10, num_hidden_layers=12).model
    assert smaller.num_hidden_layers == 12


def test_compiling_is_for_runs_that_have_the_time():
    assert choose(1).train.compile == "off"
    assert choose(10).train.compile == "on"
    assert choose(1, compile="on").train.compile == "on"
    assert choose(10, dataclasses.replace(CPU, compiles=False)).train.compile == "off"


def test_steps_are_those_of_amx_where_training_uses_it(monkeypatch):
    monkeypatch.setattr(dial, "measure_products", lambda device: 1e12)
    monkeypatch.setattr(dial, "MEASURING_S", 0)
    for there in (True, False):
        monkeypatch.setattr(dial.products, "has_amx", lambda there=there: there)
        assert dial.measure("cpu", "bfloat16").amx is there
        assert not dial.measure("cpu", "float32").amx
        assert not dial.has_amx(T4.device)


def test_a_stream_is_as_long_as_the_run():
    choice = choose(60, T4, STREAM)
    tokens = choice.train.max_steps * choice.train.batch_tokens
    assert 1 < choice.data.max_train_tokens / tokens < 1.5
    assert choose(60, T4, WIKI).data.max_train_tokens is None
    huge = choose(1, CPU, dial.Text(10e9, "dump.txt"))  # of which only so much is tokenized
    assert huge.data.max_train_tokens < 2e6


def test_sizes_of_sources(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x " * 5000)
    one = dial.size_of(bit.DataConfig(data=str(path)))
    assert one.bytes == pytest.approx(9500)
    assert dial.size_of(bit.DataConfig(data=str(tmp_path))).bytes == pytest.approx(9500)
    limited = bit.DataConfig(data=str(path), max_train_tokens=100)
    assert dial.size_of(limited).bytes == pytest.approx(380)
    assert one.words == 1
    assert dial.size_of(bit.DataConfig(data="hf:a/b")).bytes == math.inf
    for source in ("pydocs", "companion"):  # known, not read as a whole
        size = sum(len(text.encode()) for text, _ in bit.read_pieces(source))
        found = dial.size_of(bit.DataConfig(data=source))
        assert found.bytes == pytest.approx(0.95 * size, rel=0.1)
        assert found.conversations == (source == "companion")
    with pytest.raises(FileNotFoundError, match="data='nowhere'"):
        dial.size_of(bit.DataConfig(data="nowhere"))


def test_names_and_values_are_checked_before_any_work(monkeypatch):
    monkeypatch.setattr(dial, "measure", None)  # it would fail
    with pytest.raises(ValueError, match=r"max_steps=5: expected none with minutes"):
        dial.dial(1, max_steps=5)
    with pytest.raises(ValueError, match=r"hidden=5: expected a field"):
        dial.dial(1, hidden=5)
    with pytest.raises(ValueError, match=r"minutes=0.0: expected more than 0"):
        dial.dial(0)


def test_measuring_is_the_mean_of_some_moments(monkeypatch):
    rates = iter([1e9, 3e9, 5e9])
    monkeypatch.setattr(dial, "measure_products", lambda _: next(rates))
    monkeypatch.setattr(dial, "MEASURING_S", 0)
    assert dial.measure("cpu", "float32", 2).rate == 2e9
    assert dial.measure("cpu").device.device.type == "cpu"


@pytest.fixture
def quick(monkeypatch):
    """A machine of known speed, and a choice so small that it is trained in a moment."""
    slow = dataclasses.replace(CPU, compiles=False)
    monkeypatch.setattr(dial, "measure", lambda *_: slow)
    shape = {k: v for k, v in vars(tiny.MODEL).items() if v is not None}
    flags = [(f"--{name.replace('_', '-')}", str(shape[name])) for name in list(shape)[:7]]
    return [word for flag in flags for word in flag]


def test_a_command_with_the_dial_ends_in_time_and_resumes(
    quick, tiny_corpus, tmp_path, capsys, monkeypatch
):
    out, data = tmp_path / "run", ["--data", str(tiny_corpus)]
    command = ["train", *data, "--minutes", "0.15", "--out", str(out)]
    assert cli.main([*command, *quick, "--batch-tokens", "128", "--dtype", "float32"]) == 0
    text = capsys.readouterr()
    assert "0.15 minutes on cpu" in text.err
    assert "complete: " in text.out
    saved = json.loads((out / "config.json").read_text())
    assert saved["model"]["hidden_size"] == tiny.MODEL.hidden_size
    assert saved["train"]["minutes"] == 0.15
    step = bit.load_checkpoint(out)["step"]
    monkeypatch.setattr(dial, "measure", None)  # a run that is there keeps its settings
    assert cli.main(command) == 0
    assert bit.load_checkpoint(out)["step"] == step
    assert cli.main([*command, "--max-steps", "9"]) == 2
    assert cli.main(["train", "--out", str(out), "--max-steps", "9"]) == 2
    assert "more minutes make it longer" in capsys.readouterr().err
    longer = ["train", "--out", str(out), "--minutes", "0.2"]
    assert cli.main(longer) == 0
    assert "minutes: 0.15 -> 0.2" in capsys.readouterr().err


def test_the_plan_shows_the_choice(tiny_corpus, capsys, quick):
    command = ["plan", "--minutes", "10", "--data", str(tiny_corpus)]
    assert cli.main(command) == 0
    text = capsys.readouterr()
    assert "10 minutes on cpu" in text.err
    assert "parameters: " in text.out
    assert cli.main([*command, "--hidden-size", "512"]) == 0
    assert "layers x 512" in capsys.readouterr().err
    assert cli.main(["plan", "--minutes", "nan"]) == 2
    assert cli.main(["plan", "--minutes", "1", "--max-steps", "9"]) == 2


def test_the_main_process_chooses_for_all(monkeypatch):
    asked = []

    class Second(bit.Processes):
        def run_on_main(self, work):
            asked.append("main")

        def broadcast(self, value):
            assert value is None
            return choose(10)

    class Distributed:
        DistributedProcesses = Second

        @staticmethod
        def meet(device):
            asked.append(device)

    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    monkeypatch.setattr(dial, "extension", lambda *_: Distributed)
    monkeypatch.setattr(dial, "measure", None)
    model, _, _ = dial.dial(10, bit.DataConfig(data="wiki.txt"))
    assert model == choose(10).model
    assert asked == ["auto", "main"]


def test_a_given_tokenizer_decides_the_vocabulary(tmp_path, tiny_corpus):
    """However large: the choice is among shapes with as many rows of the embedding."""
    kinds.llama_3().save(str(tmp_path / "t.json"))
    data = bit.DataConfig(str(tiny_corpus), tokenizer=str(tmp_path / "t.json"))
    model, chosen, _ = dial.dial(1, data, device="cpu")
    assert model.vocab_size == 601
    assert chosen.tokenizer == data.tokenizer
    with pytest.raises(ValueError, match="expected bpe, wordpiece"):
        dial.dial(1, dataclasses.replace(data, tokenizer=str(tmp_path / "none.json")))
