"""The checks, in the order of their lines, and what they share."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pockettune.common.errors import UserError
from pockettune.machine import hardware, models, network, probe, slurm, software, storage
from pockettune.machine import run as runs
from pockettune.machine.findings import Finding, Once, TooLateError, side_by_side
from pockettune.machine.rows import find_rows
from pockettune.machine.run import Run
from pockettune.machine.shape import find_shape

ROOT = Path(__file__).resolve().parents[3]

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
    "recipes": models.check_recipes,
    "formats": software.check_extra_packages,
    "folders": storage.check_folders,
    "disk": storage.check_disk,
    "memory": storage.check_memory,
}


def describe_run(
    run_files: Sequence[Path], profile: Path | None, end: float
) -> tuple[Run, list[Finding]]:
    """Read config and profile; what keeps them from being read is a finding."""
    run, findings = Run(ROOT, end=end), []
    if (
        software.installed_version("PyYAML") is None
        or software.installed_version("snakemake") is None
    ):
        return run, [
            Finding(
                "config", "warning", "not looked at: that needs the packages", "`make setup` first"
            )
        ]
    try:
        run.config = runs.load_config(ROOT, run_files)
    except UserError as error:
        findings.append(Finding("config", "problem", str(error), "mend the file"))
    try:
        run.profile = runs.load_profile(profile) if profile else {}
    except UserError as error:
        findings.append(
            Finding("profile", "problem", str(error), "name a folder such as profiles/slurm")
        )
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
    places = [
        place
        for place in (run.base, run.own_model)
        if place and (place / "tokenizer.json").is_file()
    ]
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
        if isinstance(found, TooLateError):
            found = [Finding(name, "warning", "not known: it took too long", hardware.LATE)]
        elif isinstance(found, Exception):
            found = [
                Finding(name, "warning", f"could not be looked at: {type(found).__name__}: {found}")
            ]
        findings = [*findings, *found]
    return findings
