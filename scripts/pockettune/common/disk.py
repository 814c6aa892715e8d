"""A full disk told in one line: before the work where the bytes are known, else when it happens."""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pockettune.common.errors import DiskFullError

FULL = (errno.ENOSPC, errno.EDQUOT)  # no space left; a user's quota is used up
FULL_IN_WORDS = re.compile("No space left on device|Not enough disk space")  # also: datasets
# What NumPy's tofile, C++ streams (llama.cpp), torch.save and native.run_apart (LLVM) say of a write that
# failed, whatever the reason was.
FAILED_WRITE = re.compile(
    r"requested and \d+ written|iostream error|inline_container|process ended in mid-work"
)
# bytes; with less free, such a write failed for lack of room. Not 0: ext4 of Linux 6.18 refused
# 3.2 MB as a whole while 1.8 MB were free.
LITTLE = 100_000_000


def require_space(output: Path, needed: int) -> None:
    """Raise DiskFullError where less than `needed` bytes are free for `output`."""
    folder, free = _free_bytes(output)
    if free < needed:
        raise DiskFullError(
            f"{output} needs {_size(needed)}, but only {_size(free)} are free in {folder}:"
            " make room and run again"
        )


@contextlib.contextmanager
def tell_full_disk(output: Path, partial: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a disk that is full before the block ends into a DiskFullError about `output`.

    `partial` is the file or folder that the block writes, `needed` its bytes when complete.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error, partial):
            raise
        folder, free = _free_bytes(partial)
        wanted = "" if needed is None else f"{_size(needed)} needed, "
        raise DiskFullError(
            f"disk full while writing {output}: {wanted}{_size(used_bytes(partial))} written,"
            f" {_size(free)} free in {folder}: make room and run again"
        ) from error


def is_disk_full(error: BaseException | None, partial: Path | None = None) -> bool:
    """Whether an exception, or one that it came from, is a write that found no room.

    Of a write that failed for no stated reason, the free space beside `partial` tells.
    """
    while error is not None:
        if getattr(error, "errno", None) in FULL or FULL_IN_WORDS.search(str(error)):
            return True
        if partial and FAILED_WRITE.search(str(error)) and _free_bytes(partial)[1] < LITTLE:
            return True
        error = error.__cause__ or error.__context__
    return False


def used_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder; 0 if it is not there."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _free_bytes(path: Path) -> tuple[Path, int]:
    """Return the nearest folder above `path` that exists, and the bytes free there."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    return folder, shutil.disk_usage(folder).free


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB ({count:,} bytes)"
