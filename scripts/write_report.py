"""Render one self-contained page, and a model card, from what the other programs wrote.

Input   metrics.json, flips.json, samples.json of a task of text, parity.json and those of other formats,
        audit.json, speed of each file, the files' tokens/, adapter/, the base model's folder, benchmark files; the table of sentences of another language than English
Output  report.html: works offline, no script, nothing loaded from anywhere
        card.md: the model card for a hub, with the same numbers
"""

import argparse
import json
import re
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from pockettune.common import program
from pockettune.common.formats import GGUF, file_name
from pockettune.common.pages import render_page
from pockettune.common.words import Words, english, read_words
from pockettune.evaluation import plots
from pockettune.evaluation.choice import choose, read_limits, say_why
from pockettune.evaluation.verdict import not_decided, say

FLIPS_SHOWN = 40  # of each file
# Beside the metric of a task of text, where it has them.
FURTHER = ("exact_match", "macro_f1", "precision", "recall")


def gather(arguments: argparse.Namespace, words: Words = english) -> dict[str, Any]:
    """Return what both templates may show, its sentences in the language of `words`."""
    plots.use_style()
    settings = without_folders(arguments.settings)
    stages = program.read_json(arguments.metrics)["stages"]
    training = read_training(arguments.adapter)
    source = program.read_json(arguments.base / "source.json")
    if settings["model"]["path"]:  # else it is owner/name@revision
        source["origin"] = last_part(source["origin"])
    audit = program.read_json(arguments.audit)
    speed = {path.stem: program.read_json(path) for path in arguments.speed}
    choice = choose(stages, speed, read_limits(settings), words)
    # Without the section none was chosen; which file beats which is told all the same.
    if settings["choose"] is None:
        choice["chosen"] = None
    return {
        "title": settings["report"]["title"],
        "is_text": is_text(stages),
        "metric": plots.say_metric(stages["f16"]["metric"], words),
        "further": [name for name in FURTHER if name in stages["f16"]],
        "language": settings["report"]["language"],
        "file": shown_file(choice),
        "verdict": write_verdict(stages, training, audit, choice, words),
        "stages": stages,
        "split": settings["evaluate"]["split"],
        "plots": {
            "ladder": plots.plot_ladder(stages, words),
            "front": plots.plot_front(choice, stages, words),
            "training": plots.plot_training(training, words),
        },
        "flips": program.read_json(arguments.flips),
        "flips_shown": FLIPS_SHOWN,
        "samples": program.read_json(arguments.samples) if arguments.samples else [],
        "parity": program.read_json(arguments.parity),
        "format_parity": {
            path.stem.removeprefix("parity_"): program.read_json(path)
            for path in arguments.format_parity
        },
        "speed": speed,
        "choice": choice,
        "training": training,
        "audit": audit,
        "tokens": program.read_json(arguments.tokens / "statistics.json"),
        "vocabulary": program.read_json(arguments.vocabulary) if arguments.vocabulary else None,
        "chat": program.read_json(arguments.tokens / "chat.json"),
        "jobs": read_benchmarks(arguments.benchmarks),
        "source": source,
        "config": settings,
        "settings": json.dumps(settings, ensure_ascii=False, indent=2),
    }


def read_training(adapter: Path) -> dict[str, Any]:
    """Return an adapter's training.json with the names of files alone, as without_folders has them."""
    training: dict[str, Any] = program.read_json(adapter / "training.json")
    if "imported_from" in training:
        training["imported_from"] = last_part(training["imported_from"])
    if training.get("teacher"):
        training["teacher"] = name_teacher(training["teacher"])
    return training


def is_text(stages: Mapping[str, Any]) -> bool:
    """Whether the answers are text: then the reference answers were read, see evaluation/reading.py."""
    return "reading" in stages["f16"]


def shown_file(choice: Mapping[str, Any]) -> str:
    """Return the name of the chosen file, or of the smallest GGUF file."""
    return choice["chosen"] or next(
        name for name, entry in choice["files"].items() if name != "f16" and entry["format"] == GGUF
    )


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings as they may be published: local files by name, not where they lie.

    A path tells the names of users, customers and machines.
    """
    model, dataset, train = (dict(settings[section]) for section in ("model", "dataset", "train"))
    model |= {key: last_part(model[key]) for key in ("path", "chat_template") if model.get(key)}
    if dataset["files"]:
        dataset["files"] = {split: last_part(path) for split, path in dataset["files"].items()}
    if train["adapter"]:
        train["adapter"] = last_part(train["adapter"])
    if train.get("teacher"):
        train["teacher"] = name_teacher(train["teacher"])
    return {**settings, "model": model, "dataset": dataset, "train": train}


def name_teacher(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section train.teacher with the names of its files alone."""
    return {k: last_part(v) if isinstance(v, str) else v for k, v in teacher.items()}


def last_part(path: str) -> str:
    """Return the name of a file or folder; of a path that has none, such as "/", the path."""
    return Path(path).name or path


def render(template: Path, content: Mapping[str, Any], words: Words = english) -> str:
    """Return a template filled in, with the report's own filters; it says its sentences by _()."""
    filters: dict[str, Any] = {
        "percent": percent, "megabytes": megabytes, "duration": duration, "points": points,
        "scientific": scientific, "plain": plain, "fenced": fenced, "quoted": quoted, "headed": headed,
        "interval": partial(say_interval, words=words), "claim": partial(say, words=words),
        "claim_in_short": partial(say_in_short, words=words), "why": partial(say_why, words=words),
        "choice_of_layers": partial(say_choice_of_layers, words=words),
        "metric_name": partial(plots.say_metric, words=words), "error_name": partial(say_error, words=words),
        "file_name": lambda stage, name: file_name(name, stage.get("format", GGUF)),
    }  # fmt: skip
    return render_page(template, {**content, "_": words}, filters)


def write_verdict(
    stages: Mapping[str, Any],
    training: Mapping[str, Any],
    audit: Mapping[str, Any],
    choice: Mapping[str, Any],
    words: Words,
) -> str:
    """Return in a few sentences what was learned from how many rows, and what it is worth.

    Then what the chosen file weighs, or else the smallest, and what it lost against the 16-bit one.
    """
    chosen = choice["chosen"]
    name = shown_file(choice)
    small, full = stages[name], stages["f16"]
    rows = audit["splits"]["train"]["rows"]
    told = {
        "file": name,
        "size": megabytes(small["size_bytes"]),
        "full": megabytes(full["size_bytes"]),
        "changed": say_changed(small, words),
    }
    weight = (
        words("That is the chosen file, {file}: {size} instead of {full}, {changed}.", **told)
        if chosen
        else words(
            "That is the smallest file, {file}: {size} instead of {full}, {changed}.", **told
        )
    )
    claim = words(
        "Against the 16-bit file: {claim}.", claim=say(choice["files"][name]["verdict"], words)
    )
    if is_text(stages):  # there is no counting of characters to compare it with
        learned = write_learned_text(small, stages["base"], training, rows, words)
        return words(" ").join([learned, weight, claim])
    learned = write_learned(small, stages["base"], training, rows, words)
    worth = write_worth(small["against_tfidf"], stages["tfidf"], rows, words)
    return words(" ").join([learned, worth, weight, claim])


def say_changed(small: Mapping[str, Any], words: Words) -> str:
    """Return how many of a file's answers are not the 16-bit file's; of text, how many are."""
    if "reading" not in small:
        flips = small["against_f16"]["flips"]
        return say_count(flips, words, "{n} answer changed", "{n} answers changed")
    parting = small["parting"]
    if parting["rows"]:
        return words(
            "{equal} of {n} written answers the same to the end",
            equal=f"{parting['equal']:,}",
            n=f"{parting['rows']:,}",
        )
    return words(
        "its likeliest token the same at {share} of the reference answers' tokens",
        share=percent(small["reading"]["likeliest_equal"]),
    )


def write_learned(
    small: Mapping[str, Any],
    base: Mapping[str, Any],
    training: Mapping[str, Any],
    rows: int,
    words: Words,
) -> str:
    """Return what a file answers after the training, and what the base did before."""
    unseen = small["unseen"]
    aside = (
        words(
            " ({accuracy} of the {n} that do not stand in train)",
            accuracy=percent(unseen[small["metric"]]),
            n=f"{unseen['n']:,}",
        )
        if 0 < unseen["n"] < small["n"]
        else ""
    )
    if "imported_from" in training:
        learned = say_origin(training, words)
    else:
        learned = say_count(
            rows, words, "Having learned from {n} labelled row, the model",
            "Having learned from {n} labelled rows, the model",
        )  # fmt: skip
    return words(
        "{learned} answers {share} of {n} rows rightly{aside}; before, it answered {before}.",
        learned=learned, share=percent(small["score"]), n=f"{small['n']:,}", aside=aside,
        before=say_before(base, small, words),
    )  # fmt: skip


def write_learned_text(
    small: Mapping[str, Any],
    base: Mapping[str, Any],
    training: Mapping[str, Any],
    rows: int,
    words: Words,
) -> str:
    """Return what write_learned does, where the metric is no share of right rows."""
    unseen, metric = small["unseen"], plots.say_metric(small["metric"], words)
    aside = (
        words(
            " ({score} on the {n} that do not stand in train)",
            score=percent(unseen[small["metric"]]),
            n=f"{unseen['n']:,}",
        )
        if 0 < unseen["n"] < small["n"]
        else ""
    )
    if "imported_from" in training:
        learned = say_origin(training, words)
    else:
        learned = say_count(
            rows, words, "Having learned from {n} row, the model",
            "Having learned from {n} rows, the model",
        )  # fmt: skip
    return words(
        "{learned} reaches {share} ({metric}) on {n} rows{aside}; before, it was {before}.",
        learned=learned, share=percent(small["score"]), metric=metric, n=f"{small['n']:,}",
        aside=aside, before=say_before(base, small, words),
    )  # fmt: skip


def say_origin(training: Mapping[str, Any], words: Words) -> str:
    """Return the subject of the first sentence where the adapter was not trained here."""
    return words("With an adapter from {origin}, the model", origin=training["imported_from"])


def say_before(base: Mapping[str, Any], small: Mapping[str, Any], words: Words) -> str:
    """Return the base's score, and on how many rows where these are not the file's."""
    before = percent(base["score"])
    if base["n"] == small["n"]:
        return before
    return words("{share} of {n}", share=before, n=f"{base['n']:,}")


def write_worth(
    paired: Mapping[str, Any], baseline: Mapping[str, Any], rows: int, words: Words
) -> str:
    """Return whether the model is worth its weight, against counting characters."""
    told = words(
        "Counting characters (TF-IDF, no language model) reaches {share} with {rows}",
        share=percent(baseline["score"]),
        rows=say_count(rows, words, "{n} row", "{n} rows"),
    )
    low, high = paired["interval"]
    if low > 0:
        return words("{told}: the model is better.", told=told)
    if high < 0:
        return words(
            "{told}: the model is worse and not worth a phone's battery on this task.", told=told
        )
    claim = not_decided(paired["detectable"], words)
    return words("{told}: which is better is {claim}.", told=told, claim=claim)


def read_benchmarks(paths: list[Path]) -> list[dict[str, Any]]:
    """Return name, seconds and peak memory in MB of each job.

    None for a job of less than a second: Snakemake looks twice a second.
    """
    jobs = []
    for path in paths:
        row = pd.read_csv(path, sep="\t", na_values="-").iloc[0]
        memory = row["max_rss"] if pd.notna(row["max_rss"]) and row["s"] > 1 else None
        jobs.append({"name": path.stem, "seconds": float(row["s"]), "memory_mb": memory})
    return jobs


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def points(share: float) -> str:
    return f"{100 * share:+.1f}"


def scientific(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.4f}"


def plain(value: float) -> str:
    """Return a perplexity: 3 digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def headed(text: str) -> str:
    """Return a text that begins a sentence."""
    return text[:1].upper() + text[1:]


def say_error(kind: str, words: Words) -> str:
    """Return what a task calls a kind of error, as it is read."""
    return {
        "type": words("another type"),
        "boundary": words("other boundaries"),
        "missing": words("missing"),
        "made_up": words("made up"),
        "not_in_text": words("does not stand in the text"),
    }.get(kind, kind)


def say_interval(interval: tuple[float, float], words: Words) -> str:
    low, high = map(percent, interval)
    return words("{low} to {high}", low=low, high=high)


def say_in_short(verdict: Mapping[str, Any], words: Words) -> str:
    """Return a verdict's name, without what it rests on."""
    return {
        "as good": words("proved as good"),
        "worse": words("proved worse"),
        "undecided": words("not decided"),
    }[verdict["claim"]]


def say_choice_of_layers(choice: Mapping[str, Any], words: Words) -> str:
    """Return by which measurement layers were chosen, out of the base's source.json."""
    tail, greedy = (scientific(choice["label_kl"][way]) for way in ("tail", "greedy"))
    return words(
        "{way} chosen on {rows} of validation by label KL against the whole base: tail {tail}, greedy {greedy}",
        way=choice["chosen"],
        rows=say_count(choice["rows"], words, "{n} row", "{n} rows"),
        tail=tail,
        greedy=greedy,
    )


def quoted(text: str) -> str:
    """Return a text as JSON writes it, so that the line breaks at its end can be seen and copied."""
    return json.dumps(text, ensure_ascii=False)


def fenced(text: str) -> str:
    """Return a text as a block of code in Markdown that no run of backticks in it can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def say_count(number: int, words: Words, one: str, many: str) -> str:
    """Return the sentence for one or that for many."""
    return words(one if number == 1 else many, n=f"{number:,}")


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--settings", type=json.loads, required=True, help="the whole config")
    parser.add_argument(
        "--templates", type=Path, nargs="+", required=True,
        help="of page and card, and what they include",
    )  # fmt: skip
    parser.add_argument(
        "--sentences", type=Path, nargs="?", help="of another language than English"
    )
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json")
    parser.add_argument("--flips", type=Path, required=True, help="flips.json")
    parser.add_argument("--samples", type=Path, nargs="?", help="samples.json of a task of text")
    parser.add_argument("--parity", type=Path, required=True, help="parity.json")
    # nargs="*": without a variant of another format there is none.
    parser.add_argument("--format-parity", type=Path, nargs="*", default=[])
    parser.add_argument("--speed", type=Path, nargs="+", required=True)
    parser.add_argument("--audit", type=Path, required=True, help="audit.json")
    parser.add_argument("--vocabulary", type=Path, nargs="?", help="of a trimmed model")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of train_adapter.py")
    parser.add_argument("--base", type=Path, required=True, help="folder of fetch_model.py")
    parser.add_argument("--benchmarks", type=Path, nargs="+", required=True)
    parser.add_argument("--html", type=Path, required=True, help="report.html to write")
    parser.add_argument("--card", type=Path, required=True, help="card.md to write")

    def work(arguments: argparse.Namespace) -> None:
        words = read_words(arguments.sentences)
        content = gather(arguments, words)
        outputs = (arguments.html, arguments.card)
        for template, output in zip(arguments.templates, outputs, strict=False):
            page = render(template, content, words).encode()
            with program.staged(output, needed=len(page)) as unfinished:
                unfinished.write_bytes(page)
        program.logger.info("report in %s", arguments.html)

    program.run(parser, work)


if __name__ == "__main__":
    main()
