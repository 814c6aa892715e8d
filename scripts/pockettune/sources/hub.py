"""Downloads a model or dataset repository from Hugging Face, a mirror of it, or ModelScope.

Where from is read from the environment, not from a rule's parameters, because it does not decide
what comes: POCKETTUNE_HUB (huggingface, modelscope) and POCKETTUNE_HUB_ENDPOINT, which
rules/common.smk sets from config.yaml's `hub:`.
"""

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath
from typing import Literal

from pockettune.common import disk
from pockettune.common.checksums import git_blob_id, sha256
from pockettune.common.errors import UserError, list_faults
from pockettune.common.program import logger
from pockettune.common.redaction import redact

Kind = Literal["model", "dataset"]

# Text, tables and safetensors. Pickles (*.bin, *.pt) and Python files can run code: never fetched.
SAFE_FILES = ["*.json", "*.jsonl", "*.txt", "*.jinja", "*.model", "*.safetensors", "*.csv", "*.tsv",
              "*.parquet", "*.arrow", "*.md", "LICENSE*"]  # fmt: skip

# Names that lead out of the repository's folder. ModelScope's client (1.40.2) would write there.
OUTSIDE = ["/*", "../*", "*/../*", "*\\*", "*:*"]


def download(kind: Kind, name: str, revision: str, folder: Path) -> None:
    """Download the safe files of a repository into `folder`, going on where a killed run stopped.

    Raises UserError with the three ways on when the hub cannot be reached or does not have it,
    DiskFullError where there is no room for it.
    """
    source = os.environ.get("POCKETTUNE_HUB", "huggingface")
    endpoint = os.environ.get("POCKETTUNE_HUB_ENDPOINT") or None
    fetch = {"huggingface": _from_huggingface, "modelscope": _from_modelscope}[source]
    logger.info("fetching %s %s at %s from %s", kind, name, revision, endpoint or source)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        fetch(kind, name, revision, folder, endpoint)
    except UserError:
        raise
    except Exception as error:
        local = "model.path" if kind == "model" else "dataset.files"
        reason = redact(str(error))[:300] or type(error).__name__  # before half a token is cut off
        raise UserError(
            f"{kind} {name} at {revision} could not be fetched from {endpoint or source}: {reason}. "
            "Ways on: hub.endpoint, a mirror; hub.source: modelscope, another hub; "
            f"{local}, files you already have"
        ) from error


def is_safe(name: str) -> bool:
    """Whether a file of this name is of a kind that cannot run code."""
    return any(fnmatch(name, pattern) for pattern in SAFE_FILES)


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


def _from_huggingface(
    kind: Kind, name: str, revision: str, folder: Path, endpoint: str | None
) -> None:
    if endpoint:
        # Xet transfers go to Hugging Face's own servers whatever the endpoint
        # (huggingface_hub issue 4475), which is what a mirror is there to avoid.
        os.environ["HF_HUB_DISABLE_XET"] = "1"
    # Imported here because huggingface_hub reads the variable above at import.
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    info = api.repo_info(name, repo_type=kind, revision=revision, files_metadata=True)
    files = getattr(info, "siblings", None) or []
    refuse_outside(f"{kind} {name}", (file.rfilename for file in files))
    needed = sum(file.size or 0 for file in files if is_safe(file.rfilename))
    disk.require_space(folder, needed - disk.used_bytes(folder))  # a killed run may have left some
    with disk.tell_full_disk(folder, folder, needed):
        api.snapshot_download(
            name, repo_type=kind, revision=info.sha, local_dir=folder, allow_patterns=SAFE_FILES
        )
    for file in files:
        path = folder / file.rfilename
        if not path.exists():
            continue
        checksum, expected = (
            (sha256(path), file.lfs.sha256) if file.lfs else (git_blob_id(path), file.blob_id)
        )
        if expected and checksum != expected:
            path.unlink()
            raise UserError(
                f"{kind} {name}: {file.rfilename} was damaged on the way: its checksum is"
                f" {checksum[:12]}…, the hub says {expected[:12]}…; the file is removed, run again"
                " to fetch it anew"
            )


def _from_modelscope(
    kind: Kind, name: str, revision: str, folder: Path, endpoint: str | None
) -> None:
    # Imported here because it takes seconds and few need it.
    from modelscope.hub.snapshot_download import snapshot_download

    # ModelScope has its own history: a commit of Hugging Face names nothing there.
    known = None if len(revision) == 40 else revision
    if known is None:
        logger.info("ModelScope does not know the commit %s: taking its default branch", revision)
    with disk.tell_full_disk(folder, folder):
        snapshot_download(
            name,
            repo_type=kind,
            revision=known,
            local_dir=str(folder),
            allow_patterns=SAFE_FILES,
            ignore_patterns=OUTSIDE,
            endpoint=endpoint,
        )
