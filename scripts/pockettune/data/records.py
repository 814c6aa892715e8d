"""Reads tables of any common format, and writes and reads the dataset's own jsonl files."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pockettune.common.errors import UserError
from pockettune.common.program import staged

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Return the named columns of a csv, tsv, jsonl or parquet file, a row a record.

    A tsv is read as it stands: quotes are text there (reviews open quotes and forget to close
    them); only a csv has quoted cells. Raises UserError for an unknown format, a file that is
    empty, not UTF-8 or not readable as its format, and a missing column.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: format {path.suffix!r} is not one of {', '.join(FORMATS)}")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else _read_text(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise UserError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}"
            " (set dataset.text_column and dataset.label_column)"
        )
    if table.empty:
        raise UserError(f"{path} has a header and no rows")
    return table[list(columns)]


def _read_text(path: Path) -> pd.DataFrame:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}: line {line} is not UTF-8 (byte 0x{content[error.start]:02x}); "
            f"convert it, e.g. iconv -f gb18030 -t utf-8 {path.name}"
        ) from error
    if path.suffix == ".jsonl":
        return pd.DataFrame(list(_parse_lines(path, text)))
    return pd.read_csv(
        io.StringIO(text),
        sep="\t" if path.suffix == ".tsv" else ",",
        quoting=csv.QUOTE_NONE if path.suffix == ".tsv" else csv.QUOTE_MINIMAL,
        dtype=str,
        keep_default_na=False,
    )


def _parse_lines(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} is not a JSON object")
        yield row


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, complete or not at all."""
    with staged(path) as partial, partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what `write_records` wrote, record by record."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def count_records(path: Path) -> int:
    """Return how many records a file holds."""
    with path.open("rb") as file:
        return sum(1 for _ in file)
