"""Says what SLURM does with the jobs, where the executor does not: why one waits, why one failed.

For the process on the login node. Read from `squeue` (SLURM 20.11 or newer), from Snakemake's log,
which names each job's number, state and log, and from those logs.
"""

import getpass
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pockettune.common.errors import UserError, list_faults

# Reasons for which every queue makes a job wait, and whose end needs no one.
USUAL_REASONS = {"None", "Priority", "Resources", "Dependency", "BeginTime", "JobArrayTaskLimit", "Cleaning"}  # fmt: skip

# What is to be done about a job that ended in this state; {need} is filled from its log.
ADVICE = {
    "CANCELLED": "was cancelled, by scancel or by an administrator",
    "TIMEOUT": "ran over its time limit: give it a longer one in the profile (set-resources, runtime)",
    "OUT_OF_MEMORY": "ran over its memory: give it more in the profile (set-resources, mem_mb)",
    "NODE_FAIL": "lost its node",
    "PREEMPTED": "had to give way to another job",
}

SUBMITTED = re.compile(r"submitted with SLURM jobid (\w+) \(log: (.*)\)\.$", re.MULTILINE)
FAILED = re.compile(
    r"^Error in rule (\S+):\n +message: SLURM-job '(\w+)' failed.*?status is:\s+'(\w+)'",
    re.MULTILINE,
)
OVER_MEMORY = re.compile(r"slurmstepd.*(memory limit|oom[-_ ]kill)", re.IGNORECASE)


class QueuedJob(NamedTuple):
    """A job in SLURM's queue."""

    number: str
    partition: str
    reason: str  # why it waits, in SLURM's words (man squeue, "JOB REASON CODES")
    rule: str


def queued_jobs(folder: Path, states: str) -> list[QueuedJob]:
    """Return the user's jobs of these states that were submitted from `folder`.

    Empty where squeue does not answer: what it would have said is a help, not a need.
    """
    command = ["squeue", "--noheader", f"--user={getpass.getuser()}", f"--states={states}",
               "--format=%i|%P|%k|%r|%Z"]  # fmt: skip
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    jobs = []
    for line in answer.stdout.splitlines():
        number, partition, comment, reason, submitted_from = line.split("|", 4)
        if comment.startswith("rule_") and Path(submitted_from) == folder:
            rule = comment.removeprefix("rule_").replace("_wildcards_", " ")
            jobs.append(QueuedJob(number, partition, reason, rule))
    return jobs


def refuse_strays(folder: Path, *results: str) -> None:
    """Raise UserError where jobs that a killed snakemake left behind still work on a folder of `results`.

    Two jobs would write the same files. Jobs of another run, which has results of its own, may go
    on: so each job is looked up in the logs of `folder`/.snakemake.
    """
    jobs = queued_jobs(folder, "PENDING,RUNNING,COMPLETING,SUSPENDED")
    if not jobs:
        return
    logs = [read_log(path) for path in (folder / ".snakemake/log").glob("*.log")]
    marks = [f" log: {path}/logs/" for path in results]
    ours = [log for log in logs if any(mark in log for mark in marks)]
    left = [job for job in jobs if any(f"SLURM jobid {job.number} " in log for log in ours)]
    if left:
        named = list_faults([f"{job.number} ({job.rule})" for job in left])
        numbers = " ".join(job.number for job in left)
        raise UserError(
            f"SLURM still has jobs of an earlier snakemake for {list_faults([*results])}: {named}; wait for them,"
            f" or end them with `scancel {numbers}`, and run again"
        )


def read_log(path: Path) -> str:
    """Return a log's text, whatever bytes a program wrote into it; "" where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def watch_queue(folder: Path, interval: float = 60.0) -> None:
    """Print, from a thread of its own, why jobs wait; `interval` seconds between looks."""

    def watch() -> None:
        told: set[QueuedJob] = set()
        while True:
            time.sleep(interval)
            waiting = queued_jobs(folder, "PENDING")
            for job in waiting:
                if job.reason not in USUAL_REASONS and job not in told:
                    print(describe_waiting(job), file=sys.stderr, flush=True)
            told = set(waiting)

    threading.Thread(target=watch, daemon=True, name="watch_queue").start()


def describe_waiting(job: QueuedJob) -> str:
    """Return a line that says why a job waits and how to look further."""
    return (
        f"waiting: {job.rule}, SLURM job {job.number} in partition {job.partition}, is not started:"
        f" {job.reason}. `sinfo -R` says what is wrong with nodes; Ctrl-C cancels the job"
    )


def explain_failures(snakemake_log: str) -> Iterator[str]:
    """Yield a line for each SLURM job that failed, from the text of Snakemake's log."""
    logs = dict(SUBMITTED.findall(snakemake_log))
    for rule, number, state in FAILED.findall(snakemake_log):
        log = Path(logs.get(number, ""))
        if state not in ADVICE and OVER_MEMORY.search(read_log(log)):
            state = "OUT_OF_MEMORY"
        advice = ADVICE.get(state, f"failed ({state})")
        yield f"{rule}: SLURM job {number} {advice}; its log: {log}"


def program_messages(logs: Iterable[Path], since: float) -> Iterator[str]:
    """Yield what programs said when they failed or were stopped, from logs younger than `since`.

    `since` is in seconds since the epoch.
    """
    for path in sorted(logs):
        if path.stat().st_mtime < since:
            continue
        for line in read_log(path).splitlines():
            text = line.partition(" ")[2]  # behind the time
            if text.startswith("error: "):
                yield text
            elif text.startswith("stopped by "):
                yield f"{path.stem}: {text}"
