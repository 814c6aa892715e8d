"""Keeps access tokens and passwords out of what is told and logged.

A library's message may hold the address it asked, login included, and a hub's answer may repeat
what it was sent. So every UserError and every line of a log passes here.
"""

import base64
import logging
import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

HIDDEN = "***"
LOGIN = re.compile(r"(?<=://)[^/\s]+(?=@)")  # user:password of an address
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")  # Hugging Face's, also one that is kept in a file
SHORTEST = 6  # characters; hiding a shorter word wherever it occurs would garble the text


def redact(text: str) -> str:
    """Return `text` without logins in addresses and without any secret of the environment."""
    text = TOKEN.sub(HIDDEN, LOGIN.sub(HIDDEN, text))
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, HIDDEN)
    return text


def _secrets() -> Iterator[str]:
    """Yield the values of variables such as HF_TOKEN, and the passwords in addresses such as a proxy's."""
    for name, value in os.environ.items():
        if name.endswith("_TOKEN"):
            yield value
        for login in LOGIN.findall(value):
            yield unquote(login).partition(":")[2]
            yield login.partition(":")[2]
            yield base64.b64encode(unquote(login).encode()).decode()  # as it is sent


class RedactingFormatter(logging.Formatter):
    """Formats a line of a log, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
