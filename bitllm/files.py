"""Folders of text, .jsonl and .parquet, and text in .gz, .zst and .zip, unpacked while it is read.

`bitllm_core.text_parts` reaches it for every local source that is no single .txt. What is
inside a .zip is named as if that were a folder: `books.zip/part/one.txt`.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from bitllm_core import (
    DataConfig,
    Part,
    document_lines,
    file_lines,
    first_line,
    library,
    require,
    row_texts,
)

log = logging.getLogger("bitllm")

SUFFIXES = (".txt", ".jsonl", ".parquet")
ROWS = 100  # of a .parquet at once
_say_once = lru_cache(log.info)  # a source is read several times


def parts(source: Path, split: str, config: DataConfig) -> Iterator[Part]:
    """What the files of a source hold, one after the other."""
    for path in local_files(source, split):
        suffix = unpacked(path).suffix.lower()
        if suffix == ".txt":
            yield document_lines(path, partial(open_packed, path), config)
            continue
        column = config.text_column
        jsonl = suffix == ".jsonl"
        rows = json_rows(path, config.encoding) if jsonl else parquet_rows(path, column)
        yield row_texts(rows, column, path), False, True


def local_files(source: str | Path, split: str = "train") -> list[Path]:
    """The files of a source, sorted, and those in a .zip.

    In a folder or .zip, what has the word valid, validation, dev or test at the start or the end of
    its name, or as the name of its folder, is not trained on. Hidden files and a run's own are left
    out. A line says what became of them. ValueError: nothing to train on.
    """
    path, files = Path(source).expanduser(), []
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        files += _files_in(file) if file.suffix.lower() == ".zip" else [file]
    many = files != [path]
    found: dict[str, list[Path]] = {"train": [], "validation": [], "test": [], "": []}
    for file in files:
        is_text = unpacked(file).suffix.lower() in SUFFIXES
        found[_split_of(file, path) if many else "train" if is_text else ""].append(file)
    if many:
        held, left = found["validation"], [*found["test"], *found[""]]
        names = ", ".join(file.name for file in [*held, *left][:8])
        more = f" ({names}{', ...' * (len(held + left) > 8)})" if names else ""
        counts = (len(found["train"]), len(held), len(left))
        _say_once("%s: %d files to train on, %d held out, %d left out%s", source, *counts, more)
    place = " in it" if many else f", not {path.suffix or 'no suffix'}"
    expected = f"{', '.join(SUFFIXES)} files{place}; or such in .gz, .zst or .zip"
    require(split != "train" or bool(found["train"]), "data", str(source), expected)
    return found[split]


def files_on_disk(source: Path) -> list[Path]:
    """Those of a source's files, or the .zip they are in, that make up its two splits."""
    paths = local_files(source) + local_files(source, "validation")
    return list(dict.fromkeys(map(_archive_of, paths)))


def _split_of(path: Path, folder: Path) -> str:
    """train, validation or test, as a file's name says; nothing where it is no text to read."""
    parts, name = path.relative_to(folder).parts, unpacked(path)
    hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
    if hidden or name.suffix.lower() not in SUFFIXES or path.name == "metrics.jsonl":
        return ""
    words = re.findall(r"[^\W\d_]+", name.stem.lower()) or [""]
    for word in (*map(str.lower, parts[:-1]), words[0], words[-1]):
        if word in ("valid", "validation", "dev", "test"):
            return "test" if word == "test" else "validation"
    return "train"


def unpacked(path: Path) -> Path:
    """The name of a file without its .gz or .zst."""
    return path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path


@lru_cache(maxsize=1)
def _archive(path: Path, changed: int) -> tuple[zipfile.ZipFile, dict[Path, zipfile.ZipInfo]]:
    """A .zip, opened once for all its files (`changed`: anew where it was), and what is in it."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path}: cannot be read as .zip ({first_line(error)})") from error
    return archive, {path / item.filename: item for item in archive.infolist() if not item.is_dir()}


def _files_in(path: Path) -> list[Path]:
    return sorted(_archive(path, path.stat().st_mtime_ns)[1])


def _archive_of(path: Path) -> Path:
    """The file on the disk that holds `path`: a .zip, or the file itself."""
    return next(place for place in (path, *path.parents) if place.is_file())


def open_packed(path: Path) -> Any:
    """The unpacked bytes of a file on the disk or in a .zip, to read from start to end."""
    place, suffix = _archive_of(path), path.suffix.lower()
    if place != path:
        archive, files = _archive(place, place.stat().st_mtime_ns)
        return archive.open(files[path])
    if suffix == ".gz":
        return gzip.open(path)
    if suffix == ".zst":
        pyarrow = library("pyarrow", f"reading {path.name}")
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def json_rows(path: Path, encoding: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl: an object a line. ValueError names the first line that is none."""
    for number, line in enumerate(file_lines(path, partial(open_packed, path), encoding), 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError('expected an object such as {"text": "..."}')
        except ValueError as error:
            why = f"cannot be read as .jsonl ({first_line(error)})"
            raise ValueError(f"{path}, line {number:,}: {why}") from error
        yield row


def parquet_rows(path: Path, column: str | None) -> Iterator[dict[str, Any]]:
    """The rows of a .parquet, of which only `column` and what may be text are read.

    A packed one is unpacked to a temporary file, for it is not read from start to end.
    """
    parquet = library("pyarrow.parquet", f"reading {path.name}")
    try:
        with tempfile.TemporaryFile() as copy:
            packed = path.suffix.lower() != ".parquet" or not path.is_file()
            if packed:
                with open_packed(path) as file:
                    shutil.copyfileobj(file, copy, 1 << 20)
            with parquet.ParquetFile(copy if packed else path) as file:
                types = {item.name: str(item.type) for item in file.schema_arrow}
                read = [name for name in types if "string" in types[name] or name == column]
                for batch in file.iter_batches(ROWS, columns=read or None):
                    yield from batch.to_pylist()
    except (OSError, ValueError, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read as .parquet ({first_line(error)})") from error
