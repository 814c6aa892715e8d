"""A full disk told in one line: before the work where the bytes are known, else when it happens."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from pockettune.errors import DiskFullError

FULL = (errno.ENOSPC, errno.EDQUOT)  # no space left; a user's quota is used up
WORDS = ("No space left on device", "Not enough disk space")  # safetensors, pip; datasets
# With less than this free, a write that failed for no stated reason failed for lack of room: some
# network file systems write in blocks of so many bytes.
NOTHING_FREE = 1_000_000


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

    NumPy's tofile, torch.save and C++ streams only tell that a write failed: then the free space
    beside `partial` decides, where that is given.
    """
    while error is not None:
        code = getattr(error, "errno", None)
        if code in FULL or any(words in str(error) for words in WORDS):
            return True
        unexplained = isinstance(error, OSError | RuntimeError) and code is None
        if unexplained and partial is not None and _free_bytes(partial)[1] < NOTHING_FREE:
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
