"""The manifest beside a folder: sha256sum's own format, the same for the same content."""

import shutil
import subprocess
from pathlib import Path

from pockettune.common import program


def make_folder(folder: Path) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(b"\0" * 1000)
    (folder / "inner/一.json").write_text("{}")
    return folder


def test_sha256sum_reads_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tokens")
    program.write_manifest(folder)
    command = ["sha256sum", "--check", "--strict", "../tokens.sha256"]
    checked = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "weights: OK" in checked.stdout and len(checked.stdout.splitlines()) == 2


def test_same_content_is_the_same(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tokens")
    program.write_manifest(folder)
    copy = shutil.copytree(folder, tmp_path / "copy/tokens", copy_function=shutil.copyfile)
    program.write_manifest(copy)
    assert (tmp_path / "copy/tokens.sha256").read_bytes() == (
        tmp_path / "tokens.sha256"
    ).read_bytes()
    (copy / "weights").write_bytes(b"\0" * 999 + b"\1")
    program.write_manifest(copy)
    assert (tmp_path / "copy/tokens.sha256").read_bytes() != (
        tmp_path / "tokens.sha256"
    ).read_bytes()
