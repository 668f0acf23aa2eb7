"""The Hugging Face folder: transformers computes what we compute, and the folder reads back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitllm_core as bit
from bitllm.export import export_gguf, export_hf, export_packed
from bitllm.export.huggingface import pack4, unpack4
from tests.export.difficult import difficult_strings
from tests.export.helpers import CLIENT_WARNINGS, GREEDY_TOKENS, agrees, mutate, train_tiny
from tools.export_parity import Ours, Transformers, compare

pytestmark = CLIENT_WARNINGS


@pytest.fixture(scope="module")
def clients(exports):
    return {name: Transformers(exports[name].path) for name in ("hf", "dense")}


@pytest.mark.parametrize("name", ["hf", "dense"])
def test_transformers_computes_what_we_compute(
    ours, clients, windows, prompts, record_property, name
):
    figures = compare(ours, clients[name], windows, prompts, GREEDY_TOKENS)
    print(name, figures)
    record_property("figures", figures)
    assert agrees(figures, Transformers), figures


@pytest.mark.parametrize("how", ["scale inverted", "mean re-taken", "q/k permuted", "relu squared"])
def test_a_wrong_convention_is_noticed(ours, exports, windows, prompts, tmp_path, how):
    source = mutate(exports["float32"], tmp_path / "wrong.safetensors", how)
    export_hf(source, tmp_path / "out")
    if how == "relu squared":
        change_config(tmp_path / "out", hidden_act="relu2")
    figures = compare(ours, Transformers(tmp_path / "out"), windows[:4], prompts[:1], GREEDY_TOKENS)
    assert not agrees(figures, Transformers), figures


def change_config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**settings, **changes}), encoding="utf-8")


def test_token_ids_are_the_same(ours, clients):
    strings = difficult_strings()
    assert len(strings) >= 2000
    assert not [s for s in strings if ours.encode(s) != clients["hf"].encode(s)]


def test_rows_without_a_token_are_not_generated(tmp_path, tiny_corpus):
    """A small text gives fewer tokens than asked for."""
    source = train_tiny(tmp_path / "run", tiny_corpus, vocab_size=2000)
    size = bit.load_tokenizer(source / "tokenizer.json").get_vocab_size()
    assert size < 2000
    export_hf(source, tmp_path / "hf")
    client = Transformers(tmp_path / "hf")
    assert client.model.generation_config.suppress_tokens == list(range(size, 2000))


@pytest.mark.parametrize("shape", [(4, 5), (8, 3), (12, 256)])
def test_packing_is_transformers_own(shape):
    from transformers.integrations.bitnet import pack_weights

    trits = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = pack4(trits)
    assert torch.equal(unpack4(packed), trits)
    assert torch.equal(packed, pack_weights(trits.clone()))  # it changes what it is given


def test_names_types_and_shapes_stay(tiny_run, tmp_path):
    export_hf(tiny_run, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for name, (rows, columns) in {"self_attn.q": (64, 64), "mlp.up": (96, 64)}.items():
        weight = found[f"model.layers.0.{name}_proj.weight"]
        scale = found[f"model.layers.0.{name}_proj.weight_scale"]
        assert (weight.dtype, tuple(weight.shape)) == (torch.uint8, (rows // 4, columns))
        assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (1,))
    floats = [x for name, x in found.items() if not name.endswith("_proj.weight")]
    assert {x.dtype for x in floats} == {torch.float32}
    assert len(found) == 7 * 2 + 4 + 2
    export_hf(tiny_run, tmp_path / "dense", dense=True)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert {x.dtype for x in dense.values()} == {torch.float32}
    assert dense["model.layers.0.mlp.up_proj.weight"].shape == (96, 64)
    assert len(dense) == 7 + 4 + 2


# Reading back


@pytest.mark.parametrize("name", ["hf", "dense"])
def test_what_comes_back_has_the_same_logits(ours, exports, windows, name):
    assert torch.equal(Ours(exports[name]).logits(windows), ours.logits(windows))


def test_an_export_can_be_exported_again(exports, tmp_path):
    again = export_gguf(exports["hf"], tmp_path / "again.gguf")
    first = export_gguf(exports["float32"], tmp_path / "first.gguf", author="A. Author")
    assert again.size == pytest.approx(first.size, abs=256)  # the licence, which only one has
    back = export_packed(exports["hf"], tmp_path / "m.safetensors", embedding="float32")
    a, b = load_file(back.path), load_file(exports["float32"].path)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu2"}, "hidden_act='relu2', expected 'silu'"),
        ({"model_type": "llama"}, "only folders that this program exported"),
        ({"vocab_size": 10**7}, "is F32"),
        ({"num_hidden_layers": 10**9}, "at most 1,024"),
        ({"num_hidden_layers": 1000}, "tensors"),
        ({"hidden_size": None}, "config.json"),
        ({"intermediate_size": 97}, "multiples of 4"),
        ({"linear": "dense"}, "counterpart"),
        ({"vocab_size": 257}, "token ids up to"),
    ],
    ids=str,
)
def test_a_hostile_folder_is_refused(tiny_run, tmp_path, changes, message):
    export_hf(tiny_run, tmp_path / "hf")
    change_config(tmp_path / "hf", **changes)
    with pytest.raises(ValueError, match=message):
        bit.load_model(tmp_path / "hf")


@pytest.mark.parametrize("dense", [False, True])
def test_hostile_weights_are_refused(tiny_run, tmp_path, dense):
    file = tmp_path / "hf" / "model.safetensors"
    export_hf(tiny_run, tmp_path / "hf", dense=dense)
    weights, name = load_file(file), "model.layers.0.mlp.up_proj.weight"
    weights[name][0, 0] = 0.123 if dense else 255
    save_file(weights, file)
    with pytest.raises(ValueError, match="not trits times one scale" if dense else "not ternary"):
        bit.load_model(tmp_path / "hf")
    weights.pop(name)
    save_file(weights, file)
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        bit.load_model(tmp_path / "hf")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="expected the weights"):
        bit.load_model(tmp_path / "hf")


# The model card


def test_the_card_states_where_the_model_comes_from(exports):
    card = (exports["hf"].path / "README.md").read_text("utf-8")
    facts = ('license: "mit"', "A. Author", "pydocs", "PSF-2.0", "| 150 |", "153,600")
    commands = ("bitllm generate --model", "bitllm export --model . --to gguf")
    for text in (*facts, *commands, "perplexity", "C++ compiler"):
        assert text in card
    assert "C++ compiler" not in (exports["dense"].path / "README.md").read_text("utf-8")


def test_no_path_of_this_machine_is_published(tiny_run, tiny_corpus, tmp_path):
    export_hf(tiny_run, tmp_path / "hf")
    for file in (tmp_path / "hf").iterdir():
        assert str(tiny_corpus.parent).encode() not in file.read_bytes(), file
