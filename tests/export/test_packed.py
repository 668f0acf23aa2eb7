"""The packed file: small, the same model when it is read back, and only data whatever it holds."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitllm_core as bit
from bitllm.export import export_gguf, export_hf, export_packed, read_exported
from bitllm.export.packed import pack5, unpack5
from tests.conftest import Payload
from tests.export.helpers import CLIENT_WARNINGS, rewrite
from tools.export_parity import Ours, compare

pytestmark = CLIENT_WARNINGS


@pytest.mark.parametrize("shape", [(1, 1), (4, 5), (8, 3), (12, 256)])
def test_packing_is_undone_by_unpacking(shape):
    trits = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = pack5(trits)
    assert len(packed) == -(-trits.numel() // 5)
    assert torch.equal(unpack5(packed, trits.shape), trits)


def test_names_types_and_shapes_stay(tiny_run, tmp_path):
    """Other programs and older versions of this one read the file by these."""
    made = export_packed(tiny_run, tmp_path / "m.safetensors", embedding="int8")
    found = {name: (str(x.dtype), tuple(x.shape)) for name, x in load_file(made.path).items()}
    layer, width, inner = "model.layers.0", 64, 96
    sizes = {f"self_attn.{x}_proj": width * width for x in "qkvo"}
    sizes |= {f"mlp.{x}_proj": width * inner for x in ("gate", "up", "down")}
    expected = {}
    for name, size in sizes.items():
        expected[f"{layer}.{name}.trits"] = ("torch.uint8", (-(-size // 5),))
        expected[f"{layer}.{name}.weight_scale"] = ("torch.float32", ())
    for name in ("input_layernorm", "self_attn.attn_sub_norm", "post_attention_layernorm"):
        expected[f"{layer}.{name}.weight"] = ("torch.float32", (width,))
    expected[f"{layer}.mlp.ffn_sub_norm.weight"] = ("torch.float32", (inner,))
    expected["model.norm.weight"] = ("torch.float32", (width,))
    expected["model.embed_tokens.weight"] = ("torch.int8", (300, width))
    expected["model.embed_tokens.weight_scale"] = ("torch.float32", (300, 1))
    assert found == expected


def test_the_file_takes_little_more_than_its_trits_and_embedding(exports):
    model, tokenizer = bit.load_model(exports["packed"])
    trits = sum(layer.trits.numel() for layer in model.bit_linears().values())
    embedding, norms = 2 * 512 * 256, 4 * (2 * (4 * 256) + 256)
    rest = embedding + norms + len(json.dumps(tokenizer.to_str()))
    assert exports["packed"].size < 1.65 * trits / 8 + rest + 8192


# Reading back


def test_what_comes_back_has_the_same_logits(ours, exports, windows):
    assert torch.equal(Ours(exports["float32"]).logits(windows), ours.logits(windows))


def test_read_exported_returns_what_is_known(exports):
    model, tokenizer, facts = read_exported(exports["packed"])
    assert model.bit_linears()
    assert tokenizer.get_vocab_size() == 512
    assert facts["data"] == "pydocs"
    assert facts["steps"] == 150
    assert facts["tokens"] == 150 * 1024
    assert 0 < facts["val_loss"] < 4.5


def test_a_rounded_embedding_changes_only_the_embedding(run, exports, windows):
    rounded, _ = bit.load_model(run)
    embedding = rounded.model.embed_tokens.weight
    exact = embedding.clone()
    embedding.copy_(exact.half())
    half, eighth = (bit.load_model(exports[name])[0] for name in ("packed", "int8"))
    with torch.no_grad():
        assert torch.equal(half(windows[:2]), rounded(windows[:2]))
    off = (eighth.model.embed_tokens.weight - exact).abs()
    # half a step; a value in the middle may fall to either side, by float32's rounding
    assert (off <= exact.abs().amax(1, keepdim=True) / 127 * 0.5001).all()


@pytest.mark.parametrize("name", ["packed", "int8"])
def test_perplexity_of_what_comes_back(ours, exports, windows, name, record_property):
    """int8 keeps 8 bits of the embedding; it costs more than 16 bits."""
    figures = compare(ours, Ours(exports[name]), windows, [])
    record_property("figures", figures)
    print(name, figures)
    assert abs(figures["perplexity_ratio"] - 1) < (1e-2 if name == "int8" else 1e-3)


def test_a_seed_checkpoint_becomes_a_packed_file_only(seed_script, tiny_corpus, tmp_path):
    tokenizer = bit.train_tokenizer([tiny_corpus.read_text("utf-8")], 300, kind="wordpiece")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    seed = seed_script.MiLLM(300, 64, 8, 128, 2, 32).eval()
    path = tmp_path / "mi_llm_checkpoint.pth"
    torch.save({"epoch": 0, "batch": 0, "model_state_dict": seed.state_dict()}, path)
    made = export_packed(path, tmp_path / "m.safetensors", embedding="float32")
    model, back = bit.load_model(made)
    ids = torch.arange(24).view(1, 24)
    assert torch.equal(model(ids), bit.load_model(path)[0](ids))
    assert back.encode("cats sat").ids == tokenizer.encode("cats sat").ids
    for export, out in ((export_hf, "hf"), (export_gguf, "m.gguf")):
        with pytest.raises(ValueError, match=r"counterpart.*block=seed.*Export it as packed"):
            export(path, tmp_path / out)
        assert not (tmp_path / out).exists()


# Files from unknown sources


def set_config(header, **changes):
    config = json.loads(header["__metadata__"]["config"])
    header["__metadata__"]["config"] = json.dumps({**config, **changes})


HOSTILE = {
    "at most 1,024": lambda h, b: set_config(h, num_hidden_layers=10**12),
    "at most 1,048,576": lambda h, b: set_config(h, max_position_embeddings=10**15),
    "is F16": lambda h, b: set_config(h, vocab_size=10**7),
    "but only 20 tensors": lambda h, b: set_config(h, num_hidden_layers=1000),
    "is missing": lambda h, b: set_config(h, tie_word_embeddings=False),
    "not ternary": lambda h, b: set_config(h, linear="dense"),
    "expected int": lambda h, b: set_config(h, hidden_size="x"),
    "at most 65,536": lambda h, b: set_config(h, hidden_size=2**62),
    "not a JSON object": lambda h, b: h["__metadata__"].update(config="[1]"),
    "metadata ": lambda h, b: h["__metadata__"].pop("tokenizer"),
    "metadata  ": lambda h, b: h["__metadata__"].update(tokenizer="{}"),
    "metadata   ": lambda h, b: h["__metadata__"].update(config="[" * 100_000),
    "format 99": lambda h, b: h["__metadata__"].update(format_version="99"),
    "not five trits": lambda h, b: b.__setitem__(slice(len(b) - 64, len(b)), b"\xff" * 64),
    "not a safetensors file": lambda h, b: b.__delitem__(slice(0, 100)),
}


@pytest.mark.parametrize("message", HOSTILE)
def test_a_hostile_packed_file_is_refused(tiny_run, tmp_path, message):
    good = export_packed(tiny_run, tmp_path / "good.safetensors")
    path = rewrite(good.path, tmp_path / "bad.safetensors", HOSTILE[message])
    with pytest.raises(ValueError, match=message.strip()):
        bit.load_model(path)


@pytest.mark.parametrize("change", ["missing", "unknown", "other type", "other shape"])
def test_a_tensor_that_is_not_as_expected_is_named(tiny_run, tmp_path, change):
    from safetensors import safe_open

    good = export_packed(tiny_run, tmp_path / "good.safetensors")
    tensors, name = load_file(good.path), "model.layers.0.mlp.up_proj.trits"
    with safe_open(good.path, framework="pt") as file:
        metadata = file.metadata()
    if change == "missing":
        tensors.pop(name)
    elif change == "unknown":
        name = "model.layers.7.extra"
        tensors[name] = torch.zeros(1)
    elif change == "other type":
        tensors[name] = tensors[name].to(torch.int8)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    wanted = change if change in ("missing", "unknown") else "expected U8"
    with pytest.raises(ValueError, match=rf"tensor {name} is .*{wanted}"):
        bit.load_model(tmp_path / "bad.safetensors")


def test_sizes_are_checked_before_memory_is_taken(tiny_run, tmp_path, monkeypatch):
    def set_memory_aside(*_, **__):
        raise AssertionError("a model was made")

    good = export_packed(tiny_run, tmp_path / "good.safetensors")
    path = rewrite(good.path, tmp_path / "bad.safetensors", HOSTILE["is F16"])
    monkeypatch.setattr("bitllm.export.packed.fill_model", set_memory_aside)
    with pytest.raises(ValueError, match="is F16"):
        read_exported(path)
    with pytest.raises(AssertionError, match="a model was made"):
        read_exported(good)


def test_facts_of_any_shape_do_no_harm(tiny_run, tmp_path):
    good = export_packed(tiny_run, tmp_path / "good.safetensors")
    for facts in ("[]", "null", '{"data": ["x"], "licence": {}}'):
        path = rewrite(
            good.path,
            tmp_path / "odd.safetensors",
            lambda h, b, facts=facts: h["__metadata__"].update(facts=facts),
        )
        assert isinstance(read_exported(path)[2], dict)
        export_hf(path, tmp_path / "hf", overwrite=True)


def test_a_pickle_under_our_name_is_not_executed(tmp_path):
    torch.save(Payload(tmp_path / "executed"), tmp_path / "m.safetensors")
    (tmp_path / "empty.safetensors").touch()
    for name in ("m.safetensors", "empty.safetensors"):
        with pytest.raises(ValueError, match="not a safetensors file"):
            bit.load_model(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_something_else_is_no_export(tmp_path, run):
    for path in (run, tmp_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="expected a packed file or a folder"):
            read_exported(path)
