"""The frame of every evaluation: read the examples, have them scored, write metrics and predictions."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pockettune.common import program
from pockettune.data.prompts import Example, Examples, take_evenly
from pockettune.data.records import read_records
from pockettune.evaluation import metrics
from pockettune.evaluation.observers import OffLabels, observe_vocabulary
from pockettune.evaluation.reading import LogitsAt
from pockettune.evaluation.scoring import NextTokenLogits, Tokens, score_answers
from pockettune.evaluation.text_stages import TextRuntime, group_records, score_table, score_text
from pockettune.models.folder import read_kept
from pockettune.tasks import TextTask, as_text_task, load_task

NOISE_ROWS = 16


@dataclass
class Runtime:
    """A loaded model that can be scored."""

    next_token_logits: NextTokenLogits
    prompts: Sequence[Tokens]  # the examples' prompts, in this runtime's own token ids
    vocabulary_size: int
    facts: dict[str, Any] = field(default_factory=dict)  # worth telling beside the metrics
    # Takes prompts and a limit of tokens, returns what is answered; None where it did not end.
    answer_greedily: Callable[[Sequence[Tokens], int], list[str | None]] | None = None
    # Makes what answers with text, which takes more to be made; None where there is none.
    text: Callable[[], TextRuntime] | None = None


# Takes the arguments and the examples.
OpenRuntime = Callable[[argparse.Namespace, Sequence[Example]], AbstractContextManager[Runtime]]


# Takes the arguments; opens what a stage of text is compared with, if anything.
OpenReference = Callable[[argparse.Namespace], AbstractContextManager[LogitsAt | None]]


def not_compared(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    return nullcontext()


def argument_parser(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser with what every evaluation is told."""
    parser = program.argument_parser(docstring)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections task, dataset, evaluate"
    )
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--metrics", type=Path, required=True, help="JSON to write, <stage>.json")
    parser.add_argument("--predictions", type=Path, required=True, help="parquet to write")
    return parser


def run(
    docstring: str | None,
    open_runtime: OpenRuntime,
    options: Iterable[str] = (),
    open_reference: OpenReference = not_compared,
) -> None:
    """Run a program that evaluates one stage's model; `options` are further paths it takes.

    `open_reference` opens F16 to compare a stage of text with. It comes from the program, so that those
    without text do not depend on llama.cpp's modules, of which a line would have them run again.
    """
    parser = argument_parser(docstring)
    parser.add_argument("--model", type=Path, required=True, help="what to evaluate")
    parser.add_argument("--threads", type=int, required=True)
    # nargs="?": a rule that has no such file names the option alone.
    parser.add_argument(
        "--reference",
        type=Path,
        nargs="?",
        help="F16's answers over the whole vocabulary; of a task of text, F16 itself",
    )
    parser.add_argument("--records", type=Path, nargs="?", help="the split's records, for text")
    parser.add_argument("--write-reference", type=Path, nargs="?", help="write such a file")
    for option in options:
        parser.add_argument(option, type=Path, nargs="?")
    program.run(parser, lambda arguments: evaluate(arguments, open_runtime, open_reference))


def evaluate(
    arguments: argparse.Namespace,
    open_runtime: OpenRuntime,
    open_reference: OpenReference = not_compared,
) -> None:
    """Score the rows that `evaluate:` names and write the stage's files."""
    settings = arguments.settings
    if task := as_text_task(load_task(settings["task"], settings["dataset"])):
        return evaluate_text(arguments, open_runtime, open_reference, task)
    answers = program.read_json(arguments.tokens / "answers.json")
    rows = read_rows(arguments)
    places = take_evenly(range(len(rows)), arguments.settings["evaluate"].get("pytorch_limit"))
    examples = [rows[place] for place in places]
    off_labels = OffLabels(answers["ids"])
    kept = read_kept(getattr(arguments, "vocabulary", None))
    started = time.perf_counter()
    with open_runtime(arguments, examples) as runtime:
        with observe_vocabulary(
            arguments.reference, arguments.write_reference, places, runtime.vocabulary_size, kept
        ) as observer:
            scores = score_answers(
                observer.watch(off_labels.watch(runtime.next_token_logits)),
                runtime.prompts,
                answers["ids"],
                arguments.metrics.stem,
            )
        seconds = time.perf_counter() - started
        noise = measure_noise(runtime, answers["ids"], scores)
        greedy = answer_greedily(arguments.settings, runtime, examples, answers, scores)
    facts = {
        "seconds": round(seconds, 2),
        **observer.describe(),
        **off_labels.describe(),
        **greedy,
        "noise": noise,
        **runtime.facts,
    }
    write_stage(arguments, examples, answers["words"], scores, facts)


def evaluate_text(
    arguments: argparse.Namespace,
    open_runtime: OpenRuntime,
    open_reference: OpenReference,
    task: TextTask,
) -> None:
    """Have the rows answered with text, and write the stage's files."""
    settings = arguments.settings["evaluate"]
    rows = Examples(arguments.tokens / f"{settings['split']}.arrow")
    records = take_evenly(group_records(rows), settings["limit"])
    records = take_evenly(records, settings.get("pytorch_limit"))
    examples = [example for group in records for example in group]
    questions = {record["id"]: record for record in read_records(arguments.records)}
    started = time.perf_counter()
    with open_runtime(arguments, examples) as runtime, open_reference(arguments) as reference:
        assert runtime.text is not None, "every runtime of this program has one"
        table, facts = score_text(
            task, runtime.text(), examples, questions, settings.get("greedy_rows"),
            arguments.metrics.stem, reference, read_kept(getattr(arguments, "vocabulary", None)),
        )  # fmt: skip
    result = {
        "stage": arguments.metrics.stem,
        "metric": task.metric,
        **score_table(task, table),
        "split": settings["split"],
        "seconds": round(time.perf_counter() - started, 2),
        **facts,
        **runtime.facts,
    }
    write_files(arguments, table, result)


def read_rows(arguments: argparse.Namespace) -> list[Example]:
    """Return the rows that `evaluate:` names."""
    settings = arguments.settings["evaluate"]
    return take_evenly(Examples(arguments.tokens / f"{settings['split']}.arrow"), settings["limit"])


def answer_greedily(
    settings: dict[str, Any],
    runtime: Runtime,
    examples: Sequence[Example],
    answers: dict[str, Any],
    scores: np.ndarray,
) -> dict[str, Any]:
    """Return {"greedy"}: how often the likeliest text, token by token, is the right answer.

    On `evaluate.greedy_rows` rows, evenly spread; nothing where the runtime or the settings have none.
    What stands for no answer is a wrong one; "scored_right": how many the scores have right of them.
    """
    wanted = settings["evaluate"].get("greedy_rows")
    if not wanted or runtime.answer_greedily is None:
        return {}
    rows = take_evenly(range(len(examples)), wanted)
    # Room for an answer in other tokens than it is trained in.
    limit = max(map(len, answers["ids"])) + 4
    texts = runtime.answer_greedily([runtime.prompts[row] for row in rows], limit)
    task = load_task(settings["task"], settings["dataset"])
    said = [None if text is None else task.parse(text) for text in texts]
    right = [examples[row].reference for row in rows]
    scored = [answers["words"][best] for best in scores[rows].argmax(axis=1)]
    return {
        "greedy": {
            "rows": len(rows),
            "right": count_equal(right, said),
            "no_answer": said.count(None),
            "scored_right": count_equal(right, scored),
        }
    }


def count_equal(first: Sequence[str], second: Sequence[str | None]) -> int:
    return sum(a == b for a, b in zip(first, second, strict=True))


def write_stage(
    arguments: argparse.Namespace,
    examples: Sequence[Example],
    words: Sequence[str],
    scores: np.ndarray,
    facts: dict[str, Any],
) -> None:
    """Write predictions and metrics of log probabilities (examples, answers)."""
    settings = arguments.settings
    task = load_task(settings["task"], settings["dataset"])
    predictions = metrics.predict(examples, words, scores)
    result = {
        "stage": arguments.metrics.stem,
        "metric": task.metric,
        **metrics.score_predictions(task, predictions),
        "split": settings["evaluate"]["split"],
        **facts,
    }
    write_files(arguments, predictions, result)


def write_files(
    arguments: argparse.Namespace, predictions: pd.DataFrame, result: dict[str, Any]
) -> None:
    """Write a stage's predictions and metrics."""
    with program.staged(arguments.predictions) as unfinished:
        predictions.to_parquet(unfinished, index=False)
    program.write_json(arguments.metrics, result)
    name, metric = arguments.metrics.stem, result["metric"]
    program.logger.info(
        "%s: %s %.1f %% of %d rows", name, metric, 100 * result[metric], result["n"]
    )


def measure_noise(
    runtime: Runtime, answer_ids: Sequence[Tokens], scores: np.ndarray
) -> dict[str, Any]:
    """Return how far scores move when prompts are computed one at a time instead of together.

    The shape of a batch chooses the order of summation, and for quantized weights the kernel, so a
    difference between two stages below this says nothing.
    """
    rows = take_evenly(range(len(scores)), NOISE_ROWS)
    alone = np.concatenate(
        [
            score_answers(runtime.next_token_logits, [runtime.prompts[row]], answer_ids)
            for row in rows
        ]
    )
    together = scores[rows]
    return {
        "rows": len(rows),
        "largest_difference": float(np.abs(alone - together).max()),
        "flips": int((alone.argmax(axis=1) != together.argmax(axis=1)).sum()),
    }
