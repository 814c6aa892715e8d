"""Fetches a file over HTTP, going on where an attempt before this one stopped.

The hubs' own clients do not go on: huggingface_hub 2.4.0 removes what came of a file when its
transfer fails or its process is killed, and neither takes over what another hub had sent.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import requests
from urllib3.exceptions import HTTPError, ReadTimeoutError

from pockettune.common.errors import UserError

ATTEMPTS = 4  # in a row that bring nothing; then the source has failed
CHUNK = 1 << 20  # bytes read at most at once
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses after which asking again may help


def stall_seconds() -> float:
    """Return how long a server may send nothing before the connection is given up."""
    return float(os.environ.get("POCKETTUNE_STALL_SECONDS", "30"))


def fetch_file(
    session: requests.Session,
    url: str,
    size: int | None,
    partial: Path,
    *,
    tell: Callable[[int], None],
    pause: Callable[[float], object],
) -> None:
    """Fetch the bytes of `url` that `partial` has not yet, and append them.

    A transfer that is cut, or brings no byte for stall_seconds(), is taken up again where it
    stopped. `tell` hears of each chunk's bytes, and may raise to end it; `pause` waits seconds.
    Raises UserError when ATTEMPTS in a row brought nothing new.
    """
    fruitless, farthest = 0, _length(partial)
    while not (size is not None and _length(partial) == size):
        try:
            _receive(session, url, partial, tell)
            if size is None or _length(partial) == size:
                return
            reason = f"sent {_length(partial):,} bytes, {size:,} are listed"
            if _length(partial) > size:
                partial.unlink()
        except (requests.RequestException, HTTPError) as error:
            reason = _describe(error)
            if not _is_passing(error):
                raise UserError(reason) from error
        came = _length(partial)
        fruitless = 0 if came > farthest else fruitless + 1
        farthest = max(farthest, came)
        if fruitless == ATTEMPTS:
            of_all = f" of {size:,}" if size else ""
            raise UserError(
                f"{reason}, {ATTEMPTS} times in a row; {came:,}{of_all} bytes have come"
            )
        pause(2**fruitless * stall_seconds() / 30)  # 1 to 8 s


def _receive(
    session: requests.Session, url: str, partial: Path, tell: Callable[[int], None]
) -> None:
    """Send one request and append what it brings."""
    start = _length(partial)
    # Compressed on the way, a file's bytes could not be counted.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with session.get(url, headers=headers, stream=True, timeout=stall_seconds()) as response:
        if response.status_code == 416:  # the file ends before: this is not its beginning
            partial.unlink()
            return
        response.raise_for_status()
        # 200 is the whole file, also from a server that knows no ranges.
        goes_on = response.status_code == 206
        if goes_on and _first_byte(response.headers) != start:
            partial.unlink(missing_ok=True)
            return
        with partial.open("ab" if goes_on else "wb") as file:
            while chunk := response.raw.read1(CHUNK):
                file.write(chunk)
                tell(len(chunk))


def _first_byte(headers: Mapping[str, str]) -> int | None:
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code in PASSING
    return not isinstance(error, (requests.exceptions.InvalidURL, requests.TooManyRedirects))


def _describe(error: Exception) -> str:
    if isinstance(error, (requests.Timeout, ReadTimeoutError)):
        return f"no byte for {stall_seconds():g} s"
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"{error.response.status_code} {error.response.reason}"
    return f"the connection failed ({error})"


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
