"""Show labels of one to four tokens on real text: where a short text comes from.

    python benchmarks/topics.py

Tweets, film reviews, newspaper editorials and product reviews out of the demo's package, the demo's
base, four labels of different lengths. Runs the workflow; writes benchmarks/topics.md.
"""

import io
import subprocess
import sys
import tarfile
from typing import Any

import numpy as np
import pandas as pd
import yaml

from common import ROOT, WORK, machine, program, write_page
from fetch_demo_data import INNER, PACKAGE
from pockettune.sources.packages import download_package

FOLDER = WORK / "topics"
RESULTS = FOLDER / "results"
LABELS = {
    "tweets": "tweet",
    "movieReviewSnippets": "film review",
    "nytEditorialSnippets": "newspaper",
    "amazonReviewSnippets": "review of a product",
}
ROWS = {"train": 400, "validation": 200, "test": 600}
WORDS = (5, 25)


def make_files() -> dict[str, str]:
    """Write the splits, each with as many rows of every topic; return their paths."""
    archive = download_package(PACKAGE, ROOT / "resources/downloads")
    parts: dict[str, list[pd.DataFrame]] = {split: [] for split in ROWS}
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(INNER)) as inner:
        for name, label in LABELS.items():
            file = inner.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert file, "the release was verified"
            content = io.StringIO(file.read().decode("utf-8", "replace"))
            table = pd.read_csv(content, sep="\t", names=["id", "rating", "text"], quoting=3)
            words = table["text"].map(lambda text: len(text.split()))
            table = table[words.between(*WORDS)].drop_duplicates("text")
            rows = table.iloc[np.random.default_rng(0).permutation(len(table))]
            begin = 0
            for split, count in ROWS.items():
                end = begin + count // len(LABELS)
                parts[split].append(rows.iloc[begin:end].assign(label=label)[["text", "label"]])
                begin = end
    paths = {split: FOLDER / f"{split}.csv" for split in ROWS}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for split, tables in parts.items():
        pd.concat(tables).to_csv(paths[split], index=False)
    return {split: str(path.relative_to(ROOT)) for split, path in paths.items()}


def write_run(files: dict[str, str]) -> str:
    """Write the run file, the demo's with another task; return its path."""
    run = yaml.safe_load((ROOT / "runs/demo.yaml").read_text(encoding="utf-8"))
    known = dict.fromkeys(["0", "1", *run["task"]["labels"]])  # null leaves a label out
    run |= {
        "pathvars": {"results": str(RESULTS.relative_to(ROOT))},
        "dataset": {"files": files},
        "report": {"title": "Where a text comes from"},
    }
    run["task"] |= {
        "prompt": f"Is this from a {', a '.join(LABELS.values())}? {{text}}",
        "labels": known | {label: label for label in LABELS.values()},
    }
    path = FOLDER / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return str(path.relative_to(ROOT))


def main() -> None:
    run = write_run(make_files())
    metrics = RESULTS / "metrics.json"
    command = [sys.executable, "-m", "snakemake", "--cores", "all", "--configfile", run]
    subprocess.run([*command, "--", str(metrics.relative_to(ROOT))], cwd=ROOT, check=True)
    stages = program.read_json(metrics)["stages"]
    lengths = program.read_json(RESULTS / "tokens/answers.json")
    told = ", ".join(
        f"{word} ({len(ids) - 1})"
        for word, ids in zip(lengths["words"], lengths["ids"], strict=True)
    )
    lines = [
        "# Labels of one to four tokens",
        "",
        f"SmolLM2-135M-Instruct on {ROWS['train']} short texts of four kinds, scored on"
        f" {ROWS['test']}; on {machine()}. Labels, with their tokens: {told}."
        " Made by `python benchmarks/topics.py`.",
        "",
        "| stage | rows | accuracy | macro F1 |" + "".join(f" {w} |" for w in lengths["words"]),
        "|---|---|---|---|" + "---|" * len(LABELS),
        *(describe(name, entry, lengths["words"]) for name, entry in stages.items()),
        "",
        "The last columns are the share of each label's rows that was found. Answers chosen by the labels'"
        " probabilities against answers written freely (greedy), on the same rows:",
        "",
        "| file | rows | chosen among the labels | written freely | no label at all | mass off the labels |",
        "|---|---|---|---|---|---|",
        *(describe_greedy(name, entry) for name, entry in stages.items() if "greedy" in entry),
    ]
    write_page("topics", lines)


def describe(name: str, entry: dict[str, Any], words: list[str]) -> str:
    """Return a stage's row of the table."""
    recalls = "".join(f" {100 * entry['per_class'][word]['recall']:.1f} % |" for word in words)
    return (
        f"| {name} | {entry['n']} | {100 * entry['accuracy']:.1f} % |"
        f" {100 * entry['macro_f1']:.1f} % |{recalls}"
    )


def describe_greedy(name: str, entry: dict[str, Any]) -> str:
    """Return a file's row of the second table."""
    greedy = entry["greedy"]
    return (
        f"| {name} | {greedy['rows']} | {greedy['scored_right']} right | {greedy['right']} right"
        f" | {greedy['no_answer']} | {100 * entry['off_labels']['mass']:.1f} % |"
    )


if __name__ == "__main__":
    main()
