"""A tokenizer that is given: the shape follows it, and a run keeps its own copy."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import bitllm_core as bit
from bitllm.vocabulary import open_tokenizer
from tests import tiny, warm
from tests import tokenizer_kinds as kinds
from tests.conftest import ROOT, assert_same_bits, state_of
from tests.hub import Hub


def saved(tokenizer, path):
    tokenizer.save(str(path))
    return str(path)


def train(out, corpus, tokenizer, *, model=tiny.MODEL, callbacks=(), resume="auto", **changes):
    data = bit.DataConfig(str(corpus), tokenizer=tokenizer)
    config = dataclasses.replace(tiny.TRAIN, **changes)
    return bit.train(model, data, config, out, callbacks=list(callbacks), resume=resume)


@pytest.mark.parametrize("name", kinds.KINDS)
def test_it_trains_and_resumes_to_the_bit_without_its_file(name, tiny_corpus, tmp_path):
    path = saved(kinds.KINDS[name](), tmp_path / "t.json")
    given = open_tokenizer(path)
    whole = train(tmp_path / "whole", tiny_corpus, path)
    assert whole.model.config.vocab_size == bit.num_ids(given)
    parts = tmp_path / "parts"
    train(parts, tiny_corpus, path, callbacks=[tiny.StopAt(5)])
    Path(path).unlink()
    parts = parts.rename(tmp_path / "moved")
    train(parts, tiny_corpus, path)
    assert_same_bits(state_of(tmp_path / "whole"), state_of(parts))
    _, tokenizer = bit.load_model(parts)
    assert bit.tokenizer_hash(tokenizer) == bit.tokenizer_hash(given)
    assert bit.end_of_text_id(tokenizer) is not None
    text = "cats sat on mats"
    assert tokenizer.decode(bit.encode(tokenizer, text)) == text


def test_documents_end_with_a_token_that_every_tokenizer_gets(tmp_path):
    path = saved(kinds.llama_3(), tmp_path / "t.json")
    before, after = bit.load_tokenizer(path), open_tokenizer(path)
    assert bit.end_of_text_id(before) is None
    assert bit.end_of_text_id(after) == bit.num_ids(before) == bit.num_ids(after) - 1
    text = "a 12345 é\n<|endoftext|><|end_of_text|>"
    assert bit.encode(after, text) == bit.encode(before, text)
    own = saved(kinds.gpt_2(), tmp_path / "own.json")
    assert bit.num_ids(open_tokenizer(own)) == bit.num_ids(bit.load_tokenizer(own))


def test_marks_of_a_conversation_are_added_where_there_are_none(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello " * 20}]
    data = tmp_path / "a.jsonl"
    data.write_text((json.dumps({"messages": talk}) + "\n") * 60, encoding="utf-8")
    for name, more in (("gpt-2", 2), ("qwen-2", 0)):
        path = saved(kinds.KINDS[name](), tmp_path / f"{name}.json")
        state = train(tmp_path / name, data, path, max_steps=1)
        assert state.model.config.vocab_size == bit.num_ids(open_tokenizer(path)) + more
        train(tmp_path / name, data, path, max_steps=2)  # the file differs from the run's: by marks


def test_a_folder_of_transformers_will_do(tmp_path):
    saved(kinds.gpt_2(), tmp_path / "tokenizer.json")
    assert open_tokenizer(str(tmp_path)).get_vocab_size() == 600


def wrong_word_piece():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]")).to_str()


def empty():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE()).to_str()


WRONG = {
    "none": (None, "expected bpe, wordpiece, a tokenizer.json that is there"),
    "words": ("hello", "not a tokenizer.json"),
    "sentencepiece": ("\x0a\x0b\x0a\x05<unk>", "not a tokenizer.json"),
    "vocabulary only": ('{"a": 0, "b": 1}', "not a tokenizer.json"),
    "no unknown word": (wrong_word_piece(), "cannot read every text"),
    "untrained": (empty(), "gives no tokens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_error_before_any_work(name, tiny_corpus, tmp_path):
    text, why = WRONG[name]
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=why) as error:
        train(tmp_path / "run", tiny_corpus, str(path))
    assert "t.json" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_tokenizer(tiny_corpus, tmp_path):
    path, other = tmp_path / "t.json", saved(kinds.qwen_2(), tmp_path / "other.json")
    saved(kinds.gpt_2(), path)
    out = tmp_path / "run"
    train(out, tiny_corpus, str(path), max_steps=3)
    before = (out / "tokenizer.json").read_bytes()
    for name in (other, "bpe"):
        with pytest.raises(ValueError, match="tokenizer"):
            train(out, tiny_corpus, name, max_steps=4)
    saved(kinds.llama_3(), path)
    with pytest.raises(ValueError, match="not the tokenizer of"):
        train(out, tiny_corpus, str(path), max_steps=4)
    assert (out / "tokenizer.json").read_bytes() == before
    anew = train(out, tiny_corpus, other, resume="never", max_steps=1)
    assert bit.tokenizer_hash(bit.load_tokenizer(out / "tokenizer.json")) == bit.tokenizer_hash(
        open_tokenizer(other)
    )
    assert anew.model.config.vocab_size == bit.num_ids(open_tokenizer(other))


def test_a_run_starts_from_one_with_a_given_tokenizer(tiny_corpus, tmp_path):
    path = saved(kinds.llama_2(), tmp_path / "t.json")
    base = train(tmp_path / "base", tiny_corpus, path, max_steps=2)
    shape, source = base.model.config, str(tmp_path / "base")
    more = train(tmp_path / "more", tiny_corpus, "bpe", model=shape, max_steps=1, init_from=source)
    assert more.model.config == shape
    kept = [bit.load_tokenizer(tmp_path / name / "tokenizer.json") for name in ("base", "more")]
    assert bit.tokenizer_hash(kept[0]) == bit.tokenizer_hash(kept[1])
    with pytest.raises(ValueError, match="expected the shape and the tokenizer of"):
        train(tmp_path / "x", tiny_corpus, path, model=shape, max_steps=1, init_from=source)


def test_the_tokenizer_of_a_model_on_the_hub(tiny_corpus, tmp_path):
    served, out = tmp_path / "hub", tmp_path / "run"
    served.mkdir()
    saved(kinds.llama_3(), served / "tokenizer.json")
    flags = ["train", "--preset", "ci", "--data", tiny_corpus, "--out", out, "--compile", "off"]
    flags += ["--tokenizer", "hf:me/stories", "--batch-tokens", 256, "--dtype", "float32"]

    def command(endpoint, *more):
        variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        variables |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
        script = "import sys\nfrom bitllm.cli import main\nsys.exit(main(sys.argv[1:]))"
        line = [sys.executable, "-c", script, *map(str, [*flags, *more])]
        options = {"capture_output": True, "text": True, "timeout": 300, "check": False}
        return warm.run(line, env={**os.environ, **variables}, **options)

    with Hub(served).running() as hub:
        done = command(hub.address, "--max-steps", 2)
        assert done.returncode == 0, done.stderr
        missing = command(hub.address, "--tokenizer", "hf:me/nothing", "--out", tmp_path / "none")
    assert missing.returncode == 1
    assert "no tokenizer.json of me/nothing" in missing.stderr
    assert not (tmp_path / "none").exists()
    resumed = command("http://127.0.0.1:9", "--max-steps", 3)  # nobody is there, nobody is asked
    assert resumed.returncode == 0, resumed.stderr
    model, tokenizer = bit.load_model(out)
    assert model.config.vocab_size == bit.num_ids(tokenizer) == 601
    assert torch.isfinite(model(torch.tensor([bit.encode(tokenizer, "cats")]))).all()


def test_bytes_that_are_no_character_are_shown_and_the_text_goes_on(monkeypatch, tmp_path):
    """The library's stream of text fails at such bytes, and a training ended with its sample."""
    tokenizer = open_tokenizer(saved(kinds.llama_2(), tmp_path / "t.json"))
    ids = [tokenizer.token_to_id(x) for x in ("<0x41>", "<0xF0>", "at", "\u2581a", "\u2581the")]
    monkeypatch.setattr(bit, "generate_tokens", lambda *_: ([token] for token in ids))
    text = "".join(bit.stream(None, tokenizer, "cats"))
    assert text == "A\ufffdat a the"
