"""Say whether this machine and this network can do a run, before hours are spent on it.

A line for each thing looked at: ok, warning or problem, and what to do. Nothing is written, and no
token is sent. Needs the standard library alone to say which packages are missing.

    python scripts/check_machine.py --configfile runs/demo.yaml

Input   config.yaml, the run files laid over it, and a Snakemake profile if one is used
Output  the terminal, with --json as one JSON document; exit status 1 where there is a problem
"""

import sys

if sys.version_info < (3, 11):
    sys.exit("problem  python: %d.%d is too old; install Python 3.11 or newer" % sys.version_info[:2])  # noqa: UP031

sys.dont_write_bytecode = True

import argparse
import getpass
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "scripts") not in sys.path:  # python -I leaves it out
    sys.path.insert(0, str(ROOT / "scripts"))

from pockettune.common.errors import UserError
from pockettune.common.redaction import redact
from pockettune.machine import (
    hardware,
    models,
    network,
    probe,
    run as runs,
    slurm,
    software,
    storage,
)
from pockettune.machine.findings import Finding, Late, Once, side_by_side
from pockettune.machine.rows import find_rows
from pockettune.machine.run import Run
from pockettune.machine.shape import find_shape

Check = Callable[[Run], list[Finding]]

# In the order of their lines; all run at once.
OF_THE_MACHINE: dict[str, Check] = {
    "python": software.check_python,
    "packages": software.check_packages,
    "compiler": software.check_compiler,
    "conda": software.check_conda,
    "gpu": hardware.check_gpu,
    "processor": hardware.check_processor,
    "cores": hardware.check_cores,
    "bitsandbytes": hardware.check_bitsandbytes,
    "llama.cpp": hardware.check_llama_cpp,
    "slurm": slurm.check_slurm,
    "package index": network.check_package_index,
}
OF_THE_RUN: dict[str, Check] = {
    "config": runs.check_settings,
    "sources": network.check_sources,
    "model": models.check_model,
    "tokenizer": models.check_tokenizer,
    "folders": storage.check_folders,
    "disk": storage.check_disk,
    "memory": storage.check_memory,
}


def describe_run(run_files: Sequence[Path], profile: Path | None, end: float) -> tuple[Run, list[Finding]]:  # fmt: skip
    """Read config and profile; what keeps them from being read is a finding."""
    run, findings = Run(ROOT, end=end), []
    if software.installed_version("PyYAML") is None or software.installed_version("snakemake") is None:  # fmt: skip
        return run, [Finding("config", "warning", "not looked at: that needs the packages", "`make setup` first")]  # fmt: skip
    try:
        run.config = runs.load_config(ROOT, run_files)
    except UserError as error:
        findings.append(Finding("config", "problem", str(error), "mend the file"))
    try:
        run.profile = runs.load_profile(profile) if profile else {}
    except UserError as error:
        findings.append(Finding("profile", "problem", str(error), "name a folder such as profiles/slurm"))  # fmt: skip
    return run, findings


def share_facts(run: Run) -> None:
    """Lay down what several checks need, to be found out when the first of them asks."""
    end = run.end - 0.3

    def ask(topic: str, package: str, *arguments: Path) -> Once[probe.Answer]:
        if software.installed_version(package) is None:
            return Once(lambda: probe.Answer(failure=f"{package} is not installed"))
        return Once(lambda: probe.ask(topic, arguments, end))

    run.facts["torch"] = ask("torch", "torch")
    run.facts["llama_cpp"] = ask("llama_cpp", "llama-cpp-python")
    if run.config is None:
        return
    run.facts["replies"] = Once(lambda: network.ask_all(run))
    run.facts["shape"] = Once(lambda: find_shape(run))
    run.facts["rows"] = Once(lambda: find_rows(run))
    places = [place for place in (run.base, run.own_model) if place and (place / "tokenizer.json").is_file()]  # fmt: skip
    if places and run.converter.is_dir():
        run.facts["tokenizer"] = ask("tokenizer", "transformers", places[0], run.converter)


def examine(run: Run, findings: list[Finding]) -> list[Finding]:
    """Run all checks and return what they found, in order."""
    checks = dict(OF_THE_MACHINE)
    if run.config is not None:
        findings = [*findings, *runs.check_settings(run)]
        if findings[-1].state == "ok":
            checks |= {name: check for name, check in OF_THE_RUN.items() if name != "config"}
        else:
            run.config = None
    share_facts(run)
    calls = {name: (lambda check=check: check(run)) for name, check in checks.items()}
    for name, found in side_by_side(calls, run.end):
        if isinstance(found, Late):
            found = [Finding(name, "warning", "not known: it took too long", hardware.LATE)]
        elif isinstance(found, Exception):
            found = [Finding(name, "warning", f"could not be looked at: {type(found).__name__}: {found}")]  # fmt: skip
        findings = [*findings, *found]
    return findings


def as_document(findings: Sequence[Finding], run_files: Sequence[Path], profile: Path | None) -> dict[str, Any]:  # fmt: skip
    """Return what --json prints."""
    names = [path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name for path in run_files]  # fmt: skip
    return {
        "configfiles": ["config.yaml", *map(str, names)],
        "profile": profile and profile.name,
        "state": worst(findings),
        "findings": [
            {"name": f.name, "state": f.state, "detail": f.detail, "remedy": f.remedy, "bytes": dict(f.items)}
            for f in findings
        ],
    }  # fmt: skip


def worst(findings: Sequence[Finding]) -> str:
    """Return the state of all together."""
    return max((f.state for f in findings), key=("ok", "warning", "problem").index, default="ok")


def as_lines(findings: Sequence[Finding]) -> str:
    """Return the findings as text, a line each, remedies and sizes indented below."""
    lines = []
    width = min(max(len(finding.name) for finding in findings), 24)
    for finding in findings:
        lines.append(f"{finding.state:<7}  {finding.name:<{width}}  {finding.detail}")
        lines += [f"{'':7}    {name}: {told(count)}" for name, count in finding.items.items()]
        if finding.remedy:
            lines.append(f"{'':7}    do: {finding.remedy}")
    counts = {state: sum(f.state == state for f in findings) for state in ("problem", "warning")}
    ends = {"problem": "The run cannot work as it is", "warning": "The run can work", "ok": "All is well"}  # fmt: skip
    lines.append(f"{ends[worst(findings)]}: {counts['problem']} problems, {counts['warning']} warnings.")  # fmt: skip
    return "\n".join(lines)


def told(count: int | None) -> str:
    """Return bytes in words."""
    return "not known" if count is None else storage.size(count)


def hide_user(text: str) -> str:
    """Return text without secrets, without the user's name, and with the checkout as its root."""
    text = redact(text).replace(str(ROOT), ".").replace(str(Path.home()), "~")
    user = getpass.getuser()
    return text if user == "root" else re.sub(rf"\b{re.escape(user)}\b", "user", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--configfile", type=Path, nargs="+", action="extend", default=[], metavar="FILE", help="run files laid over config.yaml, as snakemake takes them")  # fmt: skip
    parser.add_argument("--profile", type=Path, help="Snakemake profile that the run will use")
    parser.add_argument("--json", action="store_true", help="print one JSON document, without names of users and without secrets")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=10.0, help="at most this long; what is slower is not known")  # fmt: skip
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    run_files = [path.absolute() for path in arguments.configfile]
    profile = arguments.profile and arguments.profile.absolute()
    os.chdir(ROOT)
    findings = examine(*describe_run(run_files, profile, end))
    if arguments.json:
        text = json.dumps(as_document(findings, run_files, profile), ensure_ascii=False, indent=2)
    else:
        text = as_lines(findings)
    print(hide_user(text), flush=True)
    return worst(findings) == "problem"


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without waiting for what was left behind, a name server say
