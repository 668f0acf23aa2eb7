"""Folders, packed files and encodings: whatever text people bring is read, or refused by name."""

import gzip
import json
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

import bitllm_core as bit
from bitllm import files

TEXT = "a line\n  and one with an indent, é, 漢字 🐱\n\n" * 200


def read(path, split="train", **options):
    config = bit.DataConfig(data=str(path), **options)
    return [text for text, _ in bit.read_pieces(config.data, split, config)]


def test_the_files_of_a_folder(tmp_path, capsys):
    """Old suffixes, books that begin with test, copies of a notebook server, a run in the data."""
    train = ["BOOK.TXT", "a/the test of time.txt", "devils.txt", "latest-news.txt", "rows.JSONL"]
    train += ["testament.txt", "validity.txt"]
    held = ["Dev-1.txt", "TinyStories-valid.txt.gz", "b/validation/a.txt", "wiki.valid.txt"]
    test, other = ["my_test.jsonl", "test/b.txt", "test.txt"], ["a.doc", "run/metrics.jsonl"]
    other += [".hidden.txt", ".ipynb_checkpoints/BOOK.txt", "__MACOSX/c.txt"]
    for name in [*train, *held, *test, *other]:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "run" / "checkpoints").mkdir()
    found = {split: files.local_files(tmp_path, split) for split in ("train", "validation", "test")}
    for split, names in (("train", train), ("validation", held)):
        assert {p.relative_to(tmp_path).as_posix() for p in found[split]} == {*names}
    assert files.local_files(tmp_path) == sorted(found["train"])
    said = capsys.readouterr().err
    assert "7 files to train on, 4 held out, 8 left out (" in said
    assert said.count("to train on") == 1  # though they were listed several times


def test_what_a_line_says_of_a_folder_is_what_is_trained_on(tmp_path):
    (tmp_path / "valid.txt").write_text("held " * 300)
    (tmp_path / "one.txt").write_text("one " * 300)
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.writestr("books/two.txt", "two " * 300)
        archive.writestr("books/test.txt", "never " * 300)
        archive.writestr("__MACOSX/books/._two.txt", "never")
    assert set("".join(read(tmp_path)).split()) == {"one", "two"}
    assert set("".join(read(tmp_path, "validation")).split()) == {"held"}
    data, _ = bit.prepare_data(bit.DataConfig(str(tmp_path)), 300, 16, tmp_path / "run")
    assert len(data.validation)


def test_a_folder_with_nothing_to_train_on_is_named(tmp_path):
    (tmp_path / "test.txt").write_text("x")
    with pytest.raises(ValueError, match=r"data=.*expected \.txt, \.jsonl, \.parquet files in it"):
        read(tmp_path)
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ValueError, match=r"not \.pdf; or such in \.gz, \.zst or \.zip"):
        read(tmp_path / "a.pdf")


@pytest.fixture
def packed(tmp_path):
    """One text as .txt, .jsonl and .parquet, each in .gz, .zst and .zip."""
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n"))
    table = pyarrow.table({"text": [TEXT], "n": [1], "tags": [["x"]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = []
    for path in sorted(tmp_path.iterdir()):
        found += [path.with_name(path.name + suffix) for suffix in (".gz", ".ZST", ".zip")]
        found[-3].write_bytes(gzip.compress(path.read_bytes()))
        with pyarrow.CompressedOutputStream(str(found[-2]), "zstd") as file:
            file.write(path.read_bytes())
        with zipfile.ZipFile(found[-1], "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, f"folder/{path.name}")
    return found


def test_packed_files_are_unpacked_while_they_are_read(packed):
    for path in packed:
        assert read(path) == [TEXT], path.name


def test_a_damaged_packed_file_is_named(packed, tmp_path):
    for path in packed:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=rf"{path.name}.*: cannot be read as [.\w]+"):
            read(path)
    (tmp_path / "b.txt.gz").write_bytes(b"not packed at all")
    with pytest.raises(ValueError, match=r"b\.txt\.gz: cannot be read as text"):
        read(tmp_path / "b.txt.gz")


def test_a_zip_that_changes_is_read_anew(tmp_path):
    import os

    for time_ns, text in ((10**18, "before"), (2 * 10**18, "after")):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("a.txt", text)
        os.utime(tmp_path / "a.zip", ns=(time_ns, time_ns))
        assert read(tmp_path / "a.zip") == [text]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_utf8_and_what_a_mark_says_are_read(tmp_path, encoding, suffix):
    text = TEXT if suffix == ".txt" else json.dumps({"text": TEXT}, ensure_ascii=False) + "\n"
    (tmp_path / f"a{suffix}").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    assert read(tmp_path / f"a{suffix}") == [TEXT]


def test_another_encoding_is_named_with_its_place_or_read_when_asked(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(("a" * 70_000 + "\nñandú y camión\n").encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 text, at byte 70001; .*--encoding la"):
        read(path)
    assert read(path, encoding="latin-1")[-1].endswith("ñandú y camión\n")
    for encoding in ("hex", "no-such"):
        with pytest.raises(ValueError, match=rf"a\.txt: cannot be read .*{encoding}"):
            read(path, encoding=encoding)
    path.write_bytes("without a mark".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"a\.txt: .*UTF-16 without its mark: try --encoding"):
        read(path)
    assert read(path, encoding="utf-16-le") == ["without a mark"]


def test_lone_surrogates_of_any_source_become_the_replacement_character(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\xed\xa0\x80b")  # as some editors write half an emoji
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a\\ud83db"}')
    (tmp_path / "c.txt").write_bytes("a\ud800b".encode("utf-16", "surrogatepass"))
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == ["a\ufffdb"], path.name


def test_other_columns_of_a_parquet_do_not_matter(tmp_path):
    rows = {"text": ["a", None, "b"], "image": [b"x" * 100] * 3, "n": [1, 2, 3], "tags": [[]] * 3}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", "b"]
    for column, kind in (("n", "int"), ("image", "bytes"), ("tags", "list")):
        with pytest.raises(ValueError, match=rf"text_column='{column}': .*{column} \({kind}\)"):
            read(tmp_path / "a.parquet", text_column=column)


def test_the_columns_are_those_of_the_first_rows_with_text(tmp_path):
    """Hundreds of rows without text come first; a row is refused only where most are."""
    lines = [{"text": None, "id": n} for n in range(500)] + [{"text": "words", "id": 1}] * 900
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read(path) == ["words"] * 900
    lines = [{"text": "words"}] + [{"text": n} for n in range(200)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"a\.jsonl: text is not text in \d+ of \d+ rows"):
        read(path)
