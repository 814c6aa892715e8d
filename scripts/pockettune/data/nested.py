"""Reads files whose rows are no lines: JSON of any layout, and tokens with a label each.

json          objects one behind the other, a list of them, or SQuAD's articles of paragraphs of
              questions, each of which becomes a row with the paragraph's context
bio, conll    a token and its label a line, the first and the last of its columns; a blank line ends
              a row
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pockettune.common.errors import UserError, list_faults

Row = dict[str, Any]
NOT_SPACE = re.compile(r"\S")


def parse_json(path: Path, text: str) -> Iterator[Row]:
    """Yield the rows of a JSON file; UserError with the line where it is none."""
    decoder, place = json.JSONDecoder(), 0
    while found := NOT_SPACE.search(text, place):
        try:
            value, place = decoder.raw_decode(text, found.start())
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from error
        for row in value if isinstance(value, list) else [value]:
            if not isinstance(row, dict):
                raise UserError(f"{path}: {row!r} is not a JSON object")
            yield from _flatten(path, row)


def _flatten(path: Path, row: Row) -> Iterator[Row]:
    """Yield an object as a row, or SQuAD's questions, down from data or from an article."""
    if isinstance(row.get("data"), list):
        articles = row["data"]
    elif isinstance(row.get("paragraphs"), list):
        articles = [row]
    else:
        yield row
        return
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {"answers": [], **question, "context": paragraph["context"]}
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not in SQuAD's layout, data: [paragraphs: [context, qas: [question, answers]]]:"
            f" {error} is missing"
        ) from error


def parse_tokens(path: Path, lines: Iterable[str], tokens: str, labels: str) -> Iterator[Row]:
    """Yield rows with lists of tokens and labels under these names; UserError naming every bad line."""
    row: Row = {tokens: [], labels: []}
    faults = []
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r\n")
        if line.startswith("-DOCSTART-"):
            continue
        if not line.strip():
            if row[tokens]:
                yield row
            row = {tokens: [], labels: []}
            continue
        cells = line.split("\t") if "\t" in line else line.rstrip().split(" ")
        if len(cells) < 2:
            faults.append(f"line {number}: {line!r}")
        row[tokens].append(cells[0])
        row[labels].append(cells[-1])
    if row[tokens]:
        yield row
    if faults:
        raise UserError(f"{path}: no label beside the token in {list_faults(faults)}")
