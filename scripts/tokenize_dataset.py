"""Render every record as a prompt of the base model and turn it into token ids.

Input   {train,validation,test}.jsonl, the base model's tokenizer and chat template
Output  a folder with {train,validation,test}.arrow (see pockettune.data.prompts.Example),
        answers.json (the allowed answers, their token ids, the tokens that end them), statistics.json
        and chat.json (what a runtime needs to know to ask alike, see describe_serving)
"""

import argparse
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.data.chat import describe_serving, thinking_hint
from pockettune.data.prompts import Example, ExampleMaker, render_prompt, write_examples
from pockettune.data.records import count_records, read_records
from pockettune.data.task_template import find_frame
from pockettune.models.folder import (
    context_length,
    embedding_shape,
    load_tokenizer,
    tensor_shapes,
)
from pockettune.tasks import Task, load_task


def tokenize_dataset(
    settings: Mapping[str, Any], model: Path, dataset: Mapping[str, Path], output: Path
) -> None:
    """Write the tokens of every split to the folder `output`."""
    task = load_task(settings["task"], settings["dataset"])
    max_length = settings["tokenize"]["max_length"]
    if (longest := context_length(model)) and max_length > longest:
        raise UserError(
            f"tokenize.max_length is {max_length:,}, the model's context ends at {longest:,} tokens"
            " (its config.json); lower it"
        )
    tokenizer = load_tokenizer(model)
    maker = ExampleMaker(tokenizer, task, max_length)
    shape = embedding_shape(tensor_shapes(model))
    rows = shape[0] if shape else None
    chat = describe_chat(tokenizer, task)
    statistics = {}
    with program.staged(output) as partial:
        partial.mkdir()
        for split, path in dataset.items():
            records = program.progress(
                read_records(path), description=split, unit="rows", total=count_records(path)
            )
            counts = Statistics(maker.ends)
            examples = refuse_beyond(maker.make(records), rows)
            write_examples(partial / f"{split}.arrow", counts.watch(examples))
            statistics[split] = counts.describe()
            program.logger.info("%s: %s", split, statistics[split])
            if counts.unended:
                program.logger.warning(
                    "%s: %d answers are longer than task.max_answer_tokens and are learned and scored up"
                    " to there, without an end; raise it",
                    split,
                    counts.unended,
                )
        answers = {
            "words": list(maker.answer_ids),
            "ids": list(maker.answer_ids.values()),
            "ends": maker.ends,
        }
        program.write_json(partial / "answers.json", answers)
        program.write_json(partial / "chat.json", chat)
        program.write_json(partial / "statistics.json", statistics)


def refuse_beyond(examples: Iterable[Example], rows: int | None) -> Iterator[Example]:
    """Yield the examples; UserError at a token beyond the embedding, as Gemma 3's for images."""
    for example in examples:
        if rows and max(example.prompt_ids) >= rows:
            raise UserError(
                f"record {example.id} holds token {max(example.prompt_ids)}, the model's embedding has"
                f" {rows} rows: take the control token out of its text, or out of task.prompt"
            )
        yield example


def describe_chat(tokenizer: Any, task: Task) -> dict[str, Any]:
    """Return what chat.json holds; warn of what the answers, or a phone's prompts, may suffer from."""
    frame = task.trial()
    render_prompt(tokenizer, task, frame)  # says what is wrong with the template
    messages, options = task.prompt(frame), task.template_options
    told = describe_serving(tokenizer, messages, options)
    program.logger.info("an answer ends with %s", told["end"])
    if hint := thinking_hint(tokenizer, messages, options):
        program.logger.warning("%s", hint)
    try:
        find_frame(tokenizer, task)
    except (
        UserError
    ) as error:  # card.template may be base: not known here, where training depends on it
        program.logger.warning("%s", error)
    if told["reads_clock"]:
        program.logger.warning(
            "the model's chat template writes the day, which no option sets: trained and scored as of"
            " %s; a phone writes its own, unless it is given the prompt as the card shows it",
            told["day"],
        )
    return told


class Statistics:
    """Counts examples as they pass: their lengths in tokens, and how many texts were changed."""

    def __init__(self, ends: Collection[int]) -> None:
        self.ends = ends
        self.lengths: Counter[int] = Counter()
        self.answer_tokens = self.cut = self.defused = self.unended = 0

    def watch(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Yield the examples, counting them."""
        for example in examples:
            self.lengths[len(example.prompt_ids)] += 1
            self.answer_tokens += len(example.answer_ids)
            self.unended += example.answer_ids[-1] not in self.ends
            self.cut += example.cut
            self.defused += example.defused
            yield example

    def describe(self) -> dict[str, Any]:
        """Return rows, tokens, the distribution of prompt_tokens, and what was changed."""
        lengths = np.array(sorted(self.lengths.elements()))
        return {
            "rows": len(lengths),
            "tokens": int(lengths.sum()) + self.answer_tokens,
            "prompt_tokens": {
                "mean": round(float(lengths.mean()), 1),
                "median": int(np.median(lengths)),
                "p95": int(np.percentile(lengths, 95)),
                "max": int(lengths.max()),
            },
            "texts_cut": self.cut,
            "texts_defused": self.defused,
            "answers_cut": self.unended,
        }


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections task, tokenize, dataset"
    )
    parser.add_argument("--model", type=Path, required=True, help="base model's folder")
    for split in ("train", "validation", "test"):
        parser.add_argument(f"--{split}", type=Path, required=True, help=f"{split}.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")

    def work(arguments: argparse.Namespace) -> None:
        dataset = {name: getattr(arguments, name) for name in ("train", "validation", "test")}
        tokenize_dataset(arguments.settings, arguments.model, dataset, arguments.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
