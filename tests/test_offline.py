"""The offline bundle: made from a hub, used where there is no network, and each way it can be bad."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import fetch_wllama
import pack_offline
import unpack_offline
from conftest import CONVERTER, ROOT, copy_checkout, run_snakemake
from loopback_hub import COMMIT, serve
from pack_offline import gather_wheels, write_bundle
from pockettune.common.checksums import sha256
from pockettune.sources.packages import Package, download_npm_package, download_package

NAME = "somebody/tiny"
RUN = {
    "pathvars": {"results": "results/tiny"},
    "model": {"name": NAME, "revision": COMMIT, "sha256": None},
    "dataset": {"name": NAME, "revision": COMMIT},
    "task": {"prompt": "{text}", "labels": {"0": "差", "1": "好"}, "system": ""},
}
TINY = ("--configfile", "runs/tiny.yaml")


def make_checkout(folder: Path, **changes: Any) -> Path:
    """A checkout with runs/tiny.yaml in which nothing has been fetched."""
    checkout = copy_checkout(folder)
    shutil.rmtree(checkout / "resources")
    (checkout / "runs/tiny.yaml").write_text(yaml.safe_dump(RUN | changes, allow_unicode=True))
    return checkout


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a tiny config, made as a user makes it."""
    folder = tmp_path_factory.mktemp("connected")
    repository = Path(shutil.copytree(tiny_model, folder / "repository"))
    for split in ("train", "validation", "test"):
        (repository / f"{split}.csv").write_text("text,label\n好,1\n差,0\n")
    checkout = make_checkout(folder / "checkout")
    for part in ("downloads", CONVERTER.name):  # the release that the converter is taken from
        shutil.copytree(ROOT / "resources" / part, checkout / "resources" / part)
    with serve(repository, NAME) as hub:
        sources = {"hub": {"sources": [hub.address], "send_token_to": []}}
        (checkout / "runs/tiny.yaml").write_text(yaml.safe_dump(RUN | sources, allow_unicode=True))
        result = run_snakemake(checkout, *TINY, "--", "results/tiny/offline.tar")
    assert result.returncode == 0, result.stdout[-3000:]
    return checkout / "results/tiny/offline.tar"


def unpack(bundle: Path, checkout: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run unpack_offline.py as on a machine where nothing is installed."""
    return subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "scripts/unpack_offline.py"), str(bundle),
         "--checkout", str(checkout), *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    log = tmp_path / "network"
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests/no_network"))
    monkeypatch.setenv("NO_NETWORK_LOG", str(log))
    return log


def test_the_guard_refuses(no_network: Path) -> None:
    for code in ("import socket; socket.create_connection(('127.0.0.1', 9))",
                 "import urllib.request; urllib.request.urlopen('http://localhost:9')"):  # fmt: skip
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "no network" in result.stderr
    assert len(no_network.read_text().splitlines()) >= 2


def test_run_without_a_network(bundle: Path, no_network: Path, tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "my 电脑")
    result = unpack(bundle, checkout)
    assert result.returncode == 0, result.stdout
    assert f"holds model {NAME}@{COMMIT}, dataset {NAME}@{COMMIT}, packages llama_cpp_python-" in result.stdout  # fmt: skip
    result = run_snakemake(checkout, *TINY, "--", "results/tiny/tokens", f"resources/{CONVERTER.name}")  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert not no_network.exists(), no_network.read_text()
    assert (checkout / f"resources/{CONVERTER.name}/convert_hf_to_gguf.py").exists()
    weights = f"resources/models/{NAME}@{COMMIT[:12]}/model.safetensors"
    assert sha256(checkout / weights) == sha256(bundle.parents[2] / weights)
    again = run_snakemake(checkout, *TINY, "--dry-run", "--", "results/tiny/tokens")
    assert "Nothing to be done" in again.stdout
    # The bundle stays as it was, and can be packed again from there.
    (before,) = (checkout / "resources/offline/hub").glob("models--*")
    assert (before / "model.safetensors").exists()
    result = run_snakemake(checkout, *TINY, "--", "results/tiny/offline.tar")
    assert result.returncode == 0, result.stdout[-3000:]
    assert (checkout / "results/tiny/offline.tar").read_bytes() == bundle.read_bytes()


def test_same_input_makes_the_same_bytes(tmp_path: Path) -> None:
    for name, time in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        folder.mkdir()
        files = {}
        for file in ("b", "a", "文"):
            (folder / file).write_text(f"content of {file}")
            (folder / file).chmod(0o600 if time == 1 else 0o644)
            os.utime(folder / file, (time, time))
            files[f"packages/{file}"] = folder / file
        files = dict(reversed(files.items())) if time == 1 else files
        write_bundle(files, {"model": None}, tmp_path / f"{name}.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


# --- what can be wrong with a bundle ---


def rewrite(
    bundle: Path, target: Path, change: Callable[[dict[str, Any], dict[str, bytes]], None]
) -> None:
    """Write the bundle anew, its manifest and members changed."""
    with tarfile.open(bundle) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    manifest = json.loads(members.pop("manifest.json"))
    change(manifest, members)
    with tarfile.open(target, "w") as tar:
        for name, content in {"manifest.json": json.dumps(manifest).encode(), **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def named(name: str, listed: bool = True) -> Callable[[dict[str, Any], dict[str, bytes]], None]:
    def change(manifest: dict[str, Any], members: dict[str, bytes]) -> None:
        members[name] = b"x"
        if listed:
            manifest["files"][name] = {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}

    return change


def other_python(manifest: dict[str, Any], members: dict[str, bytes]) -> None:
    manifest["holds"]["wheels"] = {"python": "3.9", "platform": "win-amd64"}
    named("wheels/a.whl")(manifest, members)


REWRITTEN = {
    "up": (named("hub/../../victim"), "names files outside its folder"),
    "top": (named("victim.json"), "names files outside its folder"),
    "absolute": (named("/tmp/victim"), "names files outside its folder"),
    "drive": (named("C:/victim"), "names files outside its folder"),
    "backslash": (named("hub\\..\\victim"), "names files outside its folder"),
    "other room": (named("scripts/victim.py"), "names files outside its folder"),
    "line break": (named("hub/a\nb"), "names files outside its folder"),
    "unlisted": (named("hub/victim", listed=False), "which its manifest does not name"),
    "format": (lambda manifest, _: manifest.update(format=2), "its format is 2, this program reads 1"),
    "no files": (lambda manifest, _: manifest.pop("files"), "is not an offline bundle: 'files'"),
    "lost": (lambda _, members: members.pop(min(members)), "ends before hub/"),
    "Python": (other_python, "are for Python 3.9 on win-amd64, this is Python "),
}  # fmt: skip


def assert_refused(bundle: Path, message: str, tmp_path: Path) -> None:
    """It is one line, and what an earlier bundle left stays as it was."""
    former = tmp_path / "checkout/resources/offline/hub/x"
    former.parent.mkdir(parents=True)
    former.write_text("former")
    result = unpack(bundle, tmp_path / "checkout")
    assert result.returncode == 2
    (line,) = result.stdout.splitlines()
    assert line.startswith("error: ") and message in line, line
    assert [path for path in (tmp_path / "checkout").rglob("*") if path.is_file()] == [former]
    assert not list((tmp_path / "checkout/resources").glob(".offline*"))
    assert not list(tmp_path.rglob("victim*"))


@pytest.mark.parametrize("case", REWRITTEN)
def test_bundle_that_is_made_wrongly(case: str, bundle: Path, tmp_path: Path) -> None:
    change, message = REWRITTEN[case]
    rewrite(bundle, tmp_path / "bad.tar", change)
    assert_refused(tmp_path / "bad.tar", message, tmp_path)


@pytest.mark.parametrize("place", [0.3, 0.999])
def test_changed_byte(place: float, bundle: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copyfile(bundle, tmp_path / "bad.tar"))
    with tarfile.open(bundle) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + last.size
    with bad.open("r+b") as file:
        file.seek(int(end * place))
        byte = file.read(1)
        file.seek(int(end * place))
        file.write(bytes([byte[0] ^ 1]))
    assert_refused(bad, "is damaged, its checksum is another; copy it again", tmp_path)


def test_nothing_is_written_before_all_is_checked(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle that is damaged at its end takes no room for what comes before."""
    bad = tmp_path / "bad.tar"
    bad.write_bytes(bundle.read_bytes()[:-20_000])
    written = []
    copy = unpack_offline.copy

    def watched(content: Any, target: Path | None) -> dict[str, Any]:
        written.append(target)
        return copy(content, target)

    monkeypatch.setattr(unpack_offline, "copy", watched)
    with pytest.raises(tarfile.TarError):
        unpack_offline.unpack_offline(bad, tmp_path)
    assert len(written) > 3 and not any(written)


@pytest.mark.parametrize("kept", [0, 100, 3000, 0.5, -20_000])
def test_truncated_bundle(kept: float, bundle: Path, tmp_path: Path) -> None:
    content = bundle.read_bytes()
    bad = tmp_path / "bad.tar"
    bad.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    assert_refused(bad, "copy it again", tmp_path)


def test_bundle_that_ends_between_two_files(bundle: Path, tmp_path: Path) -> None:
    with tarfile.open(bundle) as tar:
        place = tar.getmembers()[-1].offset
    bad = tmp_path / "bad.tar"
    bad.write_bytes(bundle.read_bytes()[:place])
    assert_refused(bad, "ends before packages/llama_cpp_python-", tmp_path)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    for name, content, message in (
        ("text", b"hello" * 300, "is not a whole offline bundle"),
        ("none", None, "No such file"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert_refused(tmp_path / name, message, tmp_path / f"in {name}")
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(ROOT / "LICENSE", "LICENSE")
    assert_refused(
        tmp_path / "other.tar", "its first file is not manifest.json", tmp_path / "in tar"
    )


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])  # fmt: skip
def test_member_that_is_no_file(kind: bytes, bundle: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tar"
    with tarfile.open(bundle) as source, tarfile.open(bad, "w") as tar:
        first = source.getmembers()[0]
        tar.addfile(first, source.extractfile(first))
        link = tarfile.TarInfo("hub/link")
        link.type, link.linkname = kind, "../../../victim"
        tar.addfile(link)
    assert_refused(bad, "which is not a file; do not use it", tmp_path)


def test_wheels_of_another_python_can_be_left_out(bundle: Path, tmp_path: Path) -> None:
    rewrite(bundle, tmp_path / "other.tar", other_python)
    result = unpack(tmp_path / "other.tar", tmp_path, "--without-wheels")
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "resources/offline/hub").is_dir()
    assert not (tmp_path / "resources/offline/wheels").exists()


def test_bundle_of_another_config_is_told_by_the_fetch(bundle: Path, tmp_path: Path) -> None:
    other = {"model": RUN["model"] | {"name": "a/b"}, "hub": {"sources": ["http://127.0.0.1:9"]}}  # type: ignore[operator]
    checkout = make_checkout(tmp_path / "checkout", **other)
    assert unpack(bundle, checkout).returncode == 0
    result = run_snakemake(checkout, *TINY, "--", f"resources/models/a/b@{COMMIT[:12]}")
    assert result.returncode != 0
    (line,) = {line for line in result.stdout.splitlines() if line.startswith("error: ")}
    held = f"resources/offline holds datasets--somebody--tiny@{COMMIT}, models--somebody--tiny@{COMMIT}, this config needs models--a--b@{COMMIT}"  # fmt: skip
    assert held in line


def test_bundle_that_changed_after_it_was_unpacked(bundle: Path, tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "checkout")
    assert unpack(bundle, checkout).returncode == 0
    (weights,) = (checkout / "resources/offline/hub").glob("models--*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    result = run_snakemake(checkout, *TINY, "--", f"resources/models/{NAME}@{COMMIT[:12]}")
    assert "model.safetensors changed since it was unpacked; unpack the bundle again" in result.stdout  # fmt: skip


def test_pinned_checksum_holds_for_a_bundle_too(bundle: Path, tmp_path: Path) -> None:
    pinned = RUN["model"] | {"sha256": "0" * 64}  # type: ignore[operator]
    checkout = make_checkout(tmp_path / "checkout", model=pinned)
    assert unpack(bundle, checkout).returncode == 0
    result = run_snakemake(checkout, *TINY, "--", f"resources/models/{NAME}@{COMMIT[:12]}")
    assert result.returncode != 0 and "these are not the pinned weights" in result.stdout


# --- what make app and make phone need ---


def test_archives_for_devices_are_found_where_the_bundle_was_unpacked(
    tmp_path: Path, no_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed from the archives of a connected machine, and neither pip nor npm is asked on the other."""
    downloads, poor, other = (tmp_path / name for name in ("connected", "poor", "other"))
    for folder in (downloads, poor, other):
        folder.mkdir()
    for name in ("always.tgz", "compiler.whl", "browser.tgz"):
        (downloads / name).write_text(name)
    compiler, browser = (
        Package(name, "1", name, sha256(downloads / name), 1)
        for name in ("compiler.whl", "browser.tgz")
    )
    monkeypatch.setattr(pack_offline, "zig_package", lambda: compiler)
    monkeypatch.setattr(fetch_wllama, "PACKAGE", browser)
    files: dict[str, dict[str, Any]] = {"model": {}, "dataset": {"files": {"train": "x"}}}
    pack = partial(pack_offline.pack_offline, files, None, ["always.tgz"], None, downloads)
    pack(tmp_path / "without.tar")
    assert not unpack(tmp_path / "without.tar", poor).returncode
    assert not (poor / "resources/offline/packages/compiler.whl").exists()
    pack(tmp_path / "with.tar", devices=True)
    result = unpack(tmp_path / "with.tar", other)
    assert "packages always.tgz, browser.tgz, compiler.whl" in result.stdout
    place = other / "resources/offline/packages"
    monkeypatch.setenv("PATH", "")
    there = other / "resources/downloads"
    assert download_package(compiler, there) == place / "compiler.whl"
    assert download_npm_package(browser, there) == place / "browser.tgz"
    assert not no_network.exists()


@pytest.mark.parametrize(("name", "options"), [("offline", "--wheels none --devices none"),
                                               ("offline-with-wheels", "--wheels all --devices none"),
                                               ("offline-with-everything", "--wheels all --devices all")])  # fmt: skip
def test_bundles_that_can_be_asked_for(name: str, options: str, tmp_path: Path) -> None:
    target = f"results/tiny/{name}.tar"
    result = run_snakemake(make_checkout(tmp_path), *TINY, "--dry-run", "--printshellcmds", "--", target)  # fmt: skip
    assert options in result.stdout and f"--output {target}" in result.stdout


# --- wheels ---


BACKEND = """
import zipfile
def _wheel(folder):
    name = "tiny_source-1.0-py3-none-any.whl"
    with zipfile.ZipFile(folder + "/" + name, "w") as z:
        z.writestr("tiny_source.py", "")
        z.writestr("tiny_source-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: tiny-source\\nVersion: 1.0\\n")
        z.writestr("tiny_source-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        z.writestr("tiny_source-1.0.dist-info/RECORD", "")
    return name
def build_wheel(folder, config_settings=None, metadata_directory=None):
    return _wheel(folder)
"""


def write_source(folder: Path, name: str) -> None:
    """Write a source release that builds itself, with nothing to install before."""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    with tarfile.open(folder / f"{name}-1.0.tar.gz", "w:gz") as tar:
        for file, text in (("pyproject.toml", project), ("backend.py", BACKEND.replace("tiny_source", name).replace("tiny-source", name)), ("PKG-INFO", metadata)):  # fmt: skip
            info = tarfile.TarInfo(f"{name}-1.0/{file}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))


def write_wheel(folder: Path, name: str, version: str, needs: str) -> None:
    """Write a wheel with nothing in it that asks for another package."""
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: {needs}\n")  # fmt: skip
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")  # fmt: skip
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


def test_wheels_are_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources become wheels, except llama.cpp's, which is built for the processor it will run on."""
    index = tmp_path / "index"
    index.mkdir()
    write_wheel(index, "tiny-wheel", "2.0", needs="tiny_source")
    for name in ("tiny_source", "llama_cpp_python"):
        write_source(index, name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(pack_offline, "BUILD_REQUIREMENTS", ("tiny-wheel",))
    (tmp_path / "requirements.txt").write_text("tiny-wheel\nllama-cpp-python\n")
    (tmp_path / "constraints.txt").write_text("tiny-wheel==2.0\n")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    gather_wheels(tmp_path / "requirements.txt", tmp_path / "constraints.txt", wheels)
    assert sorted(path.name for path in wheels.iterdir()) == [
        "llama_cpp_python-1.0.tar.gz", "tiny_source-1.0-py3-none-any.whl", "tiny_wheel-2.0-py3-none-any.whl",
    ]  # fmt: skip


def test_setup_uses_the_wheels_of_a_bundle(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    show = ["make", "--no-print-directory", "--eval", "show: ; @env | grep ^PIP_ || true", "show"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}

    def shown() -> list[str]:
        result = subprocess.run(show, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return sorted(result.stdout.splitlines())

    assert shown() == []
    (tmp_path / "resources/offline/wheels").mkdir(parents=True)
    assert shown() == ["PIP_FIND_LINKS=resources/offline/wheels", "PIP_NO_INDEX=1"]


def test_packages_of_formats_are_packed_and_installed_from_the_bundle(
    tmp_path: Path, no_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what they would bring: their list names all."""
    index, checkout = tmp_path / "index", tmp_path / "checkout"
    for folder in (index, checkout):
        folder.mkdir()
    write_source(index, "tiny_source")
    write_wheel(index, "tiny-wheel", "2.0", needs="tiny_source")
    write_wheel(index, "tiny-format", "1.0", needs="nowhere-to-be-found")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(pack_offline, "BUILD_REQUIREMENTS", ("tiny-wheel",))
    lists = [checkout / name for name in ("requirements.txt", "constraints.txt", "requirements-onnx.txt")]  # fmt: skip
    for path, text in zip(
        lists, ("tiny-wheel", "tiny-wheel==2.0", "tiny-format==1.0"), strict=True
    ):
        path.write_text(f"{text}\n")
    files: dict[str, dict[str, Any]] = {"model": {}, "dataset": {"files": {"train": "x"}}}
    pack_offline.pack_offline(
        files, None, [], (lists[0], lists[1]), tmp_path, tmp_path / "a.tar", extras=lists[2:]
    )
    assert not unpack(tmp_path / "a.tar", checkout).returncode
    monkeypatch.delenv("PIP_FIND_LINKS")
    shutil.copy(ROOT / "Makefile", checkout)
    (checkout / ".venv").symlink_to(sys.prefix)
    result = subprocess.run(
        ["make", "-o", ".venv/installed", "onnx"], cwd=checkout, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    made = sorted(path.name for path in (checkout / ".packages/onnx").iterdir())
    assert made == ["installed", "tiny_format-1.0.dist-info"]
    assert not no_network.exists()


def test_bundle_of_a_config_with_formats_holds_their_packages(tmp_path: Path) -> None:
    recipes = {"a": {"format": "onnx", "type": "int8"}, "b": {"format": "litert", "type": "dynamic_wi8_afp32"}}  # fmt: skip
    checkout = make_checkout(tmp_path, quantize=recipes)
    for kind in ("onnx", "litert"):
        (checkout / f".packages/{kind}").mkdir(parents=True)
        (checkout / f".packages/{kind}/installed").touch()
    target = "results/tiny/offline-with-wheels.tar"
    result = run_snakemake(checkout, *TINY, "--dry-run", "--printshellcmds", "--", target)
    assert "--extras requirements-onnx.txt requirements-litert.txt --constraints" in result.stdout
