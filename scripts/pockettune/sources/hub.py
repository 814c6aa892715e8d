"""Downloads a model or dataset repository from the first source that has it.

Where from is read from the environment, not from a rule's parameters, because it does not decide
what comes: POCKETTUNE_HUB_SOURCES and POCKETTUNE_SEND_TOKEN_TO, words of config.yaml's `hub:`,
which rules/common.smk sets.
"""

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath

import requests

from pockettune.common import disk, program
from pockettune.common.checksums import git_blob_id, sha256
from pockettune.common.errors import DiskFullError, UserError, list_faults
from pockettune.common.program import logger
from pockettune.common.redaction import redact
from pockettune.sources.bundle import bundled_names, bundled_repository, offline_folder
from pockettune.sources.listings import (
    Kind,
    RemoteFile,
    Source,
    list_files,
    open_session,
    pin,
    read_source,
    token_for,
)
from pockettune.sources.transfer import fetch_file

# Text, tables and safetensors. Pickles (*.bin, *.pt) and Python files can run code: never fetched.
SAFE_FILES = ("*.json", "*.jsonl", "*.txt", "*.jinja", "*.model", "*.safetensors", "*.csv", "*.tsv",
              "*.parquet", "*.arrow", "*.md", "LICENSE", "LICENCE")  # fmt: skip
# What the datasets library unpacks beside it, and reads as data whatever is inside.
SAFE_ARCHIVES = ("*.json.gz", "*.jsonl.gz", "*.csv.gz", "*.tsv.gz", "*.txt.gz", "*.zip")

WORKERS = 4  # files at once
PARTIAL = ".partial"  # folder of what has not wholly come


@contextlib.contextmanager
def repository(
    kind: Kind, name: str, revision: str, downloads: Path, *,
    pins: Mapping[str, str] | None = None, keep: bool,
) -> Iterator[Path]:  # fmt: skip
    """Yield a folder with the safe files of a repository: of an offline bundle, or downloaded.

    Another run that wants the same waits until the block is left; then the folder is removed, or
    kept for the next time. `pins` are the SHA-256 checksums that files must have: of all weights, if
    of any. What a killed run or a source that failed left behind is gone on with. Raises UserError
    with each source's reason and the ways on, DiskFullError where there is no room.
    """
    own_name = folder_name(kind, name, revision)
    downloads.mkdir(parents=True, exist_ok=True)
    with _only_run(downloads / f"{own_name}.lock", f"{kind} {name}"):
        failures = []
        if listed := bundled_files(downloads, kind, own_name):
            check_pins(listed, pins or {})
            place = offline_folder(downloads) / "hub" / own_name
            logger.info("taking %s %s at %s from %s", kind, name, revision, place)
            yield place
            return
        if others := bundled_names(downloads):
            here = offline_folder(downloads)
            failures.append(f"{here} holds {others}, this config needs {own_name}")
            logger.warning("%s", failures[0])
        folder = downloads / own_name
        folder.mkdir(exist_ok=True)
        download(kind, name, revision, folder, pins or {}, failures)
        yield folder
        if not keep:
            shutil.rmtree(folder)


@contextlib.contextmanager
def _only_run(path: Path, what: str) -> Iterator[None]:
    """Hold the lock at `path` during the block, so that two runs do not fetch the same at once."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("another run is at %s: waiting for it", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def folder_name(kind: Kind, name: str, revision: str) -> str:
    """Return how the folder of a repository is called."""
    return f"{kind}s--{name}@{revision}".replace("/", "--")


def bundled_files(downloads: Path, kind: Kind, name: str) -> list[RemoteFile]:
    """Return the files that an offline bundle has of a repository, after a look at their bytes."""
    files = bundled_repository(downloads, name)
    if unsafe := [str(path) for path in files if not is_safe(path.name, kind)]:
        raise UserError(
            f"{offline_folder(downloads)}: {list_faults(unsafe)} in {name} could run code; remove"
            " the folder and make the bundle again"
        )
    return [
        RemoteFile(str(path), "", entry["size"], entry["sha256"]) for path, entry in files.items()
    ]


def download(
    kind: Kind, name: str, revision: str, folder: Path, pins: Mapping[str, str],
    failures: Sequence[str] = (),
) -> None:  # fmt: skip
    """Download a repository into `folder`, trying the sources in turn.

    `failures` are the places that were looked into before.
    """
    sources = os.environ.get("POCKETTUNE_HUB_SOURCES", "huggingface").split()
    failures = list(failures)
    for position, source in enumerate(map(read_source, sources)):
        logger.info("fetching %s %s at %s from %s", kind, name, revision, source.text)
        try:
            return _download_from(source, kind, name, revision, folder, pins)
        except DiskFullError:
            raise
        except Exception as error:
            failures.append(f"{source.text}: {_reason(error)}")
        if position + 1 < len(sources):
            logger.warning("%s; trying %s", failures[-1], sources[position + 1])
    local = "model.path" if kind == "model" else "dataset.files"
    raise UserError(
        f"{kind} {name} at {revision} could not be fetched: {'; '.join(failures)}. "
        f"Ways on: hub.sources, another mirror; {local}, files you already have; an offline bundle"
        " made where there is a network (docs/network.md)"
    )


def is_safe(name: str, kind: Kind = "model") -> bool:
    """Whether a file of this name is of a kind that cannot run code."""
    patterns = SAFE_FILES if kind == "model" else SAFE_FILES + SAFE_ARCHIVES
    return any(fnmatchcase(PurePosixPath(name).name, pattern) for pattern in patterns)


def refuse_outside(repository: str, names: Iterable[str]) -> None:
    """Raise UserError where a name that came from a hub leads out of the repository's folder.

    Read as Windows reads it, which takes both slashes and drives.
    """
    outside = [name for name in names if ".." in PureWindowsPath(name).parts or "://" in name
               or name.startswith("~") or PureWindowsPath(name).anchor]  # fmt: skip
    if outside:
        raise UserError(
            f"{repository} names files outside its own folder: {list_faults(outside)};"
            " nothing of it is used; take another, or files of your own"
        )


def _download_from(
    source: Source, kind: Kind, name: str, revision: str, folder: Path, pins: Mapping[str, str]
) -> None:
    """Bring `folder` to what a source has: the safe files, each with its checksum, and no others."""
    token = token_for(source, os.environ.get("POCKETTUNE_SEND_TOKEN_TO", "").split())
    try:
        listed = list_files(source, kind, name, revision, token, bool(pins))
        refuse_outside(f"{kind} {name}", (file.path for file in listed))
        # Of a model, what lies in folders is another format's; a name counts once.
        files = list({file.path: file for file in listed if is_safe(file.path, kind)
                      and (kind == "dataset" or "/" not in file.path)}.values())  # fmt: skip
        if not files:
            raise UserError(f"of its {len(listed)} files none is text, a table or safetensors")
        files = [pin(f, pins[f.path]) if f.path in pins else f for f in check_pins(files, pins)]
        missing = [file for file in files if not _is_right(folder / file.path, file)]
        with open_session(source, token) as session:
            _fetch(session, missing, folder)
    except Exception as error:
        if token or not _is_refusal(error):
            raise
        raise UserError(f"it wants a token, none was sent (hub.send_token_to): {error}") from error
    kept = {folder / file.path for file in files}
    for path in sorted(folder.rglob("*"), reverse=True):  # what another source had besides
        if path.is_file() and path not in kept:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def check_pins(files: list[RemoteFile], pins: Mapping[str, str]) -> list[RemoteFile]:
    """Return the files; raise UserError where a hub says itself that they are not the pinned ones."""
    found = {file.path: file.sha256 for file in files}
    if faults := [
        f"model.sha256 is {digest}, but its {path} has {found[path]}"
        for path, digest in pins.items()
        if found.get(path, digest) not in (digest, None)
    ]:
        raise UserError(f"{list_faults(faults)}: these are not the pinned weights")
    absent = [path for path in pins if path not in found]
    loose = [f"{path}: {digest}" for path, digest in found.items()
             if pins and path.endswith(".safetensors") and path not in pins]  # fmt: skip
    if absent or loose:
        raise UserError(
            f"model.sha256 pins {list_faults(list(pins))}, its weights are"
            f" {list_faults(loose or ['others'])}; name each file with its checksum"
        )
    return files


def _fetch(session: requests.Session, files: list[RemoteFile], folder: Path) -> None:
    """Fetch files several at once; the first that fails ends them all, and what came is kept."""
    partials = folder / PARTIAL
    partials.mkdir(exist_ok=True)
    total = sum(file.size or 0 for file in files)
    needed = total - disk.used_bytes(partials)  # a killed run may have left some
    disk.require_space(folder, needed)
    stop = threading.Event()
    with (
        disk.tell_full_disk(folder, folder, total),
        _progress(total, stop) as (tell, pause),
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        jobs = [pool.submit(_fetch_one, session, file, folder, tell, pause) for file in files]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_one(
    session: requests.Session, file: RemoteFile, folder: Path,
    tell: Callable[[int], None], pause: Callable[[float], object],
) -> None:  # fmt: skip
    """Fetch one file and move it to its place when its checksum is right."""
    # The same on every source that has the same file.
    known = f"{file.path} {file.sha256 or file.blob_id}"
    partial = folder / PARTIAL / hashlib.sha256(known.encode()).hexdigest()
    for resumed in [True, False] if partial.exists() else [False]:
        try:
            fetch_file(session, file.url, file.size, partial, tell=tell, pause=pause)
        except UserError as error:
            raise UserError(f"{file.path}: {error}") from error
        partial.touch()  # an empty one
        if _is_right(partial, file):
            break
        checksum = _checksum(partial, file)
        partial.unlink()
        if not resumed:  # else what lay there, of another source or run, may be the wrong part
            expected = file.sha256 or file.blob_id or ""
            raise UserError(
                f"{file.path} was damaged on the way: its checksum is {checksum[:12]}…,"
                f" it should be {expected[:12]}…; the file is removed"
            )
    target = folder / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(target)


def _checksum(path: Path, file: RemoteFile) -> str:
    """Return the checksum of `path` of the kind that is known of the file."""
    return git_blob_id(path) if file.blob_id and not file.sha256 else sha256(path)


def _is_right(path: Path, file: RemoteFile) -> bool:
    """Whether the file lies at `path`, whole; of one without a checksum the size tells."""
    if not path.is_file():
        return False
    if file.size is not None and path.stat().st_size != file.size:
        return False
    expected = file.sha256 or file.blob_id
    return expected is None or _checksum(path, file) == expected


@contextlib.contextmanager
def _progress(
    total: int, stop: threading.Event
) -> Iterator[tuple[Callable[[int], None], Callable[[float], None]]]:
    """Yield what hears of bytes and shows MB, and what waits seconds.

    Both end the thread that calls them, by an exception, once `stop` is set.
    """
    lock, received = threading.Lock(), 0
    bar = program.progress(None, description="fetching", unit="MB", total=round(total / 1e6))

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise InterruptedError("another file failed")

    def tell(count: int) -> None:
        nonlocal received
        pause(0)
        with lock:
            received += count
            bar.update(received // 1_000_000 - bar.n)

    try:
        yield tell, pause
    finally:
        bar.close()


def _is_refusal(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, is a hub that wants to know who asks."""
    while error is not None:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            return True
        error = error.__cause__
    return False


def _reason(error: Exception) -> str:
    """Return what went wrong in a few words, without secrets, before half of one is cut off."""
    text = redact(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
