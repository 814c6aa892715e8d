"""What libraries' native code prints, and what it ends."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pockettune.common.errors import UserError
from pockettune.common.native import run_apart

# Not conftest's, which each process that is started here would load.
ROOT = Path(__file__).parent.parent


def end_without_a_word() -> None:
    os._exit(3)


def refuse(reason: str) -> None:
    raise UserError(reason)


def speak() -> None:
    os.write(2, b"said natively\n")


def wait(told: Path) -> None:
    told.write_text(str(os.getpid()))
    time.sleep(600)


def is_running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_ends_its_process_does_not_end_this_one() -> None:
    with pytest.raises(ChildProcessError, match="ended in mid-work"):
        run_apart("it", end_without_a_word)
    with pytest.raises(UserError, match=r"^no$"):
        run_apart("it", refuse, "no")


def test_what_it_prints_is_in_the_log(tmp_path: Path) -> None:
    handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger().addHandler(handler)
    try:
        run_apart("it", speak)
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    assert (tmp_path / "log").read_text() == "said natively\n"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_it_ends_with_the_program_that_was_killed(tmp_path: Path) -> None:
    told = tmp_path / "process"
    code = f"import test_native as it; it.run_apart('it', it.wait, it.Path({str(told)!r}))"
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "scripts")))
    program = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    while not told.exists() or not told.read_text():
        assert program.poll() is None
        time.sleep(0.05)
    child = int(told.read_text())
    assert is_running(child)
    program.kill()
    program.wait()
    while is_running(child):  # no longer than it takes to notice
        time.sleep(0.05)
