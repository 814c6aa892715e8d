"""Asks a hub what a repository holds: which files, of what size and checksum, and where each is.

A source is an address and the protocol that it speaks, Hugging Face's or ModelScope's. Their own
clients ask, since they know their hubs; the files are then fetched by transfer.py, alike from both.
"""

import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal
from urllib.parse import urlsplit

import requests

from pockettune.common.errors import UserError
from pockettune.common.program import logger
from pockettune.sources.transfer import stall_seconds

Kind = Literal["model", "dataset"]
Protocol = Literal["huggingface", "modelscope"]

# Where a hub's own token goes without being asked for.
OWN_HOSTS = {
    "huggingface": {"huggingface.co"},
    "modelscope": {"modelscope.cn", "www.modelscope.cn", "modelscope.ai", "www.modelscope.ai"},
}


@dataclass(frozen=True)
class Source:
    """A place to fetch from."""

    text: str  # as config.yaml names it
    protocol: Protocol
    address: str  # without a slash at its end; may hold a login, user:password@


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository."""

    path: str  # in the repository
    url: str
    size: int | None  # bytes
    sha256: str | None
    blob_id: str | None = None  # as git names it; all that Hugging Face tells of a small file


def read_source(text: str) -> Source:
    """Return the source that an entry of hub.sources means."""
    if text == "huggingface":
        address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    elif text == "modelscope":
        address = os.environ.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn"
    else:
        address = text.removeprefix("modelscope:")
    protocol: Protocol = "modelscope" if text.startswith("modelscope") else "huggingface"
    return Source(text, protocol, address.rstrip("/"))


def token_for(source: Source, named: Iterable[str]) -> str | None:
    """Return the user's token for the source's hub, or None where it must not be sent there.

    It goes to the hub's own hosts and to those `named` in hub.send_token_to, over https; over http
    only to a loopback address that is named.
    """
    url = urlsplit(source.address)
    host = url.hostname or ""
    asked = host in {name.lower() for name in named}
    if url.scheme != "https" and not (asked and _is_loopback(host)):
        return None
    if not asked and host not in OWN_HOSTS[source.protocol]:
        return None
    if source.protocol == "huggingface":
        from huggingface_hub import get_token

        return get_token()
    from modelscope_hub.config import HubConfig

    return HubConfig().token


def open_session(source: Source, token: str | None) -> requests.Session:
    """Return a session that sends the token to the source's host and to no other.

    requests leaves Authorization out where a redirect leads to another host, port or to plain http,
    and a cookie stays with its domain.
    """
    session = requests.Session()
    if token:
        session.headers["Authorization"] = f"Bearer {token}"
        if source.protocol == "modelscope":  # its older servers read this cookie alone
            url = urlsplit(source.address)
            session.cookies.set("m_session_id", token, domain=url.hostname or "", path="/",
                                secure=url.scheme == "https")  # fmt: skip
    return session


def list_files(
    source: Source, kind: Kind, name: str, revision: str, token: str | None, pinned: bool
) -> list[RemoteFile]:
    """Return the files of a repository at a revision.

    `pinned` says that checksums of the weights are known, so that another hub's commit may stand
    for the one that was asked for. Raises UserError, or what the hub's client raises.
    """
    if source.protocol == "huggingface":
        return _list_huggingface(source, kind, name, revision, token)
    return _list_modelscope(source, kind, name, revision, token, pinned)


def _list_huggingface(
    source: Source, kind: Kind, name: str, revision: str, token: str | None
) -> list[RemoteFile]:
    from huggingface_hub import HfApi, hf_hub_url

    # token=False, because None would send the stored one to any address.
    api = HfApi(endpoint=source.address, token=token or False)
    info = api.repo_info(name, repo_type=kind, revision=revision, files_metadata=True,
                         timeout=stall_seconds())  # fmt: skip
    if is_commit(revision) and info.sha != revision:
        raise UserError(f"it answers with the commit {info.sha} instead")
    files = []
    for file in getattr(info, "siblings", None) or []:
        url = hf_hub_url(name, file.rfilename, repo_type=kind, revision=info.sha or revision,
                         endpoint=source.address)  # fmt: skip
        digest = file.lfs.sha256 if file.lfs else None
        # The id of a large file is that of a pointer to it, not its own.
        blob_id = None if file.lfs else file.blob_id
        files.append(RemoteFile(file.rfilename, url, file.size, digest, blob_id))
    return files


def _list_modelscope(
    source: Source, kind: Kind, name: str, revision: str, token: str | None, pinned: bool
) -> list[RemoteFile]:
    from modelscope_hub import HubApi
    from modelscope_hub.errors import APIError

    # An empty token, because None would send the stored one to any address.
    api = HubApi(endpoint=source.address, token=token or "")
    revision = "master" if revision == "main" else revision  # each hub's name of the same thing
    try:
        listed = api.list_repo_files(name, kind, revision=revision)
    except APIError as error:
        # It has a history of its own: a commit of Hugging Face names nothing there.
        if not is_commit(revision) or error.status_code in (401, 403):
            raise
        if not pinned:
            key = "model.sha256" if kind == "model" else "a revision of ModelScope's own"
            raise UserError(
                f"it does not know the commit {revision[:12]}…, and nothing else would tell that"
                f" its files are the same; give {key}"
            ) from error
        logger.info("%s does not know the commit %s: taking its default branch, whose weights must"
                    " have the pinned checksum", source.text, revision)  # fmt: skip
        revision = "master"
        listed = api.list_repo_files(name, kind, revision=revision)
    return [
        RemoteFile(
            file.path,
            api.legacy.get_download_url(name, kind, file.path, revision),
            file.size or None,  # 0 stands for unknown too
            file.sha256,
        )
        for file in listed
        if not file.is_dir
    ]


def pin(file: RemoteFile, digest: str) -> RemoteFile:
    """Return the file with the checksum that it must have, whatever its hub says."""
    return replace(file, sha256=digest)


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit, which never moves."""
    return len(revision) == 40 and set(revision) <= set("0123456789abcdef")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
