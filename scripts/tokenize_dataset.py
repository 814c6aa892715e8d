"""Render every record as a prompt of the base model and turn it into token ids.

Input   {train,validation,test}.jsonl, the base model's tokenizer and chat template
Output  a folder with {train,validation,test}.arrow (see pockettune.data.prompts.Example),
        answers.json (the allowed answers and their token ids) and statistics.json
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pockettune.common import program
from pockettune.data.prompts import Example, ExampleMaker, write_examples
from pockettune.data.records import count_records, read_records
from pockettune.models.folder import load_tokenizer
from pockettune.tasks import load_task


def tokenize_dataset(
    settings: Mapping[str, Any], model: Path, dataset: Mapping[str, Path], output: Path
) -> None:
    """Write the tokens of every split to the folder `output`."""
    task = load_task(settings["task"], settings["dataset"])
    maker = ExampleMaker(load_tokenizer(model), task, settings["tokenize"]["max_length"])
    statistics = {}
    with program.staged(output) as partial:
        partial.mkdir()
        for split, path in dataset.items():
            records = program.progress(
                read_records(path), description=split, unit="rows", total=count_records(path)
            )
            counts = Statistics()
            write_examples(partial / f"{split}.arrow", counts.watch(maker.make(records)))
            statistics[split] = counts.describe()
            program.logger.info("%s: %s", split, statistics[split])
        answers = {"words": list(maker.answer_ids), "ids": list(maker.answer_ids.values())}
        program.write_json(partial / "answers.json", answers)
        program.write_json(partial / "statistics.json", statistics)


class Statistics:
    """Counts examples as they pass: their lengths in tokens, and how many texts were changed."""

    def __init__(self) -> None:
        self.lengths: Counter[int] = Counter()
        self.answer_tokens = self.cut = self.defused = 0

    def watch(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Yield the examples, counting them."""
        for example in examples:
            self.lengths[len(example.prompt_ids)] += 1
            self.answer_tokens += len(example.answer_ids)
            self.cut += example.cut
            self.defused += example.defused
            yield example

    def describe(self) -> dict[str, Any]:
        """Return rows, tokens, the distribution of prompt_tokens, texts_cut and texts_defused."""
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
