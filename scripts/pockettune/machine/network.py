"""Whether the places that a run fetches from answer, and have what it needs.

Small questions, all at once, each with a time limit, and none with a token: a repository that needs
one counts as not to be had, and the line says so.
"""

import http.client
import json
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pockettune.common.redaction import redact
from pockettune.machine.findings import Finding, TooLateError, side_by_side
from pockettune.machine.run import Run

SECONDS = 4.0  # for one question; two in a row at most
MOST_BYTES = 4_000_000  # of an answer: the file list of a large repository
PACKAGE = "llama-cpp-python"  # what the converter comes with

Repository = tuple[str, str, str]  # model or dataset, name, revision


@dataclass(frozen=True)
class Source:
    """An entry of hub.sources: huggingface, a mirror's address, modelscope, modelscope:address."""

    text: str

    @property
    def is_modelscope(self) -> bool:
        return self.text == "modelscope" or self.text.startswith("modelscope:")

    @property
    def address(self) -> str:
        """Its address without a login, as the hub's own client would take it."""
        if self.text == "huggingface":
            address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        elif self.text == "modelscope":
            address = os.environ.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn"
        else:
            address = self.text.removeprefix("modelscope:")
        return without_login(address).rstrip("/")

    def listing(self, kind: str, name: str, revision: str) -> str:
        """Return the address of a repository's list of files."""
        if not self.is_modelscope:
            return f"{self.address}/api/{kind}s/{name}/revision/{urllib.parse.quote(revision, safe='')}?blobs=true"
        # Its history is its own: a commit of Hugging Face names nothing there.
        branch = "master" if len(revision) == 40 else urllib.parse.quote(revision)
        what = "files" if kind == "model" else "tree"
        return f"{self.address}/api/v1/{kind}s/{name}/repo/{what}?Revision={branch}&Recursive=True&PageNumber=1&PageSize=200"

    def file(self, name: str, revision: str, file: str) -> str:
        """Return the address of a model's file."""
        if not self.is_modelscope:
            return f"{self.address}/{name}/resolve/{urllib.parse.quote(revision, safe='')}/{file}"
        branch = "master" if len(revision) == 40 else urllib.parse.quote(revision)
        return f"{self.address}/api/v1/models/{name}/repo?Revision={branch}&FilePath={file}"


@dataclass(frozen=True)
class Reply:
    """What a source answered about a repository."""

    source: Source
    repository: Repository
    seconds: float = 0.0
    fault: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)  # bytes of each file


def hub_sources(hub: Mapping[str, Any]) -> list[Source]:
    """Return hub.sources in their order."""
    return [Source(text) for text in hub["sources"]]


def without_login(address: str) -> str:
    """Return an address without the user name and password that may stand in it."""
    parts = urllib.parse.urlsplit(address)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def get(address: str) -> bytes:
    """Return what stands at an address; OSError, in words for a user, where it does not come."""
    context = ssl.create_default_context()
    try:
        import certifi  # what the hubs' clients trust, besides the system's own

        context.load_verify_locations(certifi.where())
    except ImportError:
        pass
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
    opener.addheaders = [("User-Agent", "pockettune-doctor")]
    try:
        with opener.open(address, timeout=SECONDS) as answer:
            content: bytes = answer.read(MOST_BYTES)
            return content
    except urllib.error.HTTPError as error:
        words = {
            401: "asks for a login",
            403: "refuses",
            404: "does not have it",
            407: "the proxy asks for a login",
        }
        raise OSError(
            f"{words.get(error.code, 'answers with an error')} (HTTP {error.code})"
        ) from error
    except TimeoutError as error:
        raise OSError(f"no answer in {SECONDS:.0f} s") from error
    except urllib.error.URLError as error:
        late = isinstance(error.reason, TimeoutError)
        raise OSError(
            f"no answer in {SECONDS:.0f} s" if late else f"cannot be reached: {error.reason}"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(f"cannot be reached: {error}") from error


def ask_source(source: Source, repository: Repository) -> Reply:
    """Ask a source for a repository's files."""
    begun = time.perf_counter()
    try:
        content = get(source.listing(*repository))
        sizes = read_modelscope(content) if source.is_modelscope else read_huggingface(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        # Not a hub's answer: a login page of the network, say.
        fault = (
            str(error)
            if type(error) is OSError
            else "answers, but not as a hub does: is there a login page in between?"
        )
        return Reply(source, repository, time.perf_counter() - begun, fault)
    return Reply(source, repository, time.perf_counter() - begun, None, sizes)


def read_huggingface(content: bytes) -> dict[str, int]:
    """Return the files of Hugging Face's answer and their bytes."""
    return {entry["rfilename"]: entry.get("size") or 0 for entry in json.loads(content)["siblings"]}


def read_modelscope(content: bytes) -> dict[str, int]:
    """Return the files of ModelScope's answer and their bytes."""
    data = json.loads(content)["Data"]
    files = data if isinstance(data, list) else data["Files"]
    return {entry["Path"]: entry.get("Size") or 0 for entry in files if entry["Type"] != "tree"}


def ask_all(run: Run) -> list[Reply]:
    """Ask every source for every repository that is still to be fetched."""
    calls = {}
    for source in hub_sources(run.settings["hub"]):
        for repository in run.missing_repositories():
            calls[f"{source.text} {repository[0]}"] = (source, repository)
    end = min(time.monotonic() + SECONDS + 0.5, run.end)
    asked = {name: (lambda pair=pair: ask_source(*pair)) for name, pair in calls.items()}
    return [
        Reply(*calls[name], SECONDS, f"no answer in {SECONDS:.0f} s") if isinstance(reply, Exception) else reply
        for name, reply in side_by_side(asked, end)
    ]  # fmt: skip


def first_with(replies: list[Reply], kind: str) -> Reply | None:
    """Return the first source's reply that has the repository of a kind."""
    return next((r for r in replies if r.repository[0] == kind and r.fault is None), None)


def fetch_model_config(run: Run) -> dict[str, Any] | None:
    """Return config.json of a model that is not here yet; None where no source gives it."""
    reply = first_with(run.facts["replies"](), "model")
    if reply is None:
        return None
    _, name, revision = reply.repository
    try:
        return dict(json.loads(get(reply.source.file(name, revision, "config.json"))))
    except (OSError, ValueError, TypeError):
        return None


def check_sources(run: Run) -> list[Finding]:
    """Each source, and whether what is missing comes from one of them."""
    missing = run.missing_repositories()
    if not missing:
        return [Finding("sources", "ok", "no hub was asked: model and dataset are here, or local")]
    replies: list[Reply] = run.facts["replies"]()
    findings = []
    for source in hub_sources(run.settings["hub"]):
        own = [reply for reply in replies if reply.source == source]
        others = all(r.fault is None or first_with(replies, r.repository[0]) for r in own)
        spare = (
            "another source has it; put that one first"
            if others
            else "resources/offline is here"
            if run.has_bundle
            else ""
        )
        findings.append(describe_source(source, own, spare))
    return findings


def describe_source(source: Source, replies: list[Reply], spare: str) -> Finding:
    """Return a source's line; what it lacks is a problem unless something else has it."""
    place = (
        source.text
        if source.text.startswith("http")
        else f"{source.text.partition(':')[0]} ({source.address})"
    )
    told = "; ".join(
        redact(f"{reply.repository[0]} {reply.repository[1]} {reply.fault or f'in {reply.seconds:.1f} s'}")
        for reply in replies
    )  # fmt: skip
    name = f"source {without_login(place)}"
    if all(reply.fault is None for reply in replies):
        return Finding(name, "ok", told)
    if spare:
        return Finding(name, "warning", told, f"nothing: {spare}")
    return Finding(
        name,
        "problem",
        told,
        "name others under `hub:` (a mirror such as https://hf-mirror.com, or modelscope), or use files of your own: model.path, dataset.files",
    )


def default_index() -> str:
    """Return the index that pip asks where none is set."""
    from pip._internal.models.index import PyPI  # which prints it nowhere

    return str(PyPI.simple_url)


def package_places(settings: str, environment: Mapping[str, str]) -> list[str]:
    """Return where pip looks for packages, out of what `pip config list` prints."""
    known: dict[str, str] = {}
    for line in settings.splitlines():
        if match := re.match(r"(global|download|:env:)\.([\w-]+)='(.*)'$", line):
            known[match[2]] = match[3]  # pip prints what weighs more later
    places = [known.get("index-url") or default_index()]
    if known.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        places = []
    return [
        *places,
        *known.get("extra-index-url", "").split(),
        *known.get("find-links", "").split(),
    ]


def ask_package_place(place: str) -> str | None:
    """Return what keeps a place from giving llama-cpp-python; None where it has it."""
    path = (
        Path(urllib.parse.unquote(urllib.parse.urlsplit(place).path))
        if place.startswith("file:")
        else Path(place)
    )
    if not place.startswith("http"):
        found = [path / PACKAGE, *path.glob("llama_cpp_python-*")]
        return None if any(entry.exists() for entry in found) else "does not have it"
    try:
        get(f"{without_login(place).rstrip('/')}/{PACKAGE}/")
    except OSError as error:
        return str(error)
    return None


def check_package_index(run: Run) -> list[Finding]:
    """Where pip would take llama.cpp's converter from, unless it is here."""
    name = "package index"
    archive = run.path(f"resources/downloads/llama_cpp_python-{run.converter_version}.tar.gz")
    if run.converter.is_dir() or archive.is_file():
        return [Finding(name, "ok", "not asked: llama.cpp's converter is here")]
    command = [sys.executable, "-B", "-m", "pip", "config", "list"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    begun = time.monotonic()
    places = package_places(said, os.environ)
    calls = {place: (lambda place=place: ask_package_place(place)) for place in places}
    answers = dict(side_by_side(calls, min(begun + SECONDS + 0.5, run.end)))
    late = f"no answer in {SECONDS:.0f} s"
    told = "; ".join(
        f"{without_login(place)} {(late if isinstance(fault, TooLateError) else fault) or 'has it'}"
        for place, fault in answers.items()
    )
    if any(fault is None for fault in answers.values()):
        return [
            Finding(name, "ok", redact(f"{PACKAGE} in {time.monotonic() - begun:.1f} s: {told}"))
        ]
    if run.has_bundle:
        return [
            Finding(
                name, "warning", redact(f"{PACKAGE}: {told}"), "nothing: resources/offline is here"
            )
        ]
    return [
        Finding(
            name,
            "problem",
            redact(f"{PACKAGE}: {told or 'pip has nowhere to look'}"),
            f"set PIP_INDEX_URL to a mirror, or put {archive.name} into resources/downloads",
        )
    ]
