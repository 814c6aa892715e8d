"""Render one self-contained page from what the other programs wrote.

Input   metrics.json, audit.json, tokens/, adapter/, the base model's folder, benchmark files
Output  report.html: works offline, no script, nothing loaded from anywhere
"""

import argparse
import io
import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from pockettune import program

INK = "#7a7a7a"  # readable on a light page and on a dark one
COLORS = ("#3b82c4", "#e08a3c")


def write_report(arguments: argparse.Namespace) -> str:
    """Return the page as HTML."""
    matplotlib.rcParams |= {
        "svg.fonttype": "none",  # text stays text: the browser has the Chinese fonts
        "svg.hashsalt": "pockettune",  # the same numbers give the same bytes
        "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    stages = program.read_json(arguments.metrics)["stages"]
    training = program.read_json(arguments.adapter / "training.json")
    loader = FileSystemLoader(arguments.template.parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"percent": percent, "megabytes": megabytes, "duration": duration}
    return environment.get_template(arguments.template.name).render(
        title=arguments.settings["report"]["title"],
        verdict=write_verdict(stages),
        stages=stages,
        split=stages["merged"]["split"],
        plots={
            "accuracy": plot_accuracy(stages),
            "size": plot_size(stages),
            "loss": plot_loss(training["updates"]),
        },
        training=training,
        audit=program.read_json(arguments.audit),
        tokens=program.read_json(arguments.tokens / "statistics.json"),
        jobs=read_benchmarks(arguments.benchmarks),
        source=program.read_json(arguments.base / "source.json"),
        settings=json.dumps(arguments.settings, ensure_ascii=False, indent=2),
    )


def write_verdict(stages: Mapping[str, Any]) -> str:
    """Return the page's first sentence: what the smallest file knows, weighs and lost."""
    gguf = {name: entry for name, entry in stages.items() if name not in ("base", "merged", "f16")}
    name = min(gguf, key=lambda n: gguf[n]["size_bytes"])
    small, full, base = stages[name], stages["f16"], stages["base"]
    lost = 100 * (full["accuracy"] - small["accuracy"])
    change = (
        "as accurate as"
        if abs(lost) < 0.05
        else f"{abs(lost):.1f} points {'below' if lost > 0 else 'above'}"
    )
    unseen, flips = small["unseen"], small["flips_against_f16"]
    seen_rows = small["n"] - unseen["n"]
    aside = (
        f" ({percent(unseen['accuracy'])} on the {unseen['n']:,} that do not stand in train)"
        if seen_rows and unseen["n"]
        else ""
    )
    return (
        f"The smallest file, {name}, answers {percent(small['accuracy'])} of {small['n']:,} rows "
        f"rightly{aside}. It is {change} the 16-bit file, with {flips} {'answer' if flips == 1 else 'answers'} "
        f"changed, at {megabytes(small['size_bytes'])} instead of {megabytes(full['size_bytes'])}. "
        f"The base model alone answers {percent(base['accuracy'])} rightly."
    )


def plot_accuracy(stages: Mapping[str, Any]) -> str:
    """Return a bar plot of accuracy by stage, on all rows and on those not in train."""
    figure = Figure(figsize=(7, 0.55 * len(stages) + 0.9), layout="constrained")
    axes = figure.subplots()
    names = list(stages)[::-1]
    for shift, key, color in ((0.19, "all rows", COLORS[0]), (-0.19, "not in train", COLORS[1])):
        scored = [stages[n] if key == "all rows" else stages[n]["unseen"] for n in names]
        values = [100 * entry.get("accuracy", 0) for entry in scored]
        bars = axes.barh(
            [i + shift for i in range(len(names))], values, 0.36, color=color, label=key
        )
        axes.bar_label(bars, fmt="%.1f", padding=3, color=INK, fontsize=8)
    axes.set(xlim=(0, 108), xlabel="accuracy, %", yticks=range(len(names)), yticklabels=names)
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return as_svg(figure)


def plot_size(stages: Mapping[str, Any]) -> str:
    """Return a plot of accuracy over file size, a point a GGUF file."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, entry in stages.items():
        if name not in ("base", "merged"):
            x, y = entry["size_bytes"] / 1e6, 100 * entry["accuracy"]
            axes.scatter(x, y, color=COLORS[0], zorder=3)
            axes.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points")
    axes.set(xlabel="file size, MB", ylabel="accuracy, %")
    axes.set_xlim(left=0)
    axes.margins(x=0.15, y=0.35)
    axes.ticklabel_format(useOffset=False)
    return as_svg(figure)


def plot_loss(updates: list[dict[str, float]]) -> str:
    """Return a plot of the training loss, each update and its moving mean."""
    losses = pd.Series([update["loss"] for update in updates])
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses.index + 1, losses, color=COLORS[0], alpha=0.3, linewidth=0.8, label="update")
    window = max(len(losses) // 20, 1)
    axes.plot(
        losses.index + 1,
        losses.rolling(window, 1).mean(),
        color=COLORS[0],
        label=f"mean of {window}",
    )
    axes.set(xlabel="update", ylabel="loss", ylim=(0, None))
    axes.legend(frameon=False)
    return as_svg(figure)


def as_svg(figure: Figure) -> str:
    """Return a figure as an <svg> element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def read_benchmarks(paths: list[Path]) -> list[dict[str, Any]]:
    """Return name, seconds and peak memory in MB of each job; None where Snakemake saw none."""
    jobs = []
    for path in paths:
        row = pd.read_csv(path, sep="\t", na_values="-").iloc[0]
        memory = row["max_rss"] if pd.notna(row["max_rss"]) and row["max_rss"] else None
        jobs.append({"name": path.stem, "seconds": float(row["s"]), "memory_mb": memory})
    return jobs


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--settings", type=json.loads, required=True, help="the whole config")
    parser.add_argument("--template", type=Path, required=True, help="Jinja template of the page")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json")
    parser.add_argument("--audit", type=Path, required=True, help="audit.json")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of train_adapter.py")
    parser.add_argument("--base", type=Path, required=True, help="folder of fetch_model.py")
    parser.add_argument("--benchmarks", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True, help="report.html to write")

    def work(arguments: argparse.Namespace) -> None:
        with program.staged(arguments.output) as partial:
            partial.write_text(write_report(arguments), encoding="utf-8")
        program.logger.info("report in %s", arguments.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
