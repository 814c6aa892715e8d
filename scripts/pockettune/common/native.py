"""Takes what libraries print by themselves into the log."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator


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
