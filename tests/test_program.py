"""How programs write, fail and follow imports."""

import argparse
import errno
from pathlib import Path

import pytest

from conftest import ROOT, run_program
from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.workflow.imports import imported_files


def test_output_appears_when_complete(tmp_path: Path) -> None:
    output = tmp_path / "folder/output"
    with program.staged(output) as partial:
        partial.write_text("half")
        assert not output.exists()
    assert output.read_text() == "half"
    assert [path.name for path in output.parent.iterdir()] == ["output"]


def test_failed_work_leaves_nothing_and_keeps_what_was(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.write_text("before")
    with pytest.raises(ValueError), program.staged(output) as partial:
        partial.mkdir()
        (partial / "file").write_text("half")
        raise ValueError
    assert output.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".output.0a1b2c3d.partial").mkdir()
    with program.staged(tmp_path / "output") as partial:
        assert not partial.exists()
        partial.write_text("new")
    assert (tmp_path / "output").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    """The first lives on although its snakemake was killed; the second was started by the next."""
    output = tmp_path / "output"
    with pytest.raises(FileNotFoundError), program.staged(output) as first:
        first.write_text("first, half")
        with program.staged(output) as second:
            second.write_text("second")
    assert output.read_text() == "second"


def run_failing(error: Exception, log: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    def work(_: argparse.Namespace) -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["program", "--log", str(log)])
    with pytest.raises(SystemExit) as caught:
        program.run(program.argument_parser(""), work)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_mistake_is_one_line_and_a_bug_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "a.log"
    assert run_failing(UserError("what,\n  value"), log, monkeypatch) == 2
    assert log.read_text().endswith(" error: what, value\n")
    assert "Traceback" not in log.read_text()
    assert run_failing(RuntimeError("bug"), log, monkeypatch) == 1
    assert "Traceback" in log.read_text()


def test_full_disk_is_a_users_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "a.log"
    full = OSError(errno.ENOSPC, "No space left on device", "merged/model.safetensors")
    assert run_failing(full, log, monkeypatch) == 2
    assert "error: disk full while writing merged/model.safetensors" in log.read_text()


def test_imports_are_followed_through_modules_and_functions() -> None:
    root = ROOT / "scripts"
    found = {
        str(path.relative_to(root)) for path in imported_files(root / "fetch_dataset.py", root)
    }
    assert {"pockettune/sources/hub.py", "pockettune/tasks/classification.py", "pockettune/common/errors.py",
            "pockettune/__init__.py"} <= found  # fmt: skip
    assert "pockettune/runtimes/llama.py" not in found
    assert "fetch_dataset.py" not in found


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_every_program_explains_itself(path: Path) -> None:
    result = run_program(path.name, "--help")
    assert result.returncode == 0, result.stdout
    rules = "".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    if f'program("{path.stem}")' in rules:  # the others are for a person
        assert "Output" in result.stdout and "--log" in result.stdout
