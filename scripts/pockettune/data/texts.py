"""Reads texts that no one has labelled, from a txt file of one text a line or from a table."""

import csv
from pathlib import Path

from pockettune.common.errors import UserError, list_faults
from pockettune.data.records import not_utf8, read_table


def read_texts(path: Path, column: str) -> list[str]:
    """Return the texts of a txt file, one a line, or of a table's column (see records.read_table).

    Raises UserError naming every line or row without a text, and where the file cannot be read.
    """
    if path.suffix != ".txt":
        texts = [str(text) for text in read_table(path, [column])[column].fillna("")]
        faults = _blank_lines(path)
        faults += [f"row {n}" for n, text in enumerate(texts, start=1) if not text.strip()]
    else:
        try:
            lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise not_utf8(path) from error
        texts = [line.removesuffix("\r") for line in lines]
        faults = [f"line {n}" for n, text in enumerate(texts, start=1) if not text.strip()]
    if faults:
        raise UserError(f"{path}: no text in {list_faults(faults)}; take it out")
    return texts


def _blank_lines(path: Path) -> list[str]:
    """Name the blank lines of a table, which its reader passes over."""
    if path.suffix == ".parquet":
        return []
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":  # whose quoted cells may hold blank lines
            csv.field_size_limit(2**31 - 1)  # bytes; else a cell of 128 KiB is an error
            reader = csv.reader(file)
            return [f"line {reader.line_num}" for row in reader if not row]
        return [f"line {n}" for n, line in enumerate(file, start=1) if not line.strip()]
