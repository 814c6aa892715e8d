"""Reads tables of any common format, and writes and reads the dataset's own jsonl files."""

import csv
import json
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pockettune.common.errors import UserError, list_faults
from pockettune.common.program import staged
from pockettune.data.nested import parse_json, parse_tokens

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet", ".json", ".bio", ".conll")


def read_table(
    path: Path,
    columns: Sequence[str],
    labels: Collection[str] = (),
    optional: Collection[str] = (),
) -> pd.DataFrame:
    """Return the columns of a file of one of FORMATS, and those of `optional` that it has.

    Tokens and labels of a bio or conll file come as the first and the last of `columns`. A tsv is read as it stands: quotes are text there (reviews open quotes and forget to close
    them); only a csv has quoted cells. Raises UserError for an unknown format, a file that is
    empty, not UTF-8 or not readable as its format, a missing column, and a csv whose texts hold
    rows, known by one of `labels`.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: format {path.suffix!r} is not one of {', '.join(FORMATS)}")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty")
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else _read_text(path, columns)
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
    if path.suffix == ".csv" and labels:
        _refuse_swallowed_rows(path, table, columns, labels)
    also = [name for name in optional if name in table.columns and name not in columns]
    return table[[*columns, *also]].reset_index(drop=True)


def _read_text(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    try:
        # Only \n ends a line: others are text, such as a carriage return within quotes.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            if path.suffix == ".jsonl":
                return pd.DataFrame(_parse_lines(path, file))
            if path.suffix == ".json":
                return pd.DataFrame(parse_json(path, file.read()))
            if path.suffix in (".bio", ".conll"):
                return pd.DataFrame(parse_tokens(path, file, columns[0], columns[-1]))
        return _read_cells(path)
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error


def not_utf8(path: Path) -> UserError:
    """Say which line is not UTF-8; the reader's own error counts from somewhere within."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return UserError(
                    f"{path}: line {number} is not UTF-8 (byte 0x{line[error.start]:02x}); "
                    f"convert it, e.g. iconv -f gb18030 -t utf-8 {path.name}"
                )
    return UserError(f"{path} is not UTF-8")


def _read_cells(path: Path) -> pd.DataFrame:
    """Read a csv or tsv; a separator at the end of its rows, and not of its header, is no cell."""
    options: dict[str, Any] = {
        "sep": "\t" if path.suffix == ".tsv" else ",",
        "quoting": csv.QUOTE_NONE if path.suffix == ".tsv" else csv.QUOTE_MINIMAL,
        "dtype": str,
        "keep_default_na": False,
        "encoding": "utf-8-sig",
    }
    table = pd.read_csv(path, **options)
    if isinstance(table.index, pd.RangeIndex):
        return table
    # Of rows longer than the header, pandas takes the first cells for the names of the rows.
    width, longer = len(table.columns), table.index.nlevels
    if longer > 1 or (table.iloc[:, -1] != "").any():
        raise UserError(
            f"{path}: its rows have {width + longer} cells, its header {width}; name every column in"
            " the header"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)  # the last cells are left out
        return pd.read_csv(path, index_col=False, **options)


def _refuse_swallowed_rows(
    path: Path, table: pd.DataFrame, columns: Sequence[str], labels: Collection[str]
) -> None:
    """Raise UserError naming the texts that hold rows: a quote left open swallows those below it."""
    text, label = columns
    place = list(table.columns).index(label)
    # A row's start or end that stands in a text as lines of it, label and number of cells alike.
    known = "(?:" + "|".join(map(re.escape, labels)) + ")"
    if place < list(table.columns).index(text):
        where, row = "start", rf'(?<=\n)(?:[^,\n]*,){{{place}}}"?{known}"?,'
    else:
        cells = len(table.columns) - 1 - place
        where, row = "end", rf',"?{known}"?(?:,[^,\n]*){{{cells}}}(?=\r?\n)'
    faults = [
        f"row {position}: text has {found[0].strip()} at the {where} of a line within"
        for position, content in enumerate(table[text], start=1)
        if (found := re.search(row, content))
    ]
    if faults:
        raise UserError(
            f"{path}: rows are taken for text, as below a quote that is not closed:"
            f" {list_faults(faults)}; double the quotes of a text, or write a tsv or jsonl"
        )


def _parse_lines(path: Path, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
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
