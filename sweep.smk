# A sweep: the rules of the Snakefile once for each member, with its config and its results. What
# several members need the first of them makes, the others link to it. scripts/run_sweep.py calls this.

import json
import os
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, f"{workflow.basedir}/scripts")

from pockettune.common.errors import UserError
from pockettune.workflow.cluster import (
    explain_failures,
    program_messages,
    refuse_strays,
    watch_queue,
)
from pockettune.workflow.imports import imported_files
from pockettune.workflow.sharing import MemberRules, find_links

SWEEP = config["sweep"]  # the folder of its results
STARTED = time.time()
# A job on a node, in whose command its rule stands, loads its own member and not two hundred.
ASKED_FOR = [] if workflow.is_main_process else sys.argv
MEMBERS = [
    member
    for member in json.loads(Path(SWEEP, "members.json").read_text(encoding="utf-8"))
    if not ASKED_FOR
    or any(word.startswith(f"{member['name']}__") for word in ASKED_FOR)
]
FOLDERS = [member["config"]["pathvars"]["results"] for member in MEMBERS]
CURRENT = [member for member in MEMBERS if member["current"]]


for member in MEMBERS:
    module_name, member_config = member["name"], member["config"]
    prefix = f"{module_name}__"

    module:
        name: module_name
        snakefile:
            "Snakefile"
        config:
            member_config

    use rule * from module_name as prefix*


def targets(member):
    """Return the files that one member's run ends in."""
    return getattr(rules, f"{member['name']}__all").input


def chosen_files(member):
    """Return a run's best.gguf, where its config has a budget: in it there may be no file."""
    best = targets(member).best
    return [best] if isinstance(best, str) else list(best)


def link(paths):
    """Return the shell command that makes links, by their paths, to files or folders."""
    return " && ".join(
        shlex.join(["ln", "-s", os.path.relpath(source, Path(path).parent), path])
        for path, source in paths.items()
    )


LINKS = []
if not ASKED_FOR:
    LINKS = find_links(
        (MemberRules(f"{member['name']}__", folder, workflow.rules), targets(member))
        for member, folder in zip(MEMBERS, FOLDERS, strict=True)
    )

LINKED = {path for entry in LINKS for path in (*entry.folders, *entry.files)}

# A link takes the place of the member's own rule, and a file outside the members' folders, such as a
# base model, has one rule. By ruleorder, hundreds of rules a file would be compared for minutes.
made = set()
for known in list(workflow.rules):
    products = tuple(map(str, known.output))
    if products and not known.has_wildcards():
        if products in made or products[0] in LINKED:
            del workflow._rules[known.name]
        made.add(products)

# A module's localrules keep the names that they have in it.
workflow._localrules = {
    known.name
    for known in workflow.rules
    if known.name.partition("__")[2] in workflow._localrules
}

# A profile, or --set-resources, names a rule as the Snakefile does.
for known in workflow.rules:
    named = known.name.partition("__")[2]
    given = workflow.resource_settings
    known.resources.update(given._parsed_overwrite_resources.get(named, {}))
    if named in given._parsed_overwrite_threads:
        known.resources["_cores"] = given._parsed_overwrite_threads[named]

for entry in LINKS:

    rule:
        name:
            entry.name
        input:
            [*entry.folders.values(), *entry.files.values()],
        output:
            [directory(path) for path in entry.folders],
            list(entry.files),
        localrule: True
        params:
            command=link({**entry.folders, **entry.files}),
        shell:
            "{params.command}"


rule leaderboard:
    input:
        program="scripts/write_leaderboard.py",
        modules=list(
            map(
                str,
                imported_files(
                    Path("scripts/write_leaderboard.py"), root=Path("scripts")
                ),
            )
        ),
        template="report/leaderboard.html.j2",
        members=f"{SWEEP}/members.json",
        results=[
            path
            for member in CURRENT
            for path in targets(member)
            if path not in chosen_files(member)
        ],
    output:
        html=f"{SWEEP}/leaderboard.html",
        csv=f"{SWEEP}/leaderboard.csv",
    log:
        f"{SWEEP}/leaderboard.log",
    localrule: True
    conda:
        "envs/report.yaml"
    shell:
        "python {input.program:q} --members {input.members:q} --template {input.template:q}"
        " --html {output.html:q} --csv {output.csv:q} --log {log:q}"


rule all:
    default_target: True
    input:
        rules.leaderboard.output,
        [path for member in CURRENT for path in chosen_files(member)],


onstart:
    # What is a run's own now takes the place of a link, but Snakemake writes a benchmark through it: into
    # another's, or nowhere.
    for path in Path(SWEEP).glob("*/benchmarks/*.tsv"):
        if path.is_symlink() and str(path) not in LINKED:
            path.unlink()
    if workflow.executor_plugin.name == "slurm":
        try:
            refuse_strays(Path.cwd(), *FOLDERS)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        watch_queue(Path.cwd())


onerror:
    for message in program_messages(
        Path(SWEEP).glob("*/logs/*.log"), since=STARTED
    ):
        print(message, file=sys.stderr)
    for message in explain_failures(Path(log[0]).read_text(encoding="utf-8")):
        print(f"error: {message}", file=sys.stderr)
