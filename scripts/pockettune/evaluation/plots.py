"""The report's plots, as <svg> elements whose text stays text."""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from pockettune.common.words import Words, english

WIDTH = 4.2  # inches, 403 px: at a phone's 350 px the text is still of 11 px
INK = "#7a7a7a"  # readable on a light page and on a dark one
COLORS = ("#3b82c4", "#e08a3c")
STYLE: Any = {
    "svg.fonttype": "none",  # the browser has the Chinese fonts
    "svg.hashsalt": "pockettune",  # the same numbers give the same bytes
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def use_style() -> None:
    """Set colours and fonts of all figures made from now on."""
    matplotlib.rcParams |= STYLE


def plot_ladder(stages: Mapping[str, Any], words: Words = english) -> str:
    """Return the task's metric by stage with 95 % intervals, and that on rows not in train."""
    figure = Figure(figsize=(WIDTH, 0.34 * len(stages) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = list(stages)[::-1]
    for place, name in enumerate(names):
        entry = stages[name]
        low, high = (100 * bound for bound in entry["interval"])
        axes.plot([low, high], [place, place], color=COLORS[0], linewidth=2)
        axes.plot(100 * entry["score"], place, "o", color=COLORS[0])
        if (unseen := entry["unseen"].get(entry["metric"])) is not None:
            axes.plot(100 * unseen, place, "D", color=COLORS[1], markersize=5)
        axes.annotate(f"{100 * entry['score']:.1f}", (high, place), xytext=(6, 0),
                      textcoords="offset points", va="center", fontsize=9)  # fmt: skip
    axes.plot([], [], "o-", color=COLORS[0], label=words("all rows, 95 % interval"))
    axes.plot([], [], "D", color=COLORS[1], markersize=5, label=words("not in train"))
    axes.set(xlabel=name_metric(stages, words), yticks=range(len(names)), yticklabels=names)
    axes.margins(x=0.08)
    axes.grid(axis="x", color=INK, alpha=0.2)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return as_svg(figure)


def name_metric(stages: Mapping[str, Any], words: Words) -> str:
    """Return the name of an axis of the task's metric."""
    return words("{metric}, %", metric=say_metric(stages["f16"]["metric"], words))


def say_metric(metric: str, words: Words = english) -> str:
    """Return a metric's name as it is read."""
    names = {
        "accuracy": words("accuracy"),
        "micro_f1": words("micro F1"),
        "f1": words("F1"),
        "token_accuracy": words("token accuracy"),
        "macro_f1": words("macro F1"),
        "exact_match": words("exact match"),
        "precision": words("precision"),
        "recall": words("recall"),
    }
    return names.get(metric, metric)


def plot_front(choice: Mapping[str, Any], stages: Mapping[str, Any], words: Words = english) -> str:
    """Return the task's metric over size of the files of choose(), with the 95 % intervals of that name.

    A point's area is its prompt rate; filled are those that no other file beats. The chosen one has
    another colour; a line stands at the largest size allowed.
    """
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    files, size_mb = choice["files"], choice["limits"]["size_mb"]
    fastest = max(entry["prompt_rate"] for entry in files.values())
    for name, entry in files.items():
        x, y = entry["size_bytes"] / 1e6, 100 * entry["score"]
        color = COLORS[1] if name == choice["chosen"] else COLORS[0]
        low, high = (100 * bound for bound in stages[name]["interval"])
        axes.plot([x, x], [low, high], color=color, alpha=0.4, zorder=1)
        axes.scatter(x, y, s=160 * entry["prompt_rate"] / fastest, edgecolors=color,
                     facecolors=color if entry["front"] else "none")  # fmt: skip
    if size_mb is not None:
        axes.axvline(size_mb, color=INK, linewidth=0.8, linestyle=":")
    axes.set(xlabel=words("file size, MB"), ylabel=name_metric(stages, words))
    axes.set_xlim(left=0)
    axes.margins(x=0.15, y=0.15)
    axes.ticklabel_format(useOffset=False)
    points = [(entry["size_bytes"] / 1e6, 100 * entry["score"]) for entry in files.values()]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    heights = spread_heights(points, near=0.3 * (right - left), gap=0.07 * (top - bottom))
    for name, (x, _), y in zip(files, points, heights, strict=True):
        axes.annotate(name, (x, y), xytext=(9, 0), textcoords="offset points", va="center")
    return as_svg(figure)


def spread_heights(points: Sequence[tuple[float, float]], near: float, gap: float) -> list[float]:
    """Return a height for each point's name, at or above the point's own.

    Files of neighbouring sizes (within `near`), as those of 4 bits are, would write over each other.
    """
    heights = [y for _, y in points]
    placed: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: heights[i]):
        for j in placed:  # from the lowest up
            if abs(points[i][0] - points[j][0]) < near and heights[i] - heights[j] < gap:
                heights[i] = heights[j] + gap
        placed.append(i)
        placed.sort(key=lambda k: heights[k])
    return heights


def plot_training(training: Mapping[str, Any], words: Words = english) -> str:
    """Return the training loss and the validations; "" for an imported adapter."""
    if "updates" not in training:
        return ""
    losses = pd.Series([update["loss"] for update in training["updates"]])
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.subplots()
    numbers, window = losses.index + 1, max(len(losses) // 20, 1)
    axes.plot(numbers, losses, color=COLORS[0], alpha=0.3, linewidth=0.8)
    mean = losses.rolling(window, 1).mean()
    label = words("loss, mean of {n} updates", n=window)
    lines = axes.plot(numbers, mean, color=COLORS[0], label=label)
    # The first updates, which learn what an answer is, would flatten all that follows.
    axes.set(xlabel=words("update"), ylabel=words("loss"), ylim=(0, 1.5 * losses.quantile(0.95)))
    if training["validations"]:
        metric, right = training["metric"], axes.twinx()
        name = say_metric(metric, words)
        updates = [entry["update"] for entry in training["validations"]]
        values = [100 * entry[metric] for entry in training["validations"]]
        label = words("{metric} on validation, %", metric=name)
        lines += right.plot(updates, values, "o-", color=COLORS[1], label=label)
        right.axvline(training["exported_update"], color=INK, linewidth=0.8, linestyle=":")
        right.set(ylabel=words("{metric}, %", metric=name))
        right.spines["right"].set_visible(True)
        right.ticklabel_format(useOffset=False)
    axes.legend(handles=lines, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return as_svg(figure)


def as_svg(figure: Figure) -> str:
    """Return a figure as an <svg> element."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The font that matplotlib measures by need not have the letters: the browser's has.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
