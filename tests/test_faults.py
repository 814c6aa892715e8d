"""Nothing is lost to a kill, and two runs for the same files do not mix."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from comparison import differing_files
from conftest import SMALL, copy_checkout, run_snakemake, start_snakemake
from kill_every_rule import MORE, ask_for_more, begin, compare, jobs_in, kill_all

GATE = ("--", "results/small/parity.json")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout for two tests, one behind the other: each job of theirs is aimed at once.

    tests/kill_every_rule.py does it several times.
    """
    return begin(tmp_path_factory.mktemp("killed") / "checkout")


def test_killed_in_every_rule_up_to_the_gate(finished_run: Path, killed: Path) -> None:
    hits = kill_all(finished_run, killed, 1, 5, *GATE)
    assert len(hits) >= 5, "some are quicker than the kill; most must be hit"


def test_killed_in_every_rule_behind_the_gate(finished_run: Path, killed: Path) -> None:
    done = run_snakemake(killed, *SMALL, *GATE)  # nothing, if the test above went before
    assert done.returncode == 0, done.stdout[-3000:]
    hits = kill_all(finished_run, killed, 1, 5)
    assert len(hits) >= 5, "some are quicker than the kill; most must be hit"
    compare(finished_run, killed)


def test_killed_in_the_rules_that_not_every_run_has(finished_run: Path, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        shutil.copytree(finished_run, folder)
        ask_for_more(folder)
    result = run_snakemake(undisturbed, *SMALL, *MORE)
    assert result.returncode == 0, result.stdout[-3000:]
    aimed_at_above = ("check_base", "train", "merge")
    hits = kill_all(undisturbed, killed, 1, 5, *MORE, spare=aimed_at_above)
    assert len(hits) >= 2, "some are quicker than the kill; most must be hit"
    compare(undisturbed, killed)


def test_second_run_for_the_same_files_is_refused(finished_run: Path, tmp_path: Path) -> None:
    folder = copy_checkout(tmp_path / "checkout")
    target = (*SMALL, "--", "results/small/dataset/audit.json")
    first = start_snakemake(folder, folder / "run.txt", "--cores", "1", *target)
    while not jobs_in((folder / "run.txt").read_text()):
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGSTOP)  # held in the middle of its work, however quick it is
    second = run_snakemake(folder, *target)
    os.killpg(first.pid, signal.SIGCONT)
    assert second.returncode == 1
    assert "cannot be locked" in second.stdout and "--unlock" in second.stdout
    assert "Traceback" not in second.stdout
    assert first.wait(timeout=120) == 0
    assert not differing_files(
        folder / "results/small/dataset", finished_run / "results/small/dataset"
    )
