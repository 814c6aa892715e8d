"""How every program starts, logs, shows progress, writes its output and fails."""

import argparse
import contextlib
import json
import logging
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pockettune.common import disk
from pockettune.common.checksums import list_checksums
from pockettune.common.errors import UserError
from pockettune.common.redaction import RedactingFormatter

logger = logging.getLogger("pockettune")


def argument_parser(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser with the program's docstring as help and the option --log."""
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", type=Path, help="write the log to this file")
    return parser


def run(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None]) -> None:
    """Parse the command line, do the work, and turn a user's mistake into one line and exit 2."""
    arguments = parser.parse_args()
    try:
        start_logging(arguments.log)
        work(arguments)
        output = getattr(arguments, "output", None)
        if output is not None and output.is_dir():
            write_manifest(output)
    except UserError as error:
        fail(str(error))
    except Exception as error:
        if disk.is_disk_full(error):
            written = getattr(error, "filename", None) or "output"
            fail(f"disk full while writing {written}: make room and run again")
        logger.exception("unexpected error")
        raise SystemExit(1) from error


def fail(message: str) -> None:
    """Log `error: message` and exit with status 2."""
    logger.error("error: %s", message)
    raise SystemExit(2)


def start_logging(log: Path | None) -> None:
    """Send the programs' own messages to the terminal, and everything to the log file."""
    logger.setLevel(logging.INFO)
    # They say at every start what concerns their own next versions and optional parts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    terminal = _Terminal()
    terminal.setFormatter(RedactingFormatter("%(message)s"))
    logger.addHandler(terminal)
    if log is None:
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    file = _LogFile(log, mode="w", encoding="utf-8")
    file.setFormatter(RedactingFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(file)


class _Terminal(logging.StreamHandler):
    """Writes lines above a bar that a library draws, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class _LogFile(logging.FileHandler):
    """A log that a full disk ends in silence: the terminal gets the one line all the same."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        if not disk.is_disk_full(sys.exception()):
            super().handleError(record)


class _LogStream:
    """Lets tqdm write to the log: one line an update instead of a line drawn over itself."""

    def write(self, text: str) -> None:
        if line := text.strip():
            logger.info(line)

    def flush(self) -> None:
        pass


def progress(
    items: Iterable[Any] | None,
    *,
    description: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
) -> "tqdm[Any]":
    """Iterate with rate and remaining time: a bar on a terminal, else now and then a line.

    `initial` of the `total` were done by an earlier run.
    """
    common: dict[str, Any] = {
        "desc": description, "unit": f" {unit}", "total": total, "initial": initial,
    }  # fmt: skip
    if sys.stderr.isatty():
        return tqdm(items, **common, dynamic_ncols=True)
    return tqdm(
        items,
        **common,
        file=_LogStream(),
        delay=5,
        mininterval=15,
        maxinterval=60,
        position=0,
        bar_format="{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} passed, {remaining} left",
    )


@contextlib.contextmanager
def staged(output: Path, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `output` and move it there when the block succeeds.

    So a killed or failed program leaves nothing under the declared name. What an earlier one left
    under a temporary name is removed first; should that one live on, whose snakemake was killed, it
    fails instead of writing into this one's. DiskFullError where the disk has not the `needed`
    bytes, if known, or is full before the block's end.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    for path in output.parent.iterdir():
        if path.name.startswith(f".{output.name}.") and path.name.endswith(".partial"):
            remove(path)
    partial = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    if needed is not None:
        disk.require_space(output, needed)
    try:
        with disk.tell_full_disk(output, partial, needed):
            yield partial
        if partial.is_dir():  # a file takes the other's place in one step
            remove(output)
        partial.replace(output)
    finally:
        remove(partial)


def write_manifest(folder: Path) -> None:
    """Write the checksums of a folder's files beside it, in sha256sum's format.

    It is what the rules compare, so that a folder with the same content is the same.
    """
    with staged(folder.with_name(f"{folder.name}.sha256")) as partial:
        partial.write_text(list_checksums(folder), encoding="utf-8")


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as readable JSON, complete or not at all."""
    with staged(path) as partial:
        partial.write_text(
            json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )


def read_json(path: Path) -> Any:
    """Read a JSON file that a program of this project wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
