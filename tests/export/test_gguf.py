"""The GGUF file: llama.cpp computes what we compute, and generates text through this program."""

import struct

import pytest
import torch

import bitllm_core as bit
from bitllm.export import export_gguf, llama_cpp_stream
from bitllm.export.gguf import pack_q2_0
from tests.export.difficult import difficult_strings
from tests.export.helpers import (
    CLIENT_WARNINGS,
    GREEDY_TOKENS,
    PERPLEXITY_WITHIN,
    agrees,
    mutate,
    train_tiny,
)
from tools.export_parity import LlamaCpp, Ours, compare

pytestmark = CLIENT_WARNINGS


@pytest.fixture(scope="module")
def clients(exports):
    return {name: LlamaCpp(exports[name].path) for name in ("TQ2_0", "TQ1_0", "Q2_0")}


@pytest.mark.parametrize("name", ["TQ2_0", "TQ1_0", "Q2_0"])
def test_llama_cpp_computes_what_we_compute(ours, clients, windows, prompts, record_property, name):
    figures = compare(ours, clients[name], windows, prompts, GREEDY_TOKENS)
    print(name, figures)
    record_property("figures", figures)
    assert agrees(figures, LlamaCpp), figures


@pytest.mark.parametrize("how", ["scale inverted", "mean re-taken", "q/k permuted"])
def test_a_wrong_convention_is_noticed(ours, exports, windows, prompts, tmp_path, how):
    source = mutate(exports["float32"], tmp_path / "wrong.safetensors", how)
    client = LlamaCpp(export_gguf(source, tmp_path / "out.gguf").path)
    figures = compare(ours, client, windows[:4], prompts[:1], GREEDY_TOKENS)
    assert not agrees(figures, LlamaCpp), figures


def test_token_ids_are_the_same(ours, clients):
    strings = difficult_strings()
    assert not [s for s in strings if ours.encode(s) != clients["TQ2_0"].encode(s)]


def test_other_widths_go_to_llama_cpp_in_16_bits(tiny_run, tmp_path):
    exported = export_gguf(tiny_run, tmp_path / "m.gguf", kind="F16")
    figures = compare(Ours(tiny_run), LlamaCpp(exported), torch.arange(60).view(4, 15), [])
    assert abs(figures["perplexity_ratio"] - 1) < PERPLEXITY_WITHIN[LlamaCpp]


def test_narrow_models_have_blocks_of_64(tiny_run, tmp_path, tiny_corpus):
    with pytest.raises(
        ValueError, match="Q2_0's blocks need intermediate_size to be a multiple of 64"
    ):
        export_gguf(tiny_run, tmp_path / "m.gguf", kind="Q2_0")
    source = train_tiny(tmp_path / "run", tiny_corpus, intermediate_size=192)
    client = LlamaCpp(export_gguf(source, tmp_path / "m.gguf", kind="Q2_0"))
    figures = compare(Ours(source), client, torch.arange(60).view(4, 15), [])
    assert abs(figures["perplexity_ratio"] - 1) < PERPLEXITY_WITHIN[LlamaCpp]


def dequantize_q2_0(block):
    """As `dequantize_row_q2_0` of llama.cpp's ggml-quants.c, one block of 18 bytes."""
    d, qs = struct.unpack("<e", block[:2])[0], block[2:]
    return [((qs[j // 4] >> (2 * (j % 4)) & 3) - 1) * d for j in range(64)]


def test_trits_are_exact_in_blocks_of_64():
    """gguf 0.19 does not know the type, so that its reader cannot compare them."""
    trits = torch.randint(-1, 2, (3, 128), dtype=torch.int8)
    packed = pack_q2_0(trits.numpy())
    found = [dequantize_q2_0(block.tobytes()) for block in packed.reshape(-1, 18)]
    assert torch.equal(torch.tensor(found).view(3, 128), trits.float())


def test_rows_without_a_token_load(tmp_path, tiny_corpus):
    """A small text gives fewer tokens than asked for."""
    source = train_tiny(tmp_path / "run", tiny_corpus, vocab_size=2000)
    assert LlamaCpp(export_gguf(source, tmp_path / "m.gguf", kind="F16")).greedy([1], 3)


def test_the_metadata_state_where_the_model_comes_from(exports):
    from gguf import GGUFReader

    reader = GGUFReader(exports["TQ2_0"].path)
    found = {name: field.contents() for name, field in reader.fields.items()}
    assert found["general.architecture"] == "bitnet"
    assert found["general.file_type"] == 37
    assert found["general.author"] == "A. Author"
    assert "pydocs (PSF-2.0)" in found["general.description"]
    assert len(found["tokenizer.ggml.tokens"]) == 512
    scales = [t for t in reader.tensors if t.name.endswith(".scale")]
    assert len(scales) == 14


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "F16"])
def test_every_tensor_is_there_and_exact(run, exports, kind):
    from gguf import GGUFReader, dequantize

    model, _ = bit.load_model(run)
    expected = {"token_embd.weight": model.model.embed_tokens.weight.half()}
    matrices = {f"{x}_proj": f"attn_{x}" for x in "qkv"} | {"o_proj": "attn_output"}
    matrices |= {f"{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for name, linear in model.bit_linears().items():
        _, _, layer, _, matrix = name.split(".")
        expected[f"blk.{layer}.{matrices[matrix]}.weight"] = linear.trits
        expected[f"blk.{layer}.{matrices[matrix]}.scale"] = linear.weight_scale.view(1)
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, value in model.named_parameters():
        if "norm" in name and "layers" in name:
            place = name.split(".")
            expected[f"blk.{place[2]}.{norms.get(place[-2], place[-2])}.weight"] = value
    expected["output_norm.weight"] = model.model.norm.weight
    found = {
        t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(exports[kind].path).tensors
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.tensor(found[name]), value.detach().float()), name


# Generating with llama.cpp in this process


def test_the_command_line_exports_and_generates(run, run_cli, tmp_path):
    out = tmp_path / "a model.gguf"
    made = run_cli("export", "--model", run, "--to", "gguf", "--out", out)
    assert made.returncode == 0, made.stderr
    for text in ("2.06", "llama-completion", "builds before", "--temp 0.8", "a model.Modelfile"):
        assert text in made.stdout
    modelfile = out.with_suffix(".Modelfile").read_text()
    assert f"PARAMETER stop {bit.END_OF_TEXT}" in modelfile
    again = run_cli("export", "--model", run, "--to", "gguf", "--out", out)
    assert again.returncode == 2
    assert "exists already; choose another path, or give --overwrite" in again.stderr
    flags = ("--prompt", "The ", "--temperature", 0, "--max-new-tokens", 20)
    text = run_cli("generate", "--model", out, *flags)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("The ")
    assert len(text.stdout) > 12
    refused = run_cli("evaluate", "--model", out, "--data", "pydocs")
    assert refused.returncode == 2
    assert "runs in llama.cpp" in refused.stderr


def test_llama_cpp_streams_the_greedy_text(ours, exports, prompts):
    prompt = ours.tokenizer.decode(prompts[-1])
    sampling = bit.SamplingConfig(temperature=0, max_new_tokens=GREEDY_TOKENS)
    pieces = list(llama_cpp_stream(exports["TQ2_0"], prompt, sampling))
    assert len(pieces) > GREEDY_TOKENS // 2
    assert "".join(pieces) == "".join(bit.stream(ours.model, ours.tokenizer, prompt, sampling))


def test_llama_cpp_samples_with_a_seed_and_stops_when_asked(exports, tmp_path):
    def texts(count, **options):
        stream = llama_cpp_stream(exports["TQ2_0"], "", bit.SamplingConfig(**options))
        return [text for text, _ in zip(stream, range(count), strict=False)]

    assert texts(20, seed=1) == texts(20, seed=1) != texts(20, seed=2)
    assert texts(20, max_new_tokens=0) == []
    lengths = [len(texts(400, seed=seed, max_new_tokens=300)) for seed in range(4)]
    assert 150 < max(lengths) <= 300  # beyond the context of 64, unless the model ends its text
    with pytest.raises(ValueError, match="context"):
        list(llama_cpp_stream(exports["TQ2_0"], "x y " * 300))
    with pytest.raises(ValueError, match="does not load"):
        list(llama_cpp_stream(exports["packed"], "x"))
    with pytest.raises(FileNotFoundError, match="expected a GGUF file"):
        list(llama_cpp_stream(tmp_path / "none.gguf", "x"))
