import dataclasses
import hashlib
import json
import sys

import numpy as np
import pytest

import bitllm_core as bit
from bitllm import streaming


def prepared(path, out, **options):
    return bit.prepare_data(bit.DataConfig(data=str(path), **options), 300, 16, out)


def text_of(tokens, tokenizer):
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=True)


def test_tokens_are_the_text_and_the_tail_is_held_out(tiny_corpus, tmp_path):
    data, tokenizer = prepared(tiny_corpus, tmp_path)
    text = tiny_corpus.read_text(encoding="utf-8")
    train, held = text_of(data.training, tokenizer), text_of(data.validation, tokenizer)
    assert train + held == text
    assert 0.04 < len(held) / len(text) < 0.06
    assert data.training.dtype == np.uint16
    assert data.manifest["train"]["tokens"] == len(data.training)
    assert data.manifest["validation"]["bytes"] == len(held.encode())


def test_pieces_join_to_the_text_tokenized_whole(tmp_path, tokenizer):
    text = "".join(f"line {i}\n" + "\n" * (i % 4) + "   indented\n" for i in range(20_000))
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8", newline="\n")
    pieces = [piece for piece, _ in bit.read_pieces(str(path))]
    assert len(pieces) > 3
    assert "".join(pieces) == text
    ids = [token for piece in pieces for token in bit.encode(tokenizer, piece)]
    assert ids == bit.encode(tokenizer, text)


def test_one_endless_line_is_read_in_pieces(tmp_path):
    text = "word " * 200_000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = [piece for piece, _ in bit.read_pieces(str(tmp_path / "a.txt"))]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 1 << 18
    assert all(piece.startswith(" ") for piece in pieces[1:])  # no word was cut


def test_rows_of_jsonl_and_parquet_are_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = ["one\ntwo", "", "three"]
    rows = "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts)
    (tmp_path / "a.jsonl").write_text(rows, encoding="utf-8")
    table = pyarrow.table({"body": texts, "title": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    expected = [("one\ntwo", True), ("three", True)]
    assert list(bit.read_pieces(str(tmp_path / "a.jsonl"))) == expected
    parquet = str(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"columns body \(str\), title \(str\).*--text-column"):
        list(bit.read_pieces(parquet))
    config = bit.DataConfig(data=parquet, text_column="body")
    assert list(bit.read_pieces(parquet, config=config)) == expected


def test_marks_line_ends_and_blank_rows_of_local_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\x85two\u2028\x0b\rthree".encode())
    assert list(bit.read_pieces(str(path))) == [("one\n\x85two\u2028\x0b\nthree", True)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\n {"n": 2}\n{"text": null}\n{"text": "\\ud800b"}'
    )
    assert list(bit.read_pieces(str(path))) == [("a", True), ("\ufffdb", True)]
    rows, *_ = next(bit.text_parts(str(path), "train", bit.DataConfig()))
    assert list(rows) == ["a", "", "", "\ufffdb"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": 3}\n{"text": 4}', r"columns text \(int\); .*--text-column"),
        ("a.jsonl", b'[{"text": "a"}]', r'line 1: cannot.*\(expected an object such as {"text"'),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: cannot be read as .jsonl"),
        ("a.jsonl", b'{"a": "x", "b": "y"}', r"columns a \(str\), b \(str\); .*--text-column"),
        ("a.parquet", b"PAR1 is not all of it", "cannot be read as .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}.*{says}"):
        list(bit.read_pieces(str(tmp_path / name)))


def test_rows_without_text_are_skipped_and_counted(tmp_path, capsys):
    rows = [{"text": None}, {"text": "a"}, {"text": 42}, {"text": ["b"]}, {"n": 1}, {"text": "c"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # a source is read several times
        assert list(bit.read_pieces(str(path))) == [("a", True), ("c", True)]
    assert capsys.readouterr().err.count("skipped 2 rows whose text is not text") == 1


def test_a_line_without_end_and_spaces_is_read_in_parts(tmp_path):
    text = "ACGT" * 200_000
    (tmp_path / "a.txt").write_text(text + "\nmore\n")
    pieces = [piece for piece, _ in bit.read_pieces(str(tmp_path / "a.txt"))]
    assert "".join(pieces) == text + "\nmore\n"
    assert max(map(len, pieces)) <= 1 << 18


def test_a_separator_ends_documents_when_asked_and_is_mentioned_when_not(tmp_path, capsys):
    path, mark = tmp_path / "a.txt", bit.END_OF_TEXT
    path.write_text("".join(f"story {i}\nof two lines\n{mark}\n" for i in range(300)))
    config = bit.DataConfig(data=str(path), document_separator=mark)
    pieces = list(bit.read_pieces(config.data, "train", config))
    assert pieces == [(f"story {i}\nof two lines\n", True) for i in range(300)]
    data, tokenizer = prepared(path, tmp_path / "asked", document_separator=mark)
    assert (data.training == bit.end_of_text_id(tokenizer)).sum() == 286  # and one at the cut
    assert mark not in capsys.readouterr().err
    bit._warn_once.cache_clear()
    prepared(path, tmp_path / "not-asked")
    assert capsys.readouterr().err.count(f"--document-separator '{mark}'") == 1


def test_a_separator_ends_documents_wherever_rows_are_cut_into_batches():
    rows = ["a\n", "--\n", "b\n", "--\n", "--\n", "c\n"]
    whole = "".join(text + "|" * ends for text, ends in bit.text_pieces(rows, True, True, "--"))
    assert whole == "a\n|b\n|c\n|"
    for at in range(1, len(rows)):
        parts = (rows[:at], False), (rows[at:], True)
        pieces = [piece for part, end in parts for piece in bit.text_pieces(part, True, end, "--")]
        joined = "".join(text + "|" * ends for text, ends in pieces)
        assert joined.replace("||", "|") == whole


def test_a_run_of_an_earlier_version_keeps_its_tokens(tiny_corpus, tmp_path, monkeypatch):
    """Fields that came later are not in its manifest; its tokenizer was told by its spelling."""
    _, tokenizer = prepared(tiny_corpus, tmp_path)
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("encoding", "document_separator"):
        del manifest["asked"]["data"][name]
    spelled = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    path.write_text(json.dumps({**manifest, "tokenizer_sha256": spelled}))
    monkeypatch.setattr(bit, "tokenize", lambda *a, **k: pytest.fail("tokenized again"))
    prepared(tiny_corpus, tmp_path)


def test_tokens_whose_manifest_is_damaged_are_made_anew(tmp_path):
    """A key with a flipped bit is another key, and no traceback."""
    (tmp_path / "data").mkdir()
    for data, expected in (("data", True), ("dat`", False)):
        manifest = {"asked": {data: {"data": "pydocs"}, "vocab_size": 300}}
        (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
        assert bit.same_data(tmp_path, bit.DataConfig("pydocs"), 300) is expected


def test_known_names_win_over_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pydocs").mkdir()
    assert not bit.is_local("pydocs")
    assert bit.is_local("./pydocs")


@pytest.mark.parametrize("source", ["pydocs", "file"])
def test_a_budget_of_a_text_is_exact_and_leaves_the_usual_validation(source, tiny_corpus, tmp_path):
    source = tiny_corpus if source == "file" else source
    whole, _ = prepared(source, tmp_path / "whole")
    data, _ = prepared(source, tmp_path / "budget", max_train_tokens=1234)
    assert np.array_equal(data.training, whole.training[:1234])
    assert np.array_equal(data.validation, whole.validation)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ImportError, match=r"reading a.parquet .*pip install pyarrow"):
        list(bit.read_pieces(str(tmp_path / "a.parquet")))


def test_a_folder_gives_its_own_validation_split(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    for name in ("train-1", "train-2", "valid", "test"):
        (source / f"{name}.txt").write_text(f"{name} text here. " * 60, encoding="utf-8")
    data, tokenizer = prepared(source, tmp_path / "run")
    assert set(text_of(data.validation, tokenizer).split()) == {"valid", "text", "here."}
    assert "valid" not in text_of(data.training, tokenizer)
    assert "test text" not in text_of(data.training, tokenizer)


def test_other_validation_data(tiny_corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else entirely " * 20, encoding="utf-8")
    data, tokenizer = prepared(tiny_corpus, tmp_path / "run", validation_data=str(other))
    assert text_of(data.validation, tokenizer) == other.read_text(encoding="utf-8")
    assert text_of(data.training, tokenizer) == tiny_corpus.read_text(encoding="utf-8")


def test_files_are_reused_until_they_do_not_match(tiny_corpus, tmp_path, monkeypatch):
    first, _ = prepared(tiny_corpus, tmp_path)
    monkeypatch.setattr(bit, "tokenize", lambda *a: pytest.fail("tokenized again"))
    again, _ = prepared(tiny_corpus, tmp_path)
    assert np.array_equal(first.training, again.training)
    monkeypatch.undo()
    path = tmp_path / "data" / "train.bin"
    del first, again
    damaged = bytearray(path.read_bytes())
    damaged[7] ^= 1
    path.write_bytes(damaged)
    repaired, _ = prepared(tiny_corpus, tmp_path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == repaired.manifest["train"]["sha256"]


def test_a_changed_text_is_never_taken_silently(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some words in a row. " * 50, encoding="utf-8")
    prepared(path, tmp_path / "run")
    path.write_text("other words in a row. " * 50, encoding="utf-8")
    with pytest.raises(ValueError, match="has changed"):
        prepared(path, tmp_path / "run")
    path.unlink()  # a run folder is enough to go on
    prepared(path, tmp_path / "run")


def test_pydocs_needs_nothing(tmp_path):
    data, tokenizer = prepared("pydocs", tmp_path)
    assert len(data.training) > 50_000
    assert "statement" in text_of(data.training[:4000], tokenizer)


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("no-such-file.txt", FileNotFoundError, "no such file or folder"),
        ("hf:name", FileNotFoundError, "hf:OWNER/NAME"),
    ],
)
def test_wrong_sources_say_what_would_do(source, error, says, tmp_path):
    with pytest.raises(error, match=says):
        prepared(source, tmp_path)


def test_wrong_files_say_what_would_do(tmp_path):
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(ValueError, match=r"\.txt, \.jsonl, \.parquet"):
        prepared(tmp_path / "a.doc", tmp_path / "run")
    (tmp_path / "latin.txt").write_bytes("ñandú y camión".encode("latin-1") * 50)
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 text, at byte 0"):
        prepared(tmp_path / "latin.txt", tmp_path / "run2")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="Give more text"):
        prepared(tmp_path / "short.txt", tmp_path / "run3")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        prepared(tmp_path / "bad.jsonl", tmp_path / "run4")


def test_a_hub_out_of_reach_names_the_alternatives(tmp_path):
    """HF_HUB_OFFLINE is set for the tests: the library refuses at once, as without a network."""
    with pytest.raises(ConnectionError, match=r"--data FILE\.txt.*pydocs"):
        prepared("tinystories", tmp_path / "run")
    assert not (tmp_path / "run" / "tokenizer.json").exists()


@pytest.fixture
def hub(monkeypatch):
    """datasets.load_dataset with a few rows of its own, noting what it was asked for."""
    import datasets

    asked = []

    def load_dataset(name, config=None, *, split, streaming=False):
        asked.append((name, config, split, streaming))
        texts = [f"{split} row {i} of a longer text.\n" for i in range(400)]
        rows = datasets.Dataset.from_dict({"title": ["t"] * 400, "text": ["", *texts[1:]]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_set_with_its_own_validation_split(hub, tmp_path):
    data, tokenizer = prepared("wikitext-2", tmp_path)
    assert {call[:2] for call in hub} == {("Salesforce/wikitext", "wikitext-2-raw-v1")}
    assert not any(streaming for *_, streaming in hub)
    eot = bit.end_of_text_id(tokenizer)
    assert eot not in data.training  # its rows are lines of one text
    assert "train row" not in text_of(data.validation, tokenizer)
    assert "validation row" in text_of(data.validation, tokenizer)


def test_any_hub_set_by_name_config_and_column(hub, tmp_path):
    data, tokenizer = prepared("hf:someone/some:part#title", tmp_path)
    assert hub[0] == ("someone/some", "part", "train", False)
    assert set(text_of(data.training, tokenizer)) == {"t"}
    assert bit.end_of_text_id(tokenizer) in data.training  # rows are documents
    with pytest.raises(ValueError, match=r"has columns title \(str\), text \(str\)"):
        prepared("hf:someone/some#body", tmp_path / "other")


def test_a_budget_streams_and_stops(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "VALIDATION_CHARS", 1000)
    data, tokenizer = prepared("fineweb-edu", tmp_path, max_train_tokens=500)
    with data.coming(tokenizer):
        while not data.ended:
            data.refresh()
    assert all(streaming for *_, streaming in hub)
    assert len(data.training) == 500
    held, train = text_of(data.validation, tokenizer), text_of(data.training, tokenizer)
    assert held.startswith("train row 1 ")  # the end of a stream is not known: its beginning
    assert not set(held.splitlines()) & set(train.splitlines())


@pytest.fixture
def ring():
    return bit.TokenData(np.arange(1000, dtype=np.uint16), np.arange(10, dtype=np.uint16), {})


def test_a_batch_is_a_function_of_seed_and_step(ring):
    config = bit.TrainConfig(batch_tokens=64, seed=5)
    steps = [ring.batch(config, 16, step) for step in (0, 7, 300)]
    again = [ring.batch(config, 16, step) for step in (300, 0, 7)]
    for a, b in zip(steps, [again[1], again[2], again[0]], strict=True):
        assert np.array_equal(a, b)
    other = ring.batch(dataclasses.replace(config, seed=6), 16, 0)
    assert not np.array_equal(steps[0], other)


def test_every_window_comes_once_an_epoch_and_epochs_differ(ring):
    config = bit.TrainConfig(batch_tokens=32)  # 2 windows a step, 62 windows an epoch
    epochs = []
    for epoch in range(3):
        steps = range(epoch * 31, (epoch + 1) * 31)
        windows = np.concatenate([ring.batch(config, 16, step) for step in steps])
        assert np.array_equal(windows[:, 1:], (windows[:, :-1] + 1) % 1000)
        starts = windows[:, 0]
        assert len(np.unique(windows[:, :-1])) == 62 * 16  # nothing twice
        epochs.append(starts)
    assert len({starts.min() % 16 for starts in epochs} | {s[0] for s in map(tuple, epochs)}) > 2
    assert not np.array_equal(np.sort(epochs[0]), np.sort(epochs[1]))  # cut elsewhere
    assert np.any(np.diff(epochs[0]) < 0)  # shuffled
