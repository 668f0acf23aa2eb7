"""What is exported says the same in the clients that people use, and comes back as it was.

The clients are the real ones (requirements-test.txt), reached through tools/export_parity.py.
"""

import http.server
import json
import math
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bitllm_core as bit
from bitllm.export import gguf, huggingface, packed
from tests.conftest import ROOT, Payload
from tools.export_parity import LlamaCpp, Ours, Transformers, compare

# warnings of the clients' own making
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CLIENTS = {"hf": Transformers, "dense": Transformers, "TQ2_0": LlamaCpp, "TQ1_0": LlamaCpp}
PERPLEXITY_WITHIN = {Transformers: 1e-3, LlamaCpp: 5e-3}
LARGEST_DELTA = 0.3
"""of a logit. One activation that rounds to the neighbouring 8-bit step moves logits by some
hundredths; a wrong convention moves them by whole units."""


@pytest.fixture(scope="module")
def one_thread():
    """Small matrices gain nothing from a second thread, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread):
    """A small model, but trained until it has learned something: the clients load this one."""
    out = tmp_path_factory.mktemp("export") / "run"
    model = bit.ModelConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    training = bit.TrainConfig(
        max_steps=150,
        batch_tokens=1024,
        optimizer="adamw",
        learning_rate=3e-3,
        eval_every_steps=75,
        eval_tokens=4096,
        save_every_steps=75,
        compile="off",
    )
    state = bit.train(model, bit.DataConfig(), training, out, callbacks=[])
    assert state.val_loss < 4.5 < math.log(512)
    return out


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports")
    made = {
        "packed": bit.export_packed(run, out / "m.safetensors"),
        "int8": bit.export_packed(run, out / "8.safetensors", embedding="int8"),
        "float32": bit.export_packed(run, out / "32.safetensors", embedding="float32"),
        "hf": bit.export_hf(run, out / "hf", author="A. Author", licence="mit"),
        "dense": bit.export_hf(run, out / "dense", dense=True),
    }
    for kind in gguf.GGUF_KINDS:
        made[kind] = bit.export_gguf(run, out / f"{kind}.gguf", kind=kind, author="A. Author")
    return made


@pytest.fixture(scope="module")
def ours(run):
    return Ours(run)


@pytest.fixture(scope="module")
def clients(exports):
    return {name: client(exports[name].path) for name, client in CLIENTS.items()}


@pytest.fixture(scope="module")
def windows(ours, run):
    """Text that was held out, (40, 64)."""
    held_out = np.memmap(run / "data" / "validation.bin", dtype="uint16", mode="r")
    return torch.from_numpy(held_out[: 40 * 64].astype(np.int64)).view(40, 64)


@pytest.fixture(scope="module")
def prompts(ours, windows):
    """Of 24 beginnings the three whose greedy text has no near tie, which could fall either way."""

    def margin(prompt):
        text = torch.tensor([prompt + ours.greedy(prompt, 48)])
        best, second = ours.logits(text)[0, len(prompt) - 1 : -1].topk(2).values.T
        return (best - second).min().item()

    found = sorted((margin(row[:12].tolist()), row[:12].tolist()) for row in windows[:24])[-3:]
    assert found[0][0] > 0.02, "no text without near ties: train the fixture longer"
    return [prompt for _, prompt in found]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory, tiny_corpus):
    """Trained for two steps: enough where only the files matter."""
    return train_tiny(tmp_path_factory.mktemp("tiny") / "run", tiny_corpus)


def train_tiny(out, corpus, tokenizer="bpe", **changes):
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96}
    model = bit.ModelConfig(
        **{**sizes, "num_hidden_layers": 1, "max_position_embeddings": 16, **changes}
    )
    training = bit.TrainConfig(2, batch_tokens=64, optimizer="adamw", compile="off")
    data = bit.DataConfig(data=str(corpus), tokenizer=tokenizer)
    bit.train(model, data, training, out, callbacks=[])
    return out


# Agreement with the clients


def agrees(figures, client):
    """The check that every export passes and every wrong one, below, fails."""
    same = figures["greedy_same"].split(" of ")
    close = abs(figures["perplexity_ratio"] - 1) < PERPLEXITY_WITHIN[client]
    return same[0] == same[1] and close and figures["max_delta_logit"] < LARGEST_DELTA


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_says_what_ours_says(ours, clients, windows, prompts, record_property, name):
    figures = compare(ours, clients[name], windows, prompts)
    print(name, figures)
    record_property("figures", figures)
    assert agrees(figures, CLIENTS[name]), figures


def mutate(exported, out, how):
    """The packed file `exported` with one convention changed, as a model to export."""
    from safetensors import safe_open

    tensors = load_file(exported.path)
    with safe_open(exported.path, framework="pt") as file:
        metadata = file.metadata()
    model, _ = bit.load_model(exported.path)
    for name, linear in model.bit_linears().items():
        scale = tensors[f"{name}.weight_scale"]
        if how == "scale inverted":
            tensors[f"{name}.weight_scale"] = 1 / scale
        elif how == "mean re-taken":
            tensors[f"{name}.weight_scale"] = scale * linear.trits.float().abs().mean()
        elif how == "q/k permuted" and name.endswith(("q_proj", "k_proj")):
            rows = linear.trits.view(-1, 2, 32, 256).transpose(1, 2).reshape(-1, 256)
            tensors[f"{name}.trits"] = packed._pack5(rows)
    save_file(tensors, out, metadata)
    return out


@pytest.mark.parametrize("how", ["scale inverted", "mean re-taken", "q/k permuted", "relu squared"])
@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_wrong_convention_is_seen(ours, exports, windows, prompts, tmp_path, how, to):
    if to == "gguf" and how == "relu squared":
        return  # a GGUF file cannot say it: llama.cpp knows SiLU only
    source = mutate(exports["float32"], tmp_path / "wrong.safetensors", how)
    if to == "hf":
        bit.export_hf(source, tmp_path / "out")
        if how == "relu squared":
            settings = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
            settings["hidden_act"] = "relu2"
            (tmp_path / "out" / "config.json").write_text(json.dumps(settings))
        client = Transformers(tmp_path / "out")
    else:
        client = LlamaCpp(bit.export_gguf(source, tmp_path / "out.gguf").path)
    figures = compare(ours, client, windows[:4], prompts[:1])
    assert not agrees(figures, type(client)), figures


def difficult_strings():
    rng = random.Random(0)
    parts = [
        "é",
        "e\u0301",
        "ß",
        "İ",
        "ﬁ",
        "½",
        "①",
        "٣",
        "中文",
        "日本語",
        "한국어",
        "שלום",
        "ไทย",
    ]
    parts += [
        "🐱",
        "👩‍🚀",
        "🇪🇸",
        "\u200b",
        "\ufeff",
        "\u00a0",
        "\u2028",
        "\u3000",
        "\x00",
        "\x7f",
        "\ufffd",
    ]
    parts += [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n", "\n ", "\t\t", "a ", " b"]
    parts += ["<|endoftext|>", "<|endof", "[PAD]", "<s>", "</s>", "<unk>", "[UNK]", "[PAD1]"]
    parts += [
        "def f(x):\n    return x",
        "if (a&&b) {",
        "x->y::z",
        "#include <a.h>",
        "λ=∑_{i}",
        "0x1F",
    ]
    parts += ["don't", "I'LL", "we've", "'s", "''", "“q”", "1,234.5", "3e-10", "2026", "a1b2", "½a"]
    parts += ["The", "word", "naïve", "ĠĊ", "Ø", "https://x.y/z?q=1", "snake_case", "camelCase"]
    strings = ["", *parts]
    strings += ["".join(rng.choices(parts, k=rng.randint(2, 12))) for _ in range(1400)]
    strings += [
        "".join(chr(random_char(rng)) for _ in range(rng.randint(1, 20))) for _ in range(600)
    ]
    return strings


def random_char(rng):
    """Any code point but a surrogate, small ones more often."""
    code = rng.randrange(rng.choice([128, 0x250, 0x3000, 0x10000, 0x110000]))
    return code if not 0xD800 <= code < 0xE000 else 0x20


@pytest.mark.parametrize("name", ["hf", "TQ2_0"])
def test_token_ids_are_the_same(ours, clients, name):
    strings = difficult_strings()
    assert len(strings) >= 2000
    wrong = [s for s in strings if ours.encode(s) != clients[name].encode(s)]
    assert not wrong


def test_sizes(exports):
    most = {"packed": 1.65, "int8": 1.65, "hf": 2.01, "TQ2_0": 2.07, "TQ1_0": 1.7}
    for name, bits in most.items():
        assert exports[name].bits_per_weight <= bits, name
        assert os.fspath(exports[name]) == str(exports[name].path)
    # the whole packed file: trits, embedding, norms, and a header with the tokenizer
    model, tokenizer = bit.load_model(exports["packed"])
    trits = sum(layer.trits.numel() for layer in model.bit_linears().values())
    rest = 2 * 512 * 256 + 4 * (2 * (4 * 256) + 256) + len(json.dumps(tokenizer.to_str()))
    assert exports["packed"].size < 1.65 * trits / 8 + rest + 8192
    assert exports["int8"].size < exports["packed"].size < exports["hf"].size


# And back


@pytest.mark.parametrize("name", ["float32", "hf", "dense"])
def test_what_comes_back_has_the_same_logits(ours, exports, windows, name):
    assert torch.equal(Ours(exports[name]).logits(windows), ours.logits(windows))


def test_a_rounded_embedding_changes_only_the_embedding(run, exports, windows):
    rounded, _ = bit.load_model(run)
    embedding = rounded.model.embed_tokens.weight
    exact = embedding.clone()
    embedding.copy_(exact.half())
    half, eighth = (bit.load_model(exports[name])[0] for name in ("packed", "int8"))
    with torch.no_grad():
        assert torch.equal(half(windows[:2]), rounded(windows[:2]))
    off = (eighth.model.embed_tokens.weight - exact).abs()
    assert (off <= exact.abs().amax(1, keepdim=True) / 127 * 0.5001).all()


@pytest.mark.parametrize("name", ["packed", "int8", "hf", "dense"])
def test_perplexity_of_what_comes_back(ours, exports, windows, name):
    """int8 keeps 8 bits of the embedding; it costs more than the 16 of the others."""
    figures = compare(ours, Ours(exports[name]), windows, [])
    assert abs(figures["perplexity_ratio"] - 1) < (1e-2 if name == "int8" else 1e-3)


def test_an_export_can_be_exported_again(exports, tmp_path):
    again = bit.export_gguf(exports["hf"], tmp_path / "again.gguf")
    first = bit.export_gguf(exports["float32"], tmp_path / "first.gguf", author="A. Author")
    assert again.size == pytest.approx(first.size, abs=256)  # the licence, which only one has
    back = bit.export_packed(exports["hf"], tmp_path / "m.safetensors", embedding="float32")
    assert load_file(back.path).keys() == load_file(exports["float32"].path).keys()


@pytest.mark.parametrize("shape", [(1, 1), (4, 5), (8, 3), (12, 256)])
def test_packing_is_undone_by_unpacking(shape):
    trits = torch.randint(-1, 2, shape, dtype=torch.int8)
    assert torch.equal(packed._unpack5(packed._pack5(trits), trits.shape), trits)
    if shape[0] % 4 == 0:
        from transformers.integrations.bitnet import pack_weights

        quarters = huggingface._pack4(trits)
        assert torch.equal(huggingface._unpack4(quarters), trits)
        assert torch.equal(quarters, pack_weights(trits.clone()))  # it changes what it is given


def test_a_checkpoint_can_be_chosen(run, tmp_path):
    for checkpoint in (75, "best", "last"):
        out = tmp_path / f"{checkpoint}.safetensors"
        made = bit.export_packed(run, out, checkpoint=checkpoint, embedding="float32")
        net, _ = bit.load_model(run, checkpoint)
        assert torch.equal(
            bit.load_model(made)[0](torch.arange(9)[None]), net(torch.arange(9)[None])
        )


def test_a_seed_checkpoint_becomes_a_packed_file_only(seed_script, tiny_corpus, tmp_path):
    tokenizer = bit.train_tokenizer([tiny_corpus.read_text("utf-8")], 300, kind="wordpiece")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    seed = seed_script.MiLLM(300, 64, 8, 128, 2, 32).eval()
    path = tmp_path / "mi_llm_checkpoint.pth"
    torch.save({"epoch": 0, "batch": 0, "model_state_dict": seed.state_dict()}, path)
    made = bit.export_packed(path, tmp_path / "m.safetensors", embedding="float32")
    model, back = bit.load_model(made)
    ids = torch.arange(24).view(1, 24)
    assert torch.equal(model(ids), bit.load_model(path)[0](ids))
    assert back.encode("cats sat").ids == tokenizer.encode("cats sat").ids
    for export, out in ((bit.export_hf, "hf"), (bit.export_gguf, "m.gguf")):
        with pytest.raises(ValueError, match=r"counterpart.*block=seed.*Export it as packed"):
            export(path, tmp_path / out)
        assert not (tmp_path / out).exists()


# What cannot be, and what must not happen


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
def test_what_a_format_cannot_hold_is_said(tmp_path, tiny_corpus, changes, packed, hf, gguf):
    source = train_tiny(tmp_path / "run", tiny_corpus, **changes)
    exports = [
        (bit.export_packed, "m.safetensors", packed),
        (bit.export_hf, "hf", hf),
        (bit.export_gguf, "m.gguf", gguf),
    ]
    for export, name, wanted in exports:
        if wanted is True:
            assert export(source, tmp_path / name).size > 0
        else:
            with pytest.raises(ValueError, match=wanted):
                export(source, tmp_path / name)
            assert not (tmp_path / name).exists()


def test_other_widths_go_to_llama_cpp_in_16_bits(tiny_run, tmp_path):
    ours, client = (
        Ours(tiny_run),
        LlamaCpp(bit.export_gguf(tiny_run, tmp_path / "m.gguf", kind="F16")),
    )
    windows = torch.arange(60).view(4, 15)
    figures = compare(ours, client, windows, [])
    assert abs(figures["perplexity_ratio"] - 1) < PERPLEXITY_WITHIN[LlamaCpp]


def test_rows_without_a_token(tmp_path, tiny_corpus):
    """A small text gives fewer tokens than asked for; the clients must not write the others."""
    source = train_tiny(tmp_path / "run", tiny_corpus, vocab_size=2000)
    size = bit.load_tokenizer(source / "tokenizer.json").get_vocab_size()
    assert size < 2000
    bit.export_hf(source, tmp_path / "hf")
    client = Transformers(tmp_path / "hf")
    assert client.model.generation_config.suppress_tokens == list(range(size, 2000))
    assert LlamaCpp(bit.export_gguf(source, tmp_path / "m.gguf", kind="F16")).greedy([1], 3)


@pytest.mark.parametrize("to", ["hf", "gguf", "packed"])
def test_an_interrupted_export_leaves_nothing_and_harms_nothing(
    tiny_run, tmp_path, monkeypatch, to
):
    name = {"hf": "out", "gguf": "out.gguf", "packed": "out.safetensors"}[to]
    options = {"kind": "F16"} if to == "gguf" else {}
    export = {"hf": bit.export_hf, "gguf": bit.export_gguf, "packed": bit.export_packed}[to]

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


def test_a_killed_export_is_cleared_away_by_the_next(tiny_run, tmp_path):
    code = (
        "import os, sys, bitllm_core as bit; os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "bit.export_hf(sys.argv[1], sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tiny_run), str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode != 0
    assert not (tmp_path / "out").exists()
    assert any(tmp_path.iterdir())
    bit.export_hf(tiny_run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_an_export_is_overwritten(tiny_run, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    for out in (mine, tiny_run):
        with pytest.raises(ValueError, match="not an exported folder"):
            bit.export_hf(tiny_run, out, overwrite=True)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ValueError, match="not a file"):
        bit.export_gguf(tiny_run, tmp_path / "folder.gguf", kind="F16", overwrite=True)
    assert (mine / "letter.txt").read_text() == "dear"


def test_what_was_asked_is_checked_first(tiny_run, tmp_path):
    with pytest.raises(ValueError, match=r"kind='Q4_0': expected one of TQ2_0, TQ1_0, F16"):
        bit.export_gguf(tiny_run, tmp_path / "m.gguf", kind="Q4_0")
    with pytest.raises(ValueError, match="embedding='float64'"):
        bit.export_packed(tiny_run, tmp_path / "m.safetensors", embedding="float64")
    with pytest.raises(ValueError, match=r"ends in \.gguf"):
        bit.export_gguf(tiny_run, tmp_path / "m.bin")
    with pytest.raises(ValueError, match="credits='autor'"):
        bit.export_hf(tiny_run, tmp_path / "hf", autor="me")
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        bit.export_hf(tmp_path / "nowhere", tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tiny_run, tmp_path, monkeypatch):
    for package in ("gguf", "xllamacpp"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install gguf"):
        bit.export_gguf(tiny_run, tmp_path / "m.gguf")
    with pytest.raises(ImportError, match="pip install xllamacpp"):
        next(bit.llama_cpp_stream(tmp_path / "m.gguf", "x"))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads and resets the peak in /proc")
def test_memory_does_not_grow_with_the_export(tmp_path):
    """A dense export of some 90 MB takes the room of a few tensors (2 MB each), not of the file."""
    code = """if True:
        import pathlib, sys, bitllm_core as bit
        from bitllm.export import common, huggingface
        config = bit.ModelConfig(300, 512, 1024, 8, 8)
        net = bit.BitLM(config).freeze()
        entries = huggingface._hf_entries(net, dense=True)
        proc = pathlib.Path("/proc/self")
        peak = lambda: int((proc / "status").read_text().split("VmHWM:")[1].split()[0])
        (proc / "clear_refs").write_text("5")
        before = peak()
        path = pathlib.Path(sys.argv[1])
        common._write_safetensors(path, entries, {})
        print((peak() - before) / 1024, path.stat().st_size / 2**20)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "m.safetensors")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    grown, written = map(float, result.stdout.split())
    assert written > 60
    assert grown < written / 3


# Files from strangers


def rewrite(path, out, change):
    """The packed file with `change(header, body)` applied to its JSON header and its data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    change(header, body)
    head = json.dumps(header).encode()
    out.write_bytes(len(head).to_bytes(8, "little") + head + body)
    return out


def set_config(header, **changes):
    config = json.loads(header["__metadata__"]["config"])
    header["__metadata__"]["config"] = json.dumps({**config, **changes})


HOSTILE = {
    "at most 1,024": lambda h, b: set_config(h, num_hidden_layers=10**12),
    "at most 1,048,576": lambda h, b: set_config(h, max_position_embeddings=10**15),
    "is F16": lambda h, b: set_config(h, vocab_size=10**7),
    "is missing": lambda h, b: set_config(h, tie_word_embeddings=False),
    "expected int": lambda h, b: set_config(h, hidden_size="x"),
    "at most 65,536": lambda h, b: set_config(h, hidden_size=2**62),
    "metadata ": lambda h, b: h["__metadata__"].pop("tokenizer"),
    "metadata  ": lambda h, b: h["__metadata__"].update(tokenizer="{}"),
    "format 99": lambda h, b: h["__metadata__"].update(format_version="99"),
    "not five trits": lambda h, b: b.__setitem__(slice(len(b) - 64, len(b)), b"\xff" * 64),
    "not a safetensors file": lambda h, b: b.__delitem__(slice(0, 100)),
}


@pytest.mark.parametrize("says", HOSTILE)
def test_a_hostile_packed_file_is_only_data(tiny_run, tmp_path, says):
    good = bit.export_packed(tiny_run, tmp_path / "good.safetensors")
    path = rewrite(good.path, tmp_path / "bad.safetensors", HOSTILE[says])
    with pytest.raises(ValueError, match=says.strip()):
        bit.load_model(path)


def test_a_pickle_under_our_name_is_not_executed(tmp_path):
    torch.save(Payload(tmp_path / "executed"), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        bit.load_model(tmp_path / "m.safetensors")
    assert not (tmp_path / "executed").exists()


def test_a_hostile_folder_is_only_data(tiny_run, tmp_path):
    folder = tmp_path / "hf"
    bit.export_hf(tiny_run, folder)
    settings = json.loads((folder / "config.json").read_text("utf-8"))

    def with_settings(**changes):
        (folder / "config.json").write_text(json.dumps({**settings, **changes}))

    for changes, says in [
        ({"hidden_act": "relu2"}, "hidden_act='relu2', expected 'silu'"),
        ({"model_type": "llama"}, "only folders that this program exported"),
        ({"vocab_size": 10**7}, "is F32"),
        ({"num_hidden_layers": 10**9}, "at most 1,024"),
        ({"hidden_size": None}, "config.json"),
    ]:
        with_settings(**changes)
        with pytest.raises(ValueError, match=says):
            bit.load_model(folder)
    with_settings()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].fill_(255)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not ternary"):
        bit.load_model(folder)


# What is told of the model


def test_the_card_and_the_metadata_tell_where_it_comes_from(exports):
    card = (exports["hf"].path / "README.md").read_text("utf-8")
    for told in (
        'license: "mit"',
        "A. Author",
        "pydocs",
        "PSF-2.0",
        "| 150 |",
        "perplexity",
        "153,600",
    ):
        assert told in card
    from gguf import GGUFReader

    reader = GGUFReader(exports["TQ2_0"].path)
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert told["general.architecture"] == "bitnet"
    assert told["general.file_type"] == 37
    assert told["general.author"] == "A. Author"
    assert "pydocs (PSF-2.0)" in told["general.description"]
    assert len(told["tokenizer.ggml.tokens"]) == 512
    scales = [t for t in reader.tensors if t.name.endswith(".scale")]
    assert len(scales) == 14


def test_no_path_of_this_machine_is_told(tiny_run, tiny_corpus, tmp_path):
    bit.export_hf(tiny_run, tmp_path / "hf")
    for file in (tmp_path / "hf").iterdir():
        assert str(tiny_corpus.parent).encode() not in file.read_bytes(), file


# The command line, llama.cpp in this process, and the hub


def test_the_command_line_exports_and_uses_what_it_exported(run, run_cli, tmp_path):
    out = tmp_path / "a model.gguf"
    made = run_cli("export", "--model", run, "--to", "gguf", "--out", out)
    assert made.returncode == 0, made.stderr
    for told in ("2.06", "llama-completion", "--temp 0.8", f"PARAMETER stop {bit.END_OF_TEXT}"):
        assert told in made.stdout
    again = run_cli("export", "--model", run, "--to", "gguf", "--out", out)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    flags = ("--prompt", "The ", "--temperature", 0, "--max-new-tokens", 20)
    text = run_cli("generate", "--model", out, *flags)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("The ")
    assert len(text.stdout) > 12
    refused = run_cli("evaluate", "--model", out, "--data", "pydocs")
    assert refused.returncode == 2
    assert "runs in llama.cpp" in refused.stderr


def test_every_format_is_exported_and_read_by_the_command_line(
    tiny_run, tiny_corpus, tmp_path, capsys
):
    made = []
    for to, out, flags in [
        ("packed", "m.safetensors", ["--embedding", "int8"]),
        ("hf", "hf", ["--dense", "--author", "me"]),
        ("hf", "hf", ["--overwrite", "--checkpoint", "2"]),
    ]:
        arguments = ["export", "--model", str(tiny_run), "--to", to, "--out", str(tmp_path / out)]
        assert bit.main([*arguments, *flags]) == 0
        assert "bits per ternary weight" in capsys.readouterr().out
        assert (
            bit.main(["evaluate", "--model", str(tmp_path / out), "--data", str(tiny_corpus)]) == 0
        )
        made.append(json.loads(capsys.readouterr().out)["loss"])
    assert max(made) - min(made) < 0.01
    arguments = ["export", "--model", str(tiny_run), "--to", "hf", "--out", str(tmp_path / "x")]
    assert bit.main([*arguments, "--gguf-type", "F16"]) == 2
    assert "to='hf': expected gguf" in capsys.readouterr().err


def test_llama_cpp_streams_the_greedy_text(ours, exports, prompts):
    prompt = ours.tokenizer.decode(prompts[-1])
    sampling = bit.SamplingConfig(temperature=0, max_new_tokens=24)
    pieces = list(bit.llama_cpp_stream(exports["TQ2_0"], prompt, sampling))
    assert len(pieces) > 8
    assert "".join(pieces) == "".join(bit.stream(ours.model, ours.tokenizer, prompt, sampling))


def test_llama_cpp_draws_with_a_seed_and_stops_when_told(exports, tmp_path):
    def texts(count, **options):
        stream = bit.llama_cpp_stream(exports["TQ2_0"], "", bit.SamplingConfig(**options))
        return [text for text, _ in zip(stream, range(count), strict=False)]

    assert texts(20, seed=1) == texts(20, seed=1) != texts(20, seed=2)
    assert texts(20, max_new_tokens=0) == []
    assert len(texts(400, seed=1, max_new_tokens=300)) > 150  # beyond the context of 64
    with pytest.raises(ValueError, match="context"):
        list(bit.llama_cpp_stream(exports["TQ2_0"], "x y " * 300))
    with pytest.raises(ValueError, match="does not load"):
        list(bit.llama_cpp_stream(exports["packed"], "x"))
    with pytest.raises(FileNotFoundError, match="expected a GGUF file"):
        list(bit.llama_cpp_stream(tmp_path / "none.gguf", "x"))


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as an upload asks for; keeps what it is sent."""

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        base, path = f"http://127.0.0.1:{self.server.server_port}", self.path.split("?")[0]
        given = json.loads(body) if body[:1] == b"{" and "/commit/" not in path else {}
        answer = {}
        if path == "/api/repos/create":
            answer = {"url": f"{base}/me/model", "name": "me/model", "id": "1"}
        elif "/preupload/" in path:
            mode = {True: "lfs", False: "regular"}
            files = [(f["path"], f["path"].endswith("model.safetensors")) for f in given["files"]]
            answer = {
                "files": [
                    {"path": p, "uploadMode": mode[large], "shouldIgnore": False, "oid": None}
                    for p, large in files
                ]
            }
        elif path.endswith("/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{base}/put"}}} for o in given["objects"]
            ]
            answer = {"transfer": "basic", "objects": objects}
        elif "/commit/" in path:
            answer = {"commitUrl": f"{base}/me/model/commit/1", "commitOid": "1", "hookOutput": ""}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_):
        pass


def test_an_export_is_uploaded_and_the_token_stays_secret(tiny_run, run_cli, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.requests = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_TOKEN": "hf_not_to_be_seen",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        command = ("export", "--model", tiny_run, "--to", "hf", "--out", tmp_path / "hf")
        result = run_cli(*command, "--push-to-hub", "me/model", env=environment)
        server.shutdown()
    assert result.returncode == 0, result.stderr
    assert "uploaded: http://127.0.0.1" in result.stdout
    asked = {path.split("?")[0]: (token, body) for path, token, body in server.requests}
    assert asked["/api/models/me/model/commit/main"][0] == "Bearer hf_not_to_be_seen"
    assert json.loads(asked["/api/repos/create"][1])["visibility"] == "private"
    assert asked["/put"][1] == (tmp_path / "hf" / "model.safetensors").read_bytes()
    commit = asked["/api/models/me/model/commit/main"][1].decode()
    for file in (tmp_path / "hf").iterdir():
        assert file.name in commit
    assert "hf_not_to_be_seen" not in result.stdout + result.stderr
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"hf_not_to_be_seen" not in file.read_bytes()


def test_an_upload_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="repo_id='model': expected OWNER/NAME"):
        bit.push_to_hub(tmp_path, "model")
    with pytest.raises(FileNotFoundError, match="export first"):
        bit.push_to_hub(tmp_path / "none", "me/model")
