import pytest

import bitllm_core as bit

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


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"hello"])
def test_a_wrong_file_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="no such file"):
        bit.load_tokenizer(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a tokenizer"):
        bit.load_tokenizer(path)
