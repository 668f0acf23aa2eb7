import json
import subprocess
import sys

import numpy as np
import pytest

import bitllm_core as bit
from bitllm import wordpiece
from tests.conftest import ROOT

HARD = [
    "",
    "a",
    " ",
    "  \n\n\t x  ",
    "Привет, мир",
    "🐱👩‍👩‍👧 e\u0301 \u200d\ufeff",
    "\x00\x01\x7f\x85\u2028",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "def f(x):\n    return x  # ok\r\n",
    "\U0010ffff\ufffd",
]


@pytest.mark.parametrize("text", HARD)
def test_round_trip_is_lossless(tokenizer, text):
    ids = bit.encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert bit.end_of_text_id(tokenizer) not in ids  # special tokens inside a text are text


def test_a_lone_surrogate_does_not_crash(tokenizer):
    assert "\ufffd" in tokenizer.decode(bit.encode(tokenizer, "a\ud800b"))


def test_saved_and_loaded_it_does_the_same(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = bit.load_tokenizer(tmp_path / "tokenizer.json")
    assert bit.tokenizer_hash(again) == bit.tokenizer_hash(tokenizer)
    for text in HARD:
        assert bit.encode(again, text) == bit.encode(tokenizer, text)


def test_vocabulary_is_bounded(tiny_corpus):
    texts = [tiny_corpus.read_text(encoding="utf-8")]
    assert bit.train_tokenizer(texts, 280).get_vocab_size() == 280
    with pytest.raises(ValueError, match="at least 257"):
        bit.train_tokenizer(texts, 100)


def test_word_pieces_decode_to_words(tiny_corpus):
    tokenizer = bit.train_tokenizer([tiny_corpus.read_text("utf-8")], 300, kind="wordpiece")
    ids = bit.encode(tokenizer, "cats sat on mats")
    assert tokenizer.decode(ids) == "cats sat on mats"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_same_text_gives_the_same_tokenizer(tiny_corpus, kind):
    texts = [tiny_corpus.read_text("utf-8")]
    script = "import sys, bitllm_core as b; t = b.train_tokenizer([open(sys.argv[1], "
    script += "encoding='utf-8').read()], 300, sys.argv[2]); print(b.tokenizer_hash(t))"
    command = [sys.executable, "-c", script, str(tiny_corpus), kind]  # another random hash
    other = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert bit.tokenizer_hash(bit.train_tokenizer(texts, 300, kind)) == other.strip()


def test_word_pieces_of_more_characters_than_there_is_room_for():
    letters = "".join(chr(0x4E00 + i) for i in range(3000))
    tokenizer = bit.train_tokenizer([letters + " " + letters[:50] * 9], 300, kind="wordpiece")
    assert tokenizer.get_vocab_size() <= 300
    assert {*letters[:50]} <= tokenizer.get_vocab().keys()  # the most frequent ones


def test_text_without_spaces_takes_the_time_that_english_takes():
    """Words are cut; one of 300,000 letters took longer than anybody waited."""
    random = np.random.default_rng(0)
    dna = "".join(random.choice(list("ACGT"), 300_000))
    cut = list(wordpiece.bounded_words([dna + " one two"]))
    assert "".join(cut) == dna + " one two"
    assert max(len(word) for part in cut for word in part.split()) == 64
    assert bit.train_tokenizer([dna], 600).get_vocab_size() == 600


def test_of_text_without_spaces_only_so_much_is_learned_from(monkeypatch):
    monkeypatch.setattr(wordpiece, "LONG_WORDS_CHARS", 1000)
    texts = ["x" * 2000 + " words", "y" * 2000 + " other words"]
    assert list(wordpiece.bounded_words(texts)) == ["  words", "  other words"]


def test_a_given_tokenizer_neither_truncates_nor_pads(tokenizer, tmp_path):
    text = "cats sat on mats " * 40
    expected = bit.encode(tokenizer, text)
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.enable_truncation(16)
    copy.enable_padding(length=512)
    copy.save(str(tmp_path / "tokenizer.json"))
    again = bit.load_tokenizer(tmp_path / "tokenizer.json")
    assert bit.encode(again, text) == expected
    assert bit.encode(again, "a") == bit.encode(tokenizer, "a")


def test_a_tokenizer_is_what_it_does(tokenizer):
    """Not how a version of the library spells it."""
    spelled = json.loads(tokenizer.to_str())
    spelled["version"], spelled["model"]["fuse_unk"] = "1.0", True
    again = type(tokenizer).from_str(json.dumps(spelled))
    again.encode_special_tokens = True
    assert again.to_str() != tokenizer.to_str()
    assert bit.tokenizer_hash(again) == bit.tokenizer_hash(tokenizer)
    other = json.loads(tokenizer.to_str())
    merges = other["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]
    again = type(tokenizer).from_str(json.dumps(other))
    assert bit.tokenizer_hash(again) != bit.tokenizer_hash(tokenizer)


def test_ids_may_be_larger_than_their_number(tokenizer, tmp_path, tiny_corpus):
    """The token files' type, and what may be generated, follow the largest."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: 70_000 + i for i, word in enumerate(["cats", "sat", "on", "mats", "[UNK]"])}
    sparse = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    sparse.pre_tokenizer = pre_tokenizers.Whitespace()
    assert bit.num_ids(sparse) == 70_005
    sparse.save(str(tmp_path / "tokenizer.json"))
    data, _ = bit.prepare_data(bit.DataConfig(str(tiny_corpus)), 70_005, 16, tmp_path)
    assert data.training.dtype == np.uint32
    with pytest.raises(ValueError, match="ids up to 70,004"):
        bit.check_tokenizer(sparse, 70_004, tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"hello"])
def test_a_wrong_file_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="no such file"):
        bit.load_tokenizer(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a tokenizer"):
        bit.load_tokenizer(path)
