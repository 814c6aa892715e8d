"""Run a sweep: a run for each combination of values, and one page that compares them.

    python scripts/run_sweep.py runs/sweeps/example.yaml --cores 4

What runs have in common is made once; what is here already is not made again. All that follows the
sweep file goes to Snakemake: --dry-run, --profile profiles/slurm, --keep-going.

Input   a sweep file: base, a run file, and over, lists of values by key
Output  results/<sweep>/: leaderboard.html, leaderboard.csv, and a folder for each run
"""

import argparse
import copy
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.machine.run import load_config, read_sections
from pockettune.workflow.config import check_config
from pockettune.workflow.sweep import Member, check_inputs, expand, in_order, read_sweep

ROOT = Path(__file__).resolve().parent.parent
# Given by this program itself.
TAKEN = (
    "--config",
    "-C",
    "--configfile",
    "--configfiles",
    "--snakefile",
    "-s",
    "--directory",
    "-d",
)


def plan(sweep: Path, results: Path) -> list[dict[str, Any]]:
    """Return the sweep's members, and those of earlier calls whose results are here, for members.json."""
    base, over = read_sweep(sweep)
    own = load_config(ROOT, [])
    run = read_sections(base, str(base)) if base else {}
    schema_file = ROOT / "schemas/config.schema.yaml"
    schema = read_sections(schema_file, str(schema_file))
    members = expand(own, run, over, schema, results)
    earlier = [member for member in read_members(results) if is_valid(member, schema)]
    return [
        {**asdict(member), "current": current}
        for member, current in in_order(members, earlier, results)
    ]


def read_members(results: Path) -> list[Member]:
    """Return the members of the call before, if there was one.

    UserError where the folder is another run's: its products would lie among the members.
    """
    recorded = results / "members.json"
    if not recorded.is_file():
        if results.is_dir() and any(results.iterdir()):
            raise UserError(
                f"{results} holds other results; rename the sweep file, or move them away"
            )
        return []
    return [
        Member(entry["name"], entry["changed"], entry["config"])
        for entry in program.read_json(recorded)
    ]


def is_valid(member: Member, schema: dict[str, Any]) -> bool:
    """Whether a recorded config is one that this version's schema knows, and its files are still here."""
    config = copy.deepcopy(member.config)
    try:
        check_config(config, schema)
        check_inputs(config)
    except UserError:
        return False
    return True


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("sweep", type=Path, help="sweep file, see docs/sweep.md")
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="for snakemake, such as --cores 4",
    )

    def work(arguments: argparse.Namespace) -> None:
        if Path.cwd().resolve() != ROOT:
            raise UserError(f"run in {Path.cwd()}: cd {ROOT} first, from where all paths count")
        if taken := [word for word in arguments.arguments if word.partition("=")[0] in TAKEN]:
            raise UserError(f"{', '.join(taken)} cannot be given: write it into the sweep's base")
        results = Path("results", arguments.sweep.stem)
        members = plan(arguments.sweep, results)
        program.write_json(results / "members.json", members)
        current = sum(member["current"] for member in members)
        program.logger.info("%d runs in %s", current, results)
        # As one word: --config takes all words behind it, and targets may be among the arguments.
        own = ["--snakefile", "sweep.smk", f"--config=sweep={results}"]
        command = [sys.executable, "-m", "snakemake", *own, *arguments.arguments]
        # In this program's place, so that Ctrl-C and kill reach Snakemake itself.
        os.execv(sys.executable, command)

    program.run(parser, work)


if __name__ == "__main__":
    main()
