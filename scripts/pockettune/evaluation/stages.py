"""The frame of every evaluation: read the examples, have them scored, write metrics and predictions."""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pockettune.common import program
from pockettune.data.prompts import Example, Examples, take_evenly
from pockettune.evaluation import metrics
from pockettune.evaluation.scoring import NextTokenLogits, Tokens, score_answers
from pockettune.evaluation.statistics import kl_divergence, normalise
from pockettune.tasks import load_task

NOISE_ROWS = 16


@dataclass
class Runtime:
    """A loaded model that can be scored."""

    next_token_logits: NextTokenLogits
    prompts: Sequence[Tokens]  # the examples' prompts, in this runtime's own token ids
    vocabulary_size: int
    facts: dict[str, Any] = field(default_factory=dict)  # worth telling beside the metrics


# Takes the arguments and the examples.
OpenRuntime = Callable[[argparse.Namespace, Sequence[Example]], AbstractContextManager[Runtime]]


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


def run(docstring: str | None, open_runtime: OpenRuntime, options: Iterable[str] = ()) -> None:
    """Run a program that evaluates one stage's model; `options` are further paths it takes."""
    parser = argument_parser(docstring)
    parser.add_argument("--model", type=Path, required=True, help="what to evaluate")
    parser.add_argument("--threads", type=int, required=True)
    # nargs="?": a rule that has no such file names the option alone.
    parser.add_argument(
        "--reference", type=Path, nargs="?", help="F16's answers over the whole vocabulary"
    )
    parser.add_argument("--write-reference", type=Path, nargs="?", help="write such a file")
    for option in options:
        parser.add_argument(option, type=Path, nargs="?")
    program.run(parser, lambda arguments: evaluate(arguments, open_runtime))


def evaluate(arguments: argparse.Namespace, open_runtime: OpenRuntime) -> None:
    """Score the rows that `evaluate:` names and write the stage's files."""
    answers = program.read_json(arguments.tokens / "answers.json")
    rows = read_rows(arguments)
    places = take_evenly(range(len(rows)), arguments.settings["evaluate"].get("pytorch_limit"))
    examples = [rows[place] for place in places]
    started = time.perf_counter()
    with open_runtime(arguments, examples) as runtime:
        with open_observer(arguments, places, runtime.vocabulary_size) as observer:
            scores = score_answers(
                observer.watch(runtime.next_token_logits),
                runtime.prompts,
                answers["ids"],
                arguments.metrics.stem,
            )
        seconds = time.perf_counter() - started
        noise = measure_noise(runtime, answers["ids"], scores)
    facts = {
        "seconds": round(seconds, 2),
        **observer.describe(),
        "noise": noise,
        **runtime.facts,
    }
    write_stage(arguments, examples, answers["words"], scores, facts)


def read_rows(arguments: argparse.Namespace) -> list[Example]:
    """Return the rows that `evaluate:` names."""
    settings = arguments.settings["evaluate"]
    return take_evenly(Examples(arguments.tokens / f"{settings['split']}.arrow"), settings["limit"])


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
        **metrics.score_predictions(task, predictions),
        "split": settings["evaluate"]["split"],
        **facts,
    }
    with program.staged(arguments.predictions) as partial:
        predictions.to_parquet(partial, index=False)
    program.write_json(arguments.metrics, result)
    program.logger.info(
        "%s: accuracy %.1f %% of %d rows",
        arguments.metrics.stem,
        100 * result["accuracy"],
        result["n"],
    )


class Observer:
    """Sees the logits at the answer position pass, and does nothing with them."""

    def watch(self, next_token_logits: NextTokenLogits) -> NextTokenLogits:
        """Return `next_token_logits`, its first pass over all prompts observed."""
        passes = 0

        def watched(prompts: Sequence[Tokens]) -> Iterator[np.ndarray]:
            nonlocal passes
            passes += 1
            first = passes == 1
            for row, logits in enumerate(next_token_logits(prompts)):
                if first:
                    self.see(row, logits)
                yield logits

        return watched

    def see(self, row: int, logits: np.ndarray) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {}


class Recorder(Observer):
    """Writes log probabilities over the whole vocabulary, 16-bit: (rows, vocabulary)."""

    def __init__(self, target: np.ndarray) -> None:
        self.target = target

    def see(self, row: int, logits: np.ndarray) -> None:
        self.target[row] = normalise(logits)


class Divergence(Observer):
    """Compares with what F16 answered: KL(F16 || this stage) over the whole vocabulary, in nats.

    `places` are those of the scored rows among F16's.
    """

    def __init__(self, reference: np.ndarray, places: Sequence[int]) -> None:
        self.reference, self.places = reference, places
        self.values = np.zeros(len(places))

    def see(self, row: int, logits: np.ndarray) -> None:
        # Renormalised: the reference was rounded to 16 bits when it was kept.
        expected = normalise(self.reference[self.places[row]])
        self.values[row] = kl_divergence(expected, normalise(logits))

    def describe(self) -> dict[str, Any]:
        return {"kl_vocabulary": describe_divergence(self.values)}


def describe_divergence(values: np.ndarray) -> dict[str, float]:
    """Return the mean and the 99.9th percentile of (rows,)."""
    return {"mean": float(values.mean()), "p999": float(np.quantile(values, 0.999))}


def open_observer(
    arguments: argparse.Namespace, places: Sequence[int], vocabulary: int
) -> AbstractContextManager[Observer]:
    """Return what the arguments ask to be done with the logits at the answer position."""
    if arguments.write_reference:
        return record(arguments.write_reference, (len(places), vocabulary))
    if arguments.reference:
        return nullcontext(Divergence(np.load(arguments.reference, mmap_mode="r"), places))
    return nullcontext(Observer())


@contextmanager
def record(path: Path, shape: tuple[int, int]) -> Iterator[Recorder]:
    """Write a reference file while the block runs, complete or not at all."""
    with program.staged(path) as partial:
        target = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        yield Recorder(target)
        target.flush()


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
