"""Sentences of pages in the language that is asked for.

English stands where a sentence is used, in the programs and in the templates, with its values as
{name}. Another language is a table from those sentences to its own, report/<language>.json.
"""

import json
from collections.abc import Callable
from pathlib import Path

Words = Callable[..., str]


def english(sentence: str, /, **values: object) -> str:
    """Return an English sentence with its values."""
    return sentence.format(**values)


def read_words(table: Path | None) -> Words:
    """Return the function that says an English sentence in the table's language; None is English.

    A sentence that the table lacks is a KeyError, not English amid the other language.
    """
    if table is None:
        return english
    sentences = json.loads(table.read_text(encoding="utf-8"))

    def words(sentence: str, /, **values: object) -> str:
        text: str = sentences[sentence]
        return text.format(**values)

    return words
