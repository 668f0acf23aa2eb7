"""A mixture: the shares that were asked for, each source's own loss, and no bit more or less."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bitllm_core as bit
from bitllm import dial, loggers, mixture, vocabulary
from bitllm.cli import main
from bitllm.companion import is_companion
from bitllm.mixture import Order, sources_of
from bitllm.notebook import Settings
from tests import tiny
from tests.conftest import assert_same_bits, state_of, without_times
from tests.core.test_training import DieAt
from tests.tiny import StopAt

WEIGHTS = (5, 3, 2)
TRAIN = dataclasses.replace(tiny.TRAIN, log_every_steps=1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A file, a folder and conversations, of which no three words are the same."""
    folder = tmp_path_factory.mktemp("sources")
    text = "".join(f"{i} cats sat on {i + 1} mats.\n" for i in range(500))
    (folder / "a.txt").write_text(text, encoding="utf-8")
    (folder / "b").mkdir()
    for name in "12":
        text = "".join(f"{name}{i} птиц, {i % 7} 🐱!\n" for i in range(1000))
        (folder / "b" / f"{name}.txt").write_text(text, encoding="utf-8")
    turns = [[("user", f"hi {i}"), ("assistant", f"HELLO {i % 5}")] for i in range(300)]
    rows = [{"messages": [{"role": r, "content": c} for r, c in row]} for row in turns]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "c.jsonl").write_text(lines, encoding="utf-8")
    return [str(folder / name) for name in ("a.txt", "b", "c.jsonl")]


@pytest.fixture
def data(sources):
    return mixed(sources)


def mixed(sources, **more):
    pairs = zip(sources, WEIGHTS, strict=True)
    return bit.DataConfig(",".join(f"{name}:{weight}" for name, weight in pairs), **more)


def run(data, out, *callbacks, **changes):
    config = dataclasses.replace(TRAIN, **changes)
    return bit.train(tiny.MODEL, data, config, out, callbacks=callbacks)


# What is asked for


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("pydocs:0,companion:1", r"a weight above 0 for 'pydocs', such as pydocs:0.5, not 0$"),
        ("pydocs:-0.5,companion:1", r"above 0 for 'pydocs'.*, not -0.5"),
        ("pydocs:1,companion:nan", r"above 0 for 'companion'.*, not nan"),
        ("pydocs:1,companion:inf", r"above 0 for 'companion'.*, not inf"),
        ("pydocs,companion:1", r"a weight for 'pydocs' too.*tinystories:0.7"),
        ("pydocs:1,companion:es", r"a weight for 'companion:es' too"),
        ("one.txt,two.txt", r"a weight for 'one.txt' too.*or the name of a file"),
        ("pydocs:1,,companion:1", r"a source between two commas"),
        (":1,pydocs:1", r"a source before the weight 1"),
        ("pydocs:1,pydocs:2", r"'pydocs' only once"),
        ("pydocs:1,companion:1e-9", r"a millionth of all weights for 'companion'"),
        ("pydocs:1,nothing.txt:1", r"^data='nothing.txt': no such file"),
        ("pydocs:1,C:\\no.txt:1", r"^data='C:\\\\no.txt': no such file"),
        ("pydocs:1,hf:no-name:1", r"^data='hf:no-name': no such file"),
        ("pydocs:1,companion:xx:1", r"^data='companion:xx': expected companion:LANGUAGE"),
    ],
)
def test_what_is_wrong_is_named_before_any_work(data, says, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        run(bit.DataConfig(data), tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


def test_names_with_colons_and_commas_are_read_as_they_are_meant(tmp_path, monkeypatch):
    found = dict(sources_of("hf:me/x:en#t:0.6, companion:es:0.3,pydocs:.3"))
    assert list(found) == ["hf:me/x:en#t", "companion:es", "pydocs"]
    assert list(found.values()) == pytest.approx([0.5, 0.25, 0.25])
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c.txt:1,d.txt"):
        (tmp_path / name).write_text("cats " * 200) if os.name != "nt" or ":" not in name else None
    assert sources_of("a,b.txt:1,pydocs:3") == [("a,b.txt", 0.25), ("pydocs", 0.75)]
    assert not mixture.is_mixture("a,b.txt")
    assert os.name == "nt" or not mixture.is_mixture("c.txt:1,d.txt")
    bit.prepare_data(bit.DataConfig("a,b.txt"), 300, 16, tmp_path / "run")
    (tmp_path / "a,b.txt").unlink()  # its tokens are there
    tokens, _ = bit.prepare_data(bit.DataConfig("a,b.txt"), 300, 16, tmp_path / "run")
    assert type(tokens) is bit.TokenData


def test_the_command_line_shows_the_mixture_and_refuses_a_wrong_one(data, capsys, tmp_path):
    assert main(["plan", "--preset", "ci", "--data", data.data]) == 0
    out = capsys.readouterr().out
    assert f"data: {data.data}" in out
    assert "50.00%" in out
    assert "a.txt: 20,480 tokens" in out  # of 40 steps of 1,024
    assert main(["train", "--data", "pydocs:1,nothing:2", "--out", str(tmp_path / "x")]) == 2
    assert "data='nothing': no such file" in capsys.readouterr().err


def test_the_form_and_the_dial_take_a_mixture(data, sources):
    settings = Settings("ci", data.data)
    assert data.data in settings.describe()
    assert settings.configs()[1].data == data.data
    for wrong in ("pydocs:1,nothing.txt:1", "pydocs:1,"):
        with pytest.raises(ValueError, match="data="):
            Settings("ci", wrong).describe()
    other = Settings("ci", data.data.removesuffix("2") + "4")
    assert other.run_folder != settings.run_folder
    sizes = [dial.size_of(bit.DataConfig(source)).bytes for source in sources]
    text = dial.size_of(data)
    assert text.bytes == sum(sizes)
    assert text.conversations


# The order


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1, 1), (0.513, 0.287, 0.19, 0.01)])
def test_shares_of_tokens_are_those_that_were_asked_for(weights):
    shares = np.array(weights) / sum(weights)
    order = Order(shares)
    chosen = order.sources(0, 20_000)
    counts = np.cumsum(chosen[:, None] == np.arange(len(shares)), axis=0)
    exact = np.arange(1, 20_001)[:, None] * shares
    assert abs(counts - exact).max() < 1.5  # windows, at any time
    assert abs(counts[1500:] / exact[1500:].sum(1, keepdims=True) - shares).max() < 0.001
    assert order.before(12_345) == counts[12_344].tolist()
    later = 5 * len(order.cycle) + 77
    assert order.sources(later, 9).tolist() == order.sources(77, 9).tolist()
    ends = order.end(counts[12_344])
    assert ends >= 12_345
    assert any(a > b for a, b in zip(order.before(ends + 1), counts[12_344], strict=True))


# A run


@pytest.mark.parametrize("budget", [None, 9000], ids=["prepared", "streamed"])
def test_killed_twice_it_resumes_to_the_same_bits(sources, tmp_path, budget):
    data = mixed(sources, max_train_tokens=budget)
    run(data, tmp_path / "whole")
    for die in (4, 8):
        with pytest.raises(RuntimeError, match="machine"):
            run(data, tmp_path / "parts", DieAt(die))
    if budget:  # as on a machine that has the checkpoint alone
        (tmp_path / "parts" / "data" / "2" / "data" / "train.bin").unlink()
        (tmp_path / "parts" / "data" / "2" / "data" / "progress.json").unlink()
    run(data, tmp_path / "parts")
    streamed = (tmp_path / "whole" / "data" / "2" / "data" / "progress.json").exists()
    assert streamed == bool(budget)
    assert_same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")


def owner(window, parts):
    """The source that has a window in its text, which is read as a ring."""
    found = []
    for number, part in enumerate(parts):
        ring = np.concatenate([part.training, part.training[:16]]).astype(np.int64)
        spans = np.lib.stride_tricks.sliding_window_view(ring, len(window))
        found += [number] * bool((spans == window).all(1).any())
    assert len(found) == 1
    return found[0]


def test_losses_and_counts_are_those_of_a_plain_recomputation(data, sources, tmp_path, caplog):
    caplog.set_level("INFO", "bitllm")
    bit.log.propagate = True
    run(data, tmp_path / "run", max_steps=30, micro_batch_size=4, eval_every_steps=0)
    tokens, tokenizer = bit.prepare_data(data, 300, 16, tmp_path / "run")
    parts, read = tokens.parts, [0, 0, 0]
    lines = [x for x in bit.MetricsLog.read(tmp_path / "run" / "metrics.jsonl") if "loss" in x]
    for step, line in enumerate(lines):
        windows = tokens.batch(TRAIN, 16, step)
        owners = np.array([owner(window, parts) for window in windows])
        read = [n + 16 * int((owners == i).sum()) for i, n in enumerate(read)]
        if step == 0:
            x, y = bit.read_signed(*map(torch.from_numpy, (windows[:, :-1], windows[:, 1:])))
            logits = bit.BitLM(tiny.MODEL, TRAIN.seed)(x).detach().flatten(0, 1)
            nats = F.cross_entropy(logits, y.flatten(), reduction="none").view(y.shape)
            own = [float(nats[owners == i].sum() / (y[owners == i] >= 0).sum()) for i in range(3)]
            assert list(line["source_loss"]) == sources
            assert list(line["source_loss"].values()) == pytest.approx(own, rel=1e-5)
    epochs = [n / len(part.training) for n, part in zip(read, parts, strict=True)]
    assert list(lines[-1]["source_epochs"].values()) == pytest.approx(epochs, abs=1e-4)
    losses = [np.mean([x["source_loss"][name] for x in lines[-10:]]) for name in sources]
    for name, count, epoch, loss in zip(sources, read, epochs, losses, strict=True):
        share = f"{count / sum(read):.1%} of the tokens"
        expected = f"{name}: {share}, {count:,} tokens, {epoch:.2f} epochs, loss {loss:.4f}"
        assert expected in caplog.text
    points = loggers.curve_points(lines[-1])
    assert points[f"source_loss/{sources[0]}"] == lines[-1]["source_loss"][sources[0]]
    assert tokenizer.token_to_id("<|im_start|>") is not None


def test_the_micro_batch_changes_no_data(data, tmp_path, monkeypatch):
    plain, seen = bit.BitLM.loss, []

    def loss(model, input_ids, targets, **parts):
        seen.extend(input_ids.tolist() if torch.is_grad_enabled() else [])
        return plain(model, input_ids, targets, **parts)

    monkeypatch.setattr(bit.BitLM, "loss", loss)
    found = []
    for size in (8, 2):
        run(data, tmp_path / str(size), max_steps=2, micro_batch_size=size, eval_every_steps=0)
        found.append((list(seen), without_times(tmp_path / str(size))[0]["source_loss"]))
        seen.clear()
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_validation_is_mixed_by_weight(data, sources, tmp_path):
    tokens, _ = bit.prepare_data(data, 300, 16, tmp_path / "run")
    held = [part.validation.astype(np.int64).tobytes() for part in tokens.parts]
    piece = max(min(16, len(tokens.validation) // mixture.VALIDATION_PIECES), 2)
    windows = tokens.validation[: len(tokens.validation) // piece * piece].reshape(-1, piece)
    there = [[w.astype(np.int64).tobytes() in text for text in held] for w in windows]
    shares = np.sum(there, axis=0) / np.sum(there)
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.06)
    other = dataclasses.replace(data, validation_data=sources[0])
    tokens, _ = bit.prepare_data(other, 300, 16, tmp_path / "other")
    assert tokens.validation.tolist() == tokens.parts[2].validation.tolist()
    with pytest.raises(ValueError, match=r"validation_data=.*one source, not a mixture"):
        run(dataclasses.replace(data, validation_data=data.data), tmp_path / "third")


def test_the_tokenizer_reads_all_sources_by_weight_and_nothing_held_out(tmp_path):
    for name in "ab":
        rows = (json.dumps({"text": f"{name} {i:4}"}) + "\n" for i in range(100))
        (tmp_path / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    mixed = bit.DataConfig(f"{tmp_path}/a.jsonl:9,{tmp_path}/b.jsonl:1")
    texts = list(mixture.mixed_texts(mixture.parts_of(mixed), [0.9, 0.1]))
    assert sum(text[0] == "a" for text in texts) / len(texts) == pytest.approx(0.9, abs=0.01)
    assert len(set(texts)) == 190  # 5% of each are held out
    assert len(texts) > 900  # a was read again while b came in


def test_what_has_conversations_in_it_gets_their_marks(data, tokenizer):
    assert vocabulary.num_rows(tokenizer, data) == bit.num_ids(tokenizer) + 2
    mixed = bit.DataConfig("pydocs:1,companion:es:1", persona="name=Luna")
    assert [part.persona for part in mixture.parts_of(mixed)] == [None, "name=Luna"]
    assert not is_companion("companion:1,pydocs:1")  # whose right answers are counted
    with pytest.raises(ValueError, match="persona"):
        bit.DataConfig("pydocs:1,companion.txt:1", persona="name=Luna")


def test_a_machine_without_the_sources_resumes_from_the_mirror(data, sources, tmp_path):
    for source in sources:
        copy = shutil.copytree if os.path.isdir(source) else shutil.copy  # noqa: PTH112
        copy(source, tmp_path / os.path.basename(source))  # noqa: PTH119
    here = mixed([str(tmp_path / os.path.basename(source)) for source in sources])  # noqa: PTH119
    config = dataclasses.replace(TRAIN, eval_every_steps=0)

    def train(out, *callbacks):
        options = {"mirror": tmp_path / "mirror", "callbacks": callbacks}
        return bit.train(tiny.MODEL, here, config, tmp_path / out, **options)

    train("one", StopAt(5))
    (tmp_path / "a.txt").unlink()
    shutil.rmtree(tmp_path / "b")
    assert train("two").step == 12
    (tmp_path / "c.jsonl").write_text("{}")  # one that has changed is another text
    with pytest.raises(ValueError, match=r"c\.jsonl.*it has changed"):
        train("two")
