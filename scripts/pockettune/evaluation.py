"""The frame of every evaluation: read the examples, have them scored, write metrics and predictions."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pockettune import metrics, program
from pockettune.prompts import Example, Examples, take_evenly
from pockettune.tasks import load_task

# Takes the model's path, the examples, the answers' token ids, the stage and the threads; returns
# log probabilities (examples, answers), and what else is worth telling of the model.
Scorer = Callable[
    [Path, Sequence[Example], Sequence[Sequence[int]], str, int], tuple[np.ndarray, dict[str, Any]]
]


def run(docstring: str | None, score: Scorer) -> None:
    """Run a program that evaluates one stage with `score`."""
    parser = program.argument_parser(docstring)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections task, dataset, evaluate"
    )
    parser.add_argument("--stage", required=True, help="name of the stage in the metrics")
    parser.add_argument("--model", type=Path, required=True, help="what to evaluate")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--metrics", type=Path, required=True, help="JSON to write")
    parser.add_argument("--predictions", type=Path, required=True, help="parquet to write")
    program.run(parser, lambda arguments: evaluate(arguments, score))


def evaluate(arguments: argparse.Namespace, score: Scorer) -> None:
    """Score the rows that `evaluate:` names and write the stage's two files."""
    settings = arguments.settings
    task = load_task(settings["task"], settings["dataset"])
    answers = program.read_json(arguments.tokens / "answers.json")
    split = settings["evaluate"]["split"]
    examples = take_evenly(
        Examples(arguments.tokens / f"{split}.arrow"), settings["evaluate"]["limit"]
    )
    started = time.perf_counter()
    scores, facts = score(
        arguments.model, examples, answers["ids"], arguments.stage, arguments.threads
    )
    predictions = metrics.predict(examples, answers["words"], scores)
    result = {
        "stage": arguments.stage,
        **metrics.score_predictions(task, predictions),
        "split": split,
        "seconds": round(time.perf_counter() - started, 2),
        **facts,
    }
    with program.staged(arguments.predictions) as partial:
        predictions.to_parquet(partial, index=False)
    program.write_json(arguments.metrics, result)
    program.logger.info(
        "%s: accuracy %.1f %% of %d rows", arguments.stage, 100 * result["accuracy"], result["n"]
    )
