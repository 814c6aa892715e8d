"""Put the files that a sweep's runs made into one order: the page and the table.

Runs that differ in train.seed alone are a group, with the mean and the standard deviation over its
seeds: a difference between groups that is smaller than what the seed makes is none.

Input   members.json, and beside it each run's metrics.json and speed/
Output  leaderboard.html: works offline, no script, nothing loaded from anywhere
        leaderboard.csv: a row for each file of each run
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import pandas as pd

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.common.pages import render_page
from pockettune.evaluation.plots import say_metric
from pockettune.evaluation.verdict import say

SEED = "train.seed"


def read_rows(results: Path, members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each file of each run, without order."""
    rows = []
    for member in members:
        folder = results / member["name"]
        stages = program.read_json(folder / "metrics.json")["stages"]
        for name, stage in stages.items():
            if "stored" not in stage or name == "f16":
                continue
            speed = program.read_json(folder / f"speed/{name}.json")
            rows.append(
                {
                    "run": member["name"],
                    "changed": member["changed"],
                    "file": name,
                    "size_bytes": stage["size_bytes"],
                    "metric": stage["metric"],
                    "score": stage["score"],
                    "low": stage["interval"][0],
                    "high": stage["interval"][1],
                    "rows": stage["n"],
                    "f16_score": stages["f16"]["score"],
                    "claim": stage["verdict"]["claim"],
                    "verdict": say(stage["verdict"]),
                    "prompt_rate": speed["prompt"]["mean"],
                    "generation_rate": speed["generation"]["mean"],
                }
            )
    return rows


def group_seeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups of rows that differ in their seed alone, the best first.

    Of equally good ones the smaller file comes first. Within a group, by seed.
    """
    by_settings: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        settings = {key: value for key, value in row["changed"].items() if key != SEED}
        by_settings.setdefault(json.dumps([settings, row["file"]]), []).append(row)
    groups = []
    for members in by_settings.values():
        scores = [row["score"] for row in members]
        groups.append(
            {
                "settings": {k: v for k, v in members[0]["changed"].items() if k != SEED},
                "file": members[0]["file"],
                "mean": statistics.mean(scores),
                "deviation": statistics.stdev(scores) if len(members) > 1 else None,
                "size_bytes": max(row["size_bytes"] for row in members),
                "prompt_rate": statistics.mean(row["prompt_rate"] for row in members),
                "members": sorted(members, key=lambda row: row["changed"].get(SEED, 0)),
            }
        )
    return sorted(groups, key=lambda group: (-group["mean"], group["size_bytes"]))


def common_metric(rows: list[dict[str, Any]]) -> str:
    """Return the metric that all rows go by; UserError where there are several, which have no one order."""
    metrics = sorted({row["metric"] for row in rows})
    if len(metrics) > 1:
        raise UserError(
            f"the sweep's runs go by different metrics, {' and '.join(metrics)}, and cannot be put into"
            " one order; sweep each task.type by itself"
        )
    return metrics[0]


def as_table(groups: list[dict[str, Any]], metric: str) -> pd.DataFrame:
    """Return a row for each file of each run, with its group's place, mean and deviation.

    Scores stand under the metric's name.
    """
    named = {"score": metric, "f16_score": f"f16_{metric}"}
    rows = []
    for place, group in enumerate(groups, start=1):
        for row in group["members"]:
            apart = ("changed", "metric")
            values = {named.get(key, key): v for key, v in row.items() if key not in apart}
            changed = {
                key: value if isinstance(value, str | int | float) else json.dumps(value)
                for key, value in row["changed"].items()
            }
            rows.append(
                {
                    "place": place, **values, **changed, "seeds": len(group["members"]),
                    f"mean_{metric}": group["mean"], f"deviation_{metric}": group["deviation"],
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--members", type=Path, required=True, help="members.json of a sweep")
    parser.add_argument("--template", type=Path, required=True, help="of the page")
    parser.add_argument("--html", type=Path, required=True, help="leaderboard.html to write")
    parser.add_argument("--csv", type=Path, required=True, help="leaderboard.csv to write")

    def work(arguments: argparse.Namespace) -> None:
        members = [m for m in program.read_json(arguments.members) if m["current"]]
        rows = read_rows(arguments.members.parent, members)
        metric, groups = common_metric(rows), group_seeds(rows)
        content = {
            "title": arguments.members.parent.name,
            "keys": [key for key in members[0]["changed"] if key != SEED],
            "runs": len(members),
            "metric": say_metric(metric),
            "groups": groups,
            "has_seeds": SEED in members[0]["changed"],
        }
        page = render_page(arguments.template, content, filters={})
        with program.staged(arguments.csv) as csv, program.staged(arguments.html) as html:
            as_table(groups, metric).to_csv(csv, index=False)
            html.write_text(page, encoding="utf-8")
        best = groups[0]
        program.logger.info(
            "%d runs; first is %s of %s, %s %.1f %%; page in %s",
            len(members), best["file"], best["members"][0]["run"], say_metric(metric), 100 * best["mean"],
            arguments.html,
        )  # fmt: skip

    program.run(parser, work)


if __name__ == "__main__":
    main()
