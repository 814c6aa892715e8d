"""A real SLURM on this machine: munged, slurmctld and one slurmd, started and stopped by the tests.

One node stands for the whole cluster. It claims eight processors and a GPU whose device file is
/dev/null, so that SLURM hands out CUDA_VISIBLE_DEVICES as on a real one. No accounting daemon, so
what ran where is read from the completion log (slurm.conf, JobCompType) and from a prolog.

Debian's packages: slurm-wlm, munge. To be run as root.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from conftest import SMALL, kill_session, start_snakemake

# The job step's own snakemake drops SLURM_CONF, so srun finds another cluster's file or this one.
CONFIG_FOLDER = Path("/etc/slurm")
MARK = "# Written by the tests of PocketTune; removed when they end."
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")

SLURM_CONF = """{mark}
ClusterName=pockettune
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/prolog.sh
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/finished.txt
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:1
PartitionName=cpu Nodes=ALL Default=YES State=UP
PartitionName=gpu Nodes=ALL State=UP
"""

# What each task found in its environment, a line a task.
PROLOG = """#!/bin/sh
echo "$SLURM_JOB_ID $SLURM_JOB_PARTITION ${{CUDA_VISIBLE_DEVICES:-none}}" >> {folder}/tasks.txt
"""


def unavailable() -> str | None:
    """Return why no cluster can be started here; None where it can."""
    if os.getuid() != 0:
        return "starting SLURM's daemons needs root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)"
    config = CONFIG_FOLDER / "slurm.conf"
    if config.exists() and not config.read_text().startswith(MARK):
        return f"{config} belongs to another cluster"
    return None


class Cluster:
    """The three daemons and what they write, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().split(".")[0]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration, start the daemons and wait for the node."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        values = {"mark": MARK, "host": self.host, "folder": self.folder}
        prolog = self.folder / "prolog.sh"
        prolog.write_text(PROLOG.format(**values))
        prolog.chmod(0o755)
        (CONFIG_FOLDER / "slurm.conf").write_text(SLURM_CONF.format(**values))
        (CONFIG_FOLDER / "gres.conf").write_text(
            f"{MARK}\nNodeName={self.host} Name=gpu File=/dev/null\n"
        )
        self._start_munge()
        self.start_daemon("slurmctld", "slurmctld", "-D", "-c")
        self.start_daemon("slurmd", "slurmd", "-D", "-c")
        wait_until(lambda: self.node_state() == "idle", seconds=60, what="the node to be idle")

    def start_daemon(self, name: str, *arguments: str) -> None:
        """Start a daemon that ends with this process, however this one ends."""
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *arguments],
                stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def stop_daemon(self, name: str) -> None:
        """End a daemon and wait for it."""
        daemon = self.daemons.pop(name)
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(timeout=30)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def stop(self) -> None:
        """Cancel what runs, end the daemons and remove the configuration."""
        if "slurmctld" in self.daemons:
            subprocess.run(["scancel", "--user=root"], check=False, capture_output=True)
            time.sleep(2)
        for name in reversed(list(self.daemons)):
            self.stop_daemon(name)
        for name in ("slurm.conf", "gres.conf"):
            (CONFIG_FOLDER / name).unlink(missing_ok=True)

    def _start_munge(self) -> None:
        """Start munged with a key and a socket of its own place, unless one answers already."""
        if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
            return
        user = pwd.getpwnam("munge")
        for path in ("/run/munge", "/var/log/munge", "/var/lib/munge"):
            Path(path).mkdir(exist_ok=True)
            os.chown(path, user.pw_uid, user.pw_gid)
        account = ("--reuid", "munge", "--regid", "munge", "--clear-groups")
        self.start_daemon("munged", *account, "munged", "--foreground")
        wait_until(
            lambda: subprocess.run(["munge", "-n"], capture_output=True).returncode == 0,
            seconds=20,
            what="munged",
        )

    def node_state(self) -> str:
        """Return the node's state as sinfo prints it: idle, mixed, drained…; "" if it cannot."""
        return query("sinfo", "--noheader", "--format=%T").split("\n")[0].strip()

    def jobs(self, *states: str) -> list[tuple[str, str, str]]:
        """Return (id, rule, state) of the jobs that SLURM knows, of the given states if any."""
        listed = query("squeue", "--noheader", "--states=all", "--format=%i|%k|%T")
        rows = [line.split("|") for line in listed.splitlines()]
        return [
            (number, rule_of(comment), state)
            for number, comment, state in rows
            if not states or state in states
        ]

    def finished(self) -> list[dict[str, str]]:
        """Return the completion log: a dictionary a job, with JobId, Partition, JobState…"""
        path = self.folder / "finished.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return [dict(item.split("=", 1) for item in line.split() if "=" in item) for line in lines]

    def tasks(self) -> list[tuple[str, str, str]]:
        """Return (job, partition, CUDA_VISIBLE_DEVICES) of each task that was started."""
        lines = (self.folder / "tasks.txt").read_text().splitlines()
        return [tuple(line.split()) for line in lines]  # type: ignore[misc]


class Run:
    """A snakemake under way in a checkout, through the profile."""

    def __init__(self, checkout: Path, *arguments: str) -> None:
        self.output = checkout / "run.txt"
        self.process = start_snakemake(
            checkout, self.output, "--profile", "profiles/test", *SMALL, *arguments
        )

    def text(self) -> str:
        return self.output.read_text()

    def messages(self) -> list[str]:
        """Return the lines for the user: errors, and what stopped or waits."""
        return [
            line
            for line in self.text().splitlines()
            if line.startswith(("error: ", "waiting: ")) or ": stopped by" in line
        ]

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until the output shows a text."""
        wait_until(
            lambda: text in self.text() or self.process.poll() is not None, seconds, f"{text!r}"
        )
        assert text in self.text(), self.text()[-3000:]

    def finish(self, seconds: float = 600) -> int:
        """Wait for the end and return the exit status."""
        return self.process.wait(timeout=seconds)

    def kill(self) -> None:
        """End snakemake at once, as a crash of the login node would; its jobs go on."""
        kill_session(self.process)


def write_profile(folder: Path) -> None:
    """Write profiles/test: profiles/slurm for a cluster without accounting and without conda.

    Polls sooner, and asks for two processors, because there are no more behind the eight.
    """
    profile = yaml.safe_load((folder / "profiles/slurm/config.yaml").read_text())
    del profile["software-deployment-method"]
    profile["slurm-status-command"] = "squeue"
    profile["slurm-init-seconds-before-status-checks"] = 2
    profile["slurm-keep-successful-logs"] = True
    four = ("train", "evaluate_base", "evaluate_adapter", "evaluate_merged",
            "evaluate_f16", "evaluate_variant", "check_parity", "quantize", "measure_speed")  # fmt: skip
    profile["set-threads"] = dict.fromkeys(four, 2)
    (folder / "profiles/test").mkdir()
    (folder / "profiles/test/config.yaml").write_text(yaml.safe_dump(profile))


def rule_of(comment: str) -> str:
    """Return the rule's name from the comment that the executor gives a job."""
    return comment.removeprefix("rule_").split("_wildcards_")[0]


def query(*command: str) -> str:
    """Return what one of SLURM's commands prints; "" where it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a condition; AssertionError when it does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.25)
