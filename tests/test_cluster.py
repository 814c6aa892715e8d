"""What is read out of SLURM's words; tests/slurm asks a real one."""

from pathlib import Path

import pytest

from pockettune.common.errors import UserError
from pockettune.workflow import cluster

# As snakemake-executor-plugin-slurm 2.8.0 writes it.
LOG = """
[Tue Nov 24 10:54:11 2026]
rule train:
    output: results/small/adapter
    log: results/small/logs/train.log
Job 0 has been submitted with SLURM jobid 21 (log: {folder}/21.log).
Job 7 has been submitted with SLURM jobid 22 (log: {folder}/quantize/q4_k_m/22.log).
[Tue Nov 24 10:54:11 2026]
Error in rule train:
    message: SLURM-job '21' failed, SLURM status is: '{state}'. Detailed failure reason unavailable
    jobid: 0
Error in rule quantize:
    message: None
    jobid: 7
"""


@pytest.mark.parametrize(
    ("state", "said", "expected"),
    [
        ("CANCELLED", "", "SLURM job 21 was cancelled, by scancel or by an administrator"),
        ("TIMEOUT", "", "ran over its time limit: give it a longer one"),
        ("OUT_OF_MEMORY", "", "ran over its memory: give it more"),
        ("FAILED", "slurmstepd-vm: error: StepId=21.0 exceeded memory limit (2 > 1), being killed", "ran over its memory"),
        ("FAILED", "slurmstepd: error: Detected 1 oom_kill event in StepId=21.0", "ran over its memory"),
        ("FAILED", "error: the program's own", "SLURM job 21 failed (FAILED); its log: "),
    ],
)  # fmt: skip
def test_failed_job_is_explained(tmp_path: Path, state: str, said: str, expected: str) -> None:
    (tmp_path / "21.log").write_text(said)
    (line,) = cluster.explain_failures(LOG.format(folder=tmp_path, state=state))
    assert line.startswith("train: SLURM job 21 ") and expected in line
    assert line.endswith("/21.log")


def queue_says(lines: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put a squeue on the path that prints these lines."""
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_waiting_job_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    down = "ReqNodeNotAvail, UnavailableNodes:a1"
    queue_says(f"24|gpu|rule_quantize_wildcards_q4_k_m|{down}|{tmp_path}\n25|gpu|mine|{down}|{tmp_path}\n"
               f"26|gpu|rule_train|{down}|/another", monkeypatch, tmp_path)  # fmt: skip
    (job,) = cluster.queued_jobs(tmp_path, "PENDING")
    assert cluster.describe_waiting(job).startswith(
        f"waiting: quantize q4_k_m, SLURM job 24 in partition gpu, is not started: {down}."
    )


def test_only_jobs_for_the_same_results_are_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = tmp_path / ".snakemake/log"
    logs.mkdir(parents=True)
    (logs / "a.log").write_text(LOG)
    queue_says(f"21|gpu|rule_train|None|{tmp_path}", monkeypatch, tmp_path)
    cluster.refuse_strays(tmp_path, "results")
    with pytest.raises(UserError, match=r"results/small: 21 \(train\).*`scancel 21`"):
        cluster.refuse_strays(tmp_path, "results/small")


def test_without_squeue_nothing_is_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    cluster.refuse_strays(tmp_path, "results")


def test_only_what_this_run_said_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "merge.log").write_text(
        "10:00:00 begins\n10:00:01 error: adapter a: what\nerror: not ours\n"
    )
    (tmp_path / "train.log").write_text(
        "10:00:00 stopped by SIGTERM after update 3 of 9; and so on\n"
    )
    logs = [tmp_path / "train.log", tmp_path / "merge.log"]
    assert list(cluster.program_messages(logs, since=0)) == [
        "error: adapter a: what",
        "train: stopped by SIGTERM after update 3 of 9; and so on",
    ]
    assert list(cluster.program_messages(logs, since=4e9)) == []
