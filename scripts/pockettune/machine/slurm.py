"""Whether SLURM answers and has what the profile names. Asked for by a profile, or where there is a sinfo."""

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from pockettune.machine.findings import Finding, State
from pockettune.machine.run import Run

SECONDS = 6.0
NO_ACCOUNTING = "without accounting the end of a job is never seen: take the # off slurm-status-command in profiles/slurm/config.yaml"


def check_slurm(run: Run) -> list[Finding]:
    """SLURM's commands, the profile's partitions, and how the end of a job is learnt."""
    if not run.on_cluster and shutil.which("sinfo") is None:
        return [
            Finding("slurm", "ok", "not asked for: no profile for it, and no sinfo on the path")
        ]
    bad: State = "problem" if run.on_cluster else "warning"
    findings: list[Finding] = []
    said = {name: ask(*command) for name, command in COMMANDS.items()}
    for name in ("sinfo", "squeue"):
        if said[name][1] and not findings:  # else it is the same trouble
            findings.append(
                Finding(
                    "slurm",
                    bad,
                    f"{name}: {said[name][1]}",
                    "run on a login node of the cluster; `scontrol ping` says whether its controller is up",
                )
            )
    if said["sinfo"][1]:
        return findings
    here = sorted({line.strip() for line in said["sinfo"][0].splitlines() if line.strip()})
    wanted = named_partitions(run.profile)
    absent = {name: rules for name, rules in wanted.items() if name not in here}
    if absent:
        told = "; ".join(f"{name} (of {', '.join(rules)})" for name, rules in absent.items())
        findings.append(Finding("slurm", bad, f"no partition {told}; sinfo knows {', '.join(here) or 'none'}",
                                "edit slurm_partition in the profile's config.yaml"))  # fmt: skip
    findings += check_accounting(run, said["sacct"][1])
    if not findings:
        told = (
            f"the profile's {', '.join(wanted)} among them" if wanted else "no profile asks for it"
        )
        findings.append(Finding("slurm", "ok", f"answers; partitions {', '.join(here)}; {told}"))
    return findings


def check_accounting(run: Run, fault: str) -> list[Finding]:
    """How Snakemake learns the end of a job: from accounting, or as the profile says."""
    way = run.profile.get("slurm-status-command", "sacct")
    if not run.on_cluster or not fault or way != "sacct":
        return []
    return [Finding("slurm", "problem", f"sacct: {fault}", NO_ACCOUNTING)]


COMMANDS = {
    "sinfo": ("sinfo", "--noheader", "--format=%R"),
    "squeue": ("squeue", "--noheader", "--me", "--format=%i"),
    "sacct": ("sacct", "--noheader", "--allocations", "--format=JobID"),
}


def ask(*command: str) -> tuple[str, str]:
    """Return what one of SLURM's commands printed, and why it failed ("" where it did not)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        return "", "not on the path"
    except (OSError, subprocess.SubprocessError):
        return "", f"no answer in {SECONDS:.0f} s"
    lines = done.stderr.strip().splitlines()
    disabled = next((line for line in lines if "accounting storage is disabled" in line), "")
    if done.returncode or disabled:
        return done.stdout, disabled or (lines[-1] if lines else f"exit status {done.returncode}")
    return done.stdout, ""


def named_partitions(profile: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the partitions that a profile names, each with the rules that go there."""
    found: dict[str, list[str]] = {}
    for rule, partition in _partitions(profile):
        found.setdefault(partition, []).append(rule)
    return found


def _partitions(profile: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    sections = {
        "default-resources": profile.get("default-resources") or {},
        **(profile.get("set-resources") or {}),
    }
    for rule, resources in sections.items():
        if isinstance(resources, list):  # as on the command line: name=value
            resources = dict(text.split("=", 1) for text in resources if "=" in text)
        for name in str(resources.get("slurm_partition") or "").split(","):
            if name := name.strip().strip("'\""):
                yield rule, name
