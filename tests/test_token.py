"""A token or a password is used, and is in nothing that is told, logged or made."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from modelscope_hub.config import HubConfig

from conftest import SECRET, run_program, run_snakemake
from loopback_hub import COMMIT, LoopbackHub, _Handler, serve
from pockettune.common.errors import UserError
from pockettune.common.redaction import redact
from pockettune.sources import hub as hub_module
from pockettune.sources.listings import read_source, token_for

NAME = "somebody/tiny"
PASSWORD = "pass%20wordOfUser"
# As the token is sent, as the password is written, meant, and sent.
SECRETS = [SECRET, PASSWORD, "pass wordOfUser", "dXNlcjpwYXNzIHdvcmRPZlVzZXI="]


class Echo(_Handler):
    """Repeats what it was sent when it refuses, as careless servers do."""

    refuse: int | None = None  # status
    heard: str = ""

    def answer(self, send_body: bool) -> None:
        sent = f"{self.headers.get('Authorization')} {self.headers.get('Cookie')}"
        Echo.heard += sent
        if Echo.refuse is None:
            return super().answer(send_body)
        told = f"you sent {sent} to http://{self.headers['Host']}{self.path}?token={SECRET}"
        body = json.dumps({"error": told, "message": told, "Message": told}).encode()
        self.send_response(Echo.refuse, told)
        self.send_header("X-Error-Message", told)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send_body:
            self.wfile.write(body)


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub that has a model and a dataset; the environment holds tokens and its address a login."""
    repository = Path(shutil.copytree(tiny_model, tmp_path / "repository"))
    for split in ("train", "validation", "test"):
        (repository / f"{split}.csv").write_text("text,label\n好,1\n差,0\n")
    monkeypatch.setattr(LoopbackHub, "finish_request", lambda self, r, a: Echo(r, a, self))
    monkeypatch.setattr(Echo, "refuse", None)
    monkeypatch.setattr(Echo, "heard", "")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.delenv("POCKETTUNE_SEND_TOKEN_TO", raising=False)
    with serve(repository, NAME) as hub:
        yield hub


def with_login(entry: str) -> str:
    return entry.replace("://", f"://user:{PASSWORD}@")


def assert_clean(text: str) -> None:
    assert [secret for secret in SECRETS if secret in text] == []


def fetch(folder: Path, log: Path) -> subprocess.CompletedProcess[str]:
    settings = {"model": {"name": NAME, "revision": COMMIT, "path": None}}
    return run_program("fetch_model.py", "--settings", json.dumps(settings), "--downloads",
                       folder / "downloads", "--output", folder / "model", "--log", log)  # fmt: skip


@pytest.mark.parametrize(
    ("address", "named", "goes"),
    [
        ("https://huggingface.co", [], True),
        ("https://HuggingFace.co/", [], True),
        ("http://huggingface.co", [], False),
        ("http://huggingface.co", ["huggingface.co"], False),
        ("https://hf-mirror.com", [], False),
        ("https://hf-mirror.com", ["hf-mirror.com"], True),
        ("https://hf-mirror.com:8443/hub", ["HF-mirror.com"], True),
        ("http://hf-mirror.com", ["hf-mirror.com"], False),
        ("https://huggingface.co.evil.example", [], False),
        ("https://evil.example/huggingface.co", [], False),
        ("https://huggingface.co@evil.example", [], False),
        ("https://evil.example#huggingface.co", [], False),
        ("https://sub.huggingface.co", [], False),
        ("https://modelscope.cn", [], False),
        ("http://127.0.0.1:8000", [], False),
        ("http://127.0.0.1:8000", ["127.0.0.1"], True),
        ("http://localhost:8000", ["localhost"], True),
        ("http://localhost.evil.example", ["localhost"], False),
        ("modelscope:https://modelscope.cn", [], True),
        ("modelscope:https://www.modelscope.cn", [], True),
        ("modelscope:https://www.modelscope.ai", [], True),
        ("modelscope:http://www.modelscope.cn", [], False),
        ("modelscope:https://huggingface.co", [], False),
    ],
)
def test_where_a_token_goes(
    address: str, named: list[str], goes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    assert token_for(read_source(address), named) == (SECRET if goes else None)


@pytest.mark.parametrize("kept", ["in the environment", "in a file"])
@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_token_goes_to_no_mirror_that_is_not_named(
    source: str, kept: str, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kept == "in a file":
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms"))
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf/token").write_text(SECRET)
        HubConfig().save_token(SECRET)
    monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", hub.entry(source))
    result = fetch(tmp_path, tmp_path / "log")
    assert result.returncode == 0, result.stdout
    assert SECRET not in "".join(hub.headers)
    shutil.rmtree(tmp_path / "model")
    monkeypatch.setenv("POCKETTUNE_SEND_TOKEN_TO", "127.0.0.1")
    assert fetch(tmp_path, tmp_path / "log").returncode == 0
    listings = [h for h in hub.headers if "/api/" in h and "FilePath" not in h]
    files = [h for h in hub.headers if h not in listings]
    assert SECRET in "".join(listings) and SECRET in "".join(files), "it goes where it is named"


@pytest.mark.parametrize("what", ["/resolve/|FilePath", "/api/models|/repo/files"])
@pytest.mark.parametrize("sent", ["token", "login"])
@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_redirect_takes_no_secret_to_another_host(
    source: str, sent: str, what: str, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    entry = with_login(hub.entry(source)) if sent == "login" else hub.entry(source)
    monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", entry)
    monkeypatch.setenv("POCKETTUNE_SEND_TOKEN_TO", "127.0.0.1 localhost")
    with serve(hub.folder, NAME) as other:
        hub.elsewhere = other.address.replace("127.0.0.1", "localhost")
        hub.redirected = what
        result = fetch(tmp_path, tmp_path / "log")
    assert result.returncode == 0, result.stdout
    assert other.requests
    asked = "".join(h for h in hub.headers if re.search(what, h))
    assert (SECRETS[-1] if sent == "login" else SECRET) in asked
    assert_clean("".join(other.headers))


def test_refusal_without_a_token_says_how_to_send_one(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Echo, "refuse", 401)
    monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", hub.address)
    assert (
        "it wants a token, none was sent (hub.send_token_to)"
        in fetch(tmp_path, tmp_path / "log").stdout
    )


@pytest.mark.parametrize("sent", ["token", "login"])
@pytest.mark.parametrize("status", [401, 404])
@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_refusal_that_repeats_the_secret(
    source: str, status: int, sent: str, hub: LoopbackHub, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Echo, "refuse", status)
    # A login in the address takes the place of the token.
    entry = with_login(hub.entry(source)) if sent == "login" else hub.entry(source)
    monkeypatch.setenv("POCKETTUNE_HUB_SOURCES", entry)
    monkeypatch.setenv("POCKETTUNE_SEND_TOKEN_TO", "127.0.0.1")
    log = tmp_path / "fetch.log"
    result = fetch(tmp_path, log)
    assert result.returncode == 2, result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"{NAME} at {COMMIT} could not be fetched: " in lines[0]
    assert (SECRETS[-1] if sent == "login" else SECRET) in Echo.heard, "it is used"
    assert_clean(result.stdout + log.read_text())


def test_secrets_are_hidden_before_a_message_is_cut(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half of a token at the end of a shortened message is no token that could be found."""

    def fail(*_: object) -> None:
        raise RuntimeError("x" * 290 + SECRET)

    monkeypatch.setattr(hub_module, "list_files", fail)
    with pytest.raises(UserError) as caught:
        hub_module.download("model", NAME, COMMIT, tmp_path / "downloads", {})
    assert "hf_" not in str(caught.value)


def test_words_that_are_no_secrets_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_TOKEN", "the")
    text = "hf_hub_download of the https://huggingface.co/a/b?x=c@d failed; write to a@b.c"
    assert redact(text) == text


def test_nothing_below_the_checkout_holds_a_secret(hostile_run: Path, hub: LoopbackHub) -> None:
    """It was run with a token; now a failing and a succeeding fetch, then every file is read."""
    run = {
        "pathvars": {"results": "results/token"},
        "model": {"name": NAME, "revision": COMMIT, "sha256": None},
        "dataset": {"name": NAME, "revision": COMMIT},
        "task": {"prompt": "{text}", "labels": {"0": "差", "1": "好"}, "system": ""},
    }
    config = hostile_run / "runs/token.yaml"

    def run_with(address: str) -> subprocess.CompletedProcess[str]:
        sources = {"sources": [address], "send_token_to": ["127.0.0.1"]}
        config.write_text(yaml.safe_dump(run | {"hub": sources}, allow_unicode=True))
        return run_snakemake(hostile_run, "--configfile", "runs/token.yaml", "--keep-going", "--",
                             "results/token/tokens")  # fmt: skip

    Echo.refuse = 401
    failed = [run_with(address) for address in (hub.address, with_login(hub.address))]
    assert all(result.returncode != 0 for result in failed)
    assert {"fetch_model", "fetch_dataset"} <= {p.stem for p in (hostile_run / "results/token/logs").iterdir()}  # fmt: skip
    Echo.refuse = None
    done = run_with(hub.address)
    assert done.returncode == 0, done.stdout[-3000:]
    assert SECRET in Echo.heard and SECRETS[-1] in Echo.heard
    assert_clean("".join(result.stdout for result in (*failed, done)))
    config.unlink()  # there the user wrote the password
    files = [path for path in hostile_run.rglob("*") if path.is_file()
             and not path.is_relative_to(hostile_run / "tests")]  # fmt: skip
    assert {".log", ".html", ".md", ".gguf", ".json", ".arrow"} <= {path.suffix for path in files}
    assert any(".snakemake/metadata" in path.as_posix() for path in files)
    found = [path for path in files for secret in SECRETS if secret.encode() in path.read_bytes()]
    assert found == []
