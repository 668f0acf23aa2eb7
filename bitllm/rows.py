"""Which column of a table is its text, and the text of each row.

`bitllm_core.row_texts` reaches it for the rows of .jsonl, .parquet and a hub's data set.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from bitllm.conversations import as_texts
from bitllm_core import require, valid_unicode

FIRST_ROWS = 20  # with text decide which column it is
_warn_once = lru_cache(logging.getLogger("bitllm").warning)  # a source is read several times


def texts(rows: Iterator[dict[Any, Any]], wanted: str | None, source: Any) -> Iterator[str]:
    """The text of each row, "" where it has none; ValueError where most have none."""
    rows = as_texts(rows, wanted, source)
    kinds, count, skipped, row = {}, 0, 0, {}
    for row in rows:  # those before have no text at all
        if any(isinstance(value, str) for value in row.values()):
            break
    first = [row, *itertools.islice(rows, FIRST_ROWS)]
    for name, value in (item for row in first for item in row.items()):
        if isinstance(value, str) or kinds.get(name, "NoneType") == "NoneType":
            kinds[name] = type(value).__name__
    found = [name for name, kind in kinds.items() if kind == "str"]
    column = wanted or ("text" if "text" in found else found[0] if len(found) == 1 else None)
    columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"
    expected = f"a column of text; {source} has columns {columns}; name one with --text-column"
    fits = not row or kinds.get(column) in ("str", "NoneType")
    require(fits, "text_column", column, expected)
    for row in itertools.chain(first, rows):
        value, count = row.get(column), count + 1
        skipped += not isinstance(value, str | None)
        if skipped > max(FIRST_ROWS, count / 2):
            raise ValueError(f"{source}: {column} is not text in {skipped:,} of {count:,} rows")
        yield valid_unicode(value) if isinstance(value, str) else ""
    if skipped:
        _warn_once("%s: skipped %d rows whose %s is not text", source, skipped, column)
