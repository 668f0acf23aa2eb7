"""Runs with tokenizers of many kinds: the same ids here, in transformers and in llama.cpp."""

import dataclasses
import unicodedata

import pytest

import bitllm_core as bit
from bitllm.export import export_gguf, export_hf, export_packed
from bitllm.export.llama_vocabulary import llama_vocabulary
from bitllm.vocabulary import open_tokenizer
from tests import tiny
from tests import tokenizer_kinds as kinds
from tests.export.difficult import difficult_strings
from tests.export.helpers import CLIENT_WARNINGS
from tools.export_parity import LlamaCpp, Ours, Transformers

pytestmark = CLIENT_WARNINGS

SHAPE = {"hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
WITHOUT_A_TABLE = {"unigram": lambda: kinds.unigram(scheme="never", collapse=False)}
ADDED = {
    "gpt-2 with words": lambda: kinds.with_added(kinds.gpt_2(), "    ", "\n\n", "def "),
    "gemma with words": lambda: kinds.with_added(kinds.byte_fallback(), "    ", "\n\n"),
}
IN_LLAMA_CPP = {**kinds.KINDS, "dbrx": kinds.dbrx, **WITHOUT_A_TABLE, **ADDED}
del IN_LLAMA_CPP["bert"]


def trained(tokenizer, folder, corpus):
    """A run of some steps with a tokenizer, stopped and resumed on the way."""
    path = folder / "given.json"
    tokenizer.save(str(path))
    model = dataclasses.replace(tiny.MODEL, **SHAPE)
    for callbacks in ([tiny.StopAt(2)], []):
        data, config = bit.DataConfig(str(corpus), tokenizer=str(path)), tiny.TRAIN
        config = dataclasses.replace(config, max_steps=4)
        state = bit.train(model, data, config, folder / "run", callbacks=callbacks)
    assert state.step == 4
    return folder / "run"


@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_llama_cpp_gives_the_same_ids(name, tiny_corpus, tmp_path):
    run = trained(IN_LLAMA_CPP[name](), tmp_path, tiny_corpus)
    strings, ours = difficult_strings(), Ours(run)
    if name == "qwen-2":  # llama.cpp does not compose characters; the export says so
        strings = [s for s in strings if unicodedata.is_normalized("NFC", s)]
    theirs = LlamaCpp(export_gguf(run, tmp_path / "m.gguf", kind="F16").path)
    assert not [s for s in strings if ours.encode(s) != theirs.encode(s)]


@pytest.mark.parametrize("name", kinds.KINDS)
def test_transformers_gives_the_same_ids(name, tiny_corpus, tmp_path):
    run = trained(kinds.KINDS[name](), tmp_path, tiny_corpus)
    ours = Ours(run)
    exported = export_hf(run, tmp_path / "hf", dense=True).path
    packed = export_packed(run, tmp_path / "m.safetensors").path
    others = [Transformers(exported), Ours(exported), Ours(packed)]
    chats = bit.can_chat(ours.tokenizer)  # the marks of its template have to be read in a text
    for text in (s for s in difficult_strings()[::3] if not (chats and bit.END_OF_TEXT in s)):
        assert [other.encode(text) for other in others] == [ours.encode(text)] * 3, text


def test_decomposed_text_gets_other_ids_in_llama_cpp_and_a_line_says_so(tmp_path, capsys):
    kinds.qwen_2().save(str(tmp_path / "t.json"))
    llama_vocabulary(open_tokenizer(str(tmp_path / "t.json")), 700)
    assert "NFC" in capsys.readouterr().err


REFUSED = {
    "WordPiece": (kinds.bert, "WordPiece"),
    "another regular expression": (
        lambda: kinds.byte_level(600, [], kinds.split(r"\p{L}+|\P{L}+")),
        "BPE after Split and ByteLevel",
    ),
    "merges of a word that is a token": (
        lambda: kinds.byte_level(600, [], kinds.split(kinds.QWEN_2), ignore_merges=True),
        "in a form other than that of gpt-2",
    ),
    "merges that are left out": (lambda: kinds.byte_fallback(complete=False), "stay apart"),
    "Unigram that strips": (kinds.unigram, "Unigram after Strip, Replace, Metaspace"),
    "a mark that eats spaces": (
        lambda: kinds.with_added(kinds.gpt_2(), kinds.AddedToken("x", lstrip=True)),
        "'x' has lstrip",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_tokenizers_are_refused_by_name(name, tmp_path):
    make, why = REFUSED[name]
    make().save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match=why) as error:
        llama_vocabulary(open_tokenizer(str(tmp_path / "t.json")), 2000)
    assert "Export to hf or packed" in str(error.value)


def test_ids_beyond_16_bits(tmp_path):
    """Token files, training, a resume and exports of a vocabulary of 70,000."""
    tokenizer, text = kinds.many_words(70_000), tmp_path / "text.txt"
    words = [word for word, i in sorted(tokenizer.get_vocab().items()) if i > 65_535][:300]
    text.write_text(" ".join(words * 3), encoding="utf-8")
    run = trained(tokenizer, tmp_path, text)
    assert bit.read_json(run / "data" / "manifest.json")["dtype"] == "uint32"
    ours = Ours(run)
    assert ours.model.config.vocab_size == 70_000
    theirs = LlamaCpp(export_gguf(run, tmp_path / "m.gguf", kind="F16").path)
    others = [theirs, Transformers(export_hf(run, tmp_path / "hf", dense=True).path)]
    for line in ("".join(words[:40]), " ".join(words[-40:])):
        assert max(ours.encode(line)) > 65_535
        assert [other.encode(line) for other in others] == [ours.encode(line)] * 2
