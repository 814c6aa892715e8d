"""Say whether this machine and this network can do a run, before hours are spent on it.

A line for each thing looked at: ok, warning or problem, and what to do. Nothing is written, and no
token is sent. Needs the standard library alone to say which packages are missing.

    python scripts/check_machine.py --configfile runs/demo.yaml

Input   config.yaml, the run files laid over it, and a Snakemake profile if one is used
Output  the terminal, with --json as one JSON document; exit status 1 where there is a problem
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

OLDEST = (3, 11)  # Python; what is imported in main needs it


def main() -> int:
    if sys.version_info < OLDEST:
        print("problem  python: %d.%d is too old; install 3.11 or newer" % sys.version_info[:2])  # noqa: UP031
        return 1
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--configfile",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="run files laid over config.yaml, as snakemake takes them",
    )
    parser.add_argument("--profile", type=Path, help="Snakemake profile that the run will use")
    parser.add_argument(
        "--json", action="store_true", help="one JSON document, without names of users and secrets"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        help="at most this long; what takes longer is not known",
    )
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    run_files = [path.absolute() for path in arguments.configfile]
    profile = arguments.profile.absolute() if arguments.profile else None

    sys.dont_write_bytecode = True
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out
    from pockettune.machine.checks import ROOT, describe_run, examine
    from pockettune.machine.report import as_document, as_lines, hide_user, worst

    os.chdir(ROOT)  # paths of the config count from there
    findings = examine(*describe_run(run_files, profile, end))
    if arguments.json:
        text = json.dumps(as_document(findings, run_files, profile), ensure_ascii=False, indent=2)
    else:
        text = as_lines(findings)
    print(hide_user(text), flush=True)
    return 1 if worst(findings) == "problem" else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without waiting for what was left behind, a name server say
