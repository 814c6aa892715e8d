"""Keeps libraries' native code in its place: what it prints goes into the log, what it ends is not this process."""

import contextlib
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from pockettune.common.disk import is_disk_full
from pockettune.common.errors import UserError


@contextlib.contextmanager
def output_in_log(name: str) -> Iterator[None]:
    """Send what the block writes to stdout and stderr, native code too, into the log file, by lines.

    `name` stands for who says it. Without a log file all stays on the terminal.
    """
    # Not through a logger: a handler that writes to stderr would be fed with what it wrote.
    files = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
    if not files:
        yield
        return
    reader, writer = os.pipe()
    kept = [os.dup(number) for number in (1, 2)]

    def read() -> None:
        with os.fdopen(reader, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line := line.rstrip():
                    record = logging.LogRecord(name, logging.INFO, "", 0, line, None, None)
                    for file in files:
                        file.handle(record)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for number in (1, 2):
            os.dup2(writer, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, own in zip((1, 2), kept, strict=True):
            os.dup2(own, number)
            os.close(own)
        os.close(writer)  # the last end, so that the reader comes to its own
        thread.join()


def run_apart(name: str, function: Callable[..., None], *arguments: Any) -> None:
    """Run a function of a module in a process of its own, for a library that may end it without a word.

    What it prints goes into the log, as of `name`. Raises what the function raises; ChildProcessError where
    the process ended before.
    """
    # Python's helper of such processes outlives them, and would keep the log's pipe open.
    resource_tracker.ensure_running()
    context = multiprocessing.get_context("spawn")
    with (
        output_in_log(name),
        ProcessPoolExecutor(1, context, initializer=_end_with_parent) as pool,
    ):
        try:
            pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise ChildProcessError("its process ended in mid-work") from error


def run_library(
    name: str, source: str, place: Path, function: Callable[..., None], *arguments: Any
) -> None:
    """Run a function apart, by which the library `name` writes at `place` what it makes of `source`.

    UserError where the library ended its process; a ChildProcessError at a full disk, for tell_full_disk.
    """
    try:
        run_apart(name, function, *arguments)
    except ChildProcessError as error:
        if is_disk_full(error, place):
            raise
        raise UserError(
            f"{source}: {name} ended in mid-work; its last words are in the log, and where it has none,"
            " memory was short: see make doctor"
        ) from error


def _end_with_parent() -> None:
    """Have this process end when the one that started it does, killed or not."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
