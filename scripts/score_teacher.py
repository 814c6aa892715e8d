"""Ask a larger or better model how likely it finds each label, for a student to learn from.

The teacher reads the student's own token ids, so it must have the same vocabulary; it is scored as
every stage is (pockettune.evaluation.scoring). Texts without a label are taken where they stand in no
split: what is told of test must not come from having seen its texts.

Input   the base model, whose tokenizer the student has; the teacher, a model folder or a GGUF file; the
        folder tokens/; the splits as jsonl; texts without a label (txt, csv, tsv, jsonl or parquet)
Output  a folder with train.parquet and unlabelled.parquet (id and each label's log probability),
        unlabelled.arrow (those texts' tokens, as in tokens/) and teacher.json (what was asked, and how
        often its likeliest label is train's)
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pockettune.common import program
from pockettune.common.checksums import sha256
from pockettune.common.errors import UserError
from pockettune.data.partition import normalise_text
from pockettune.data.prompts import Example, ExampleMaker, Examples, write_examples
from pockettune.data.records import read_records
from pockettune.data.texts import read_texts
from pockettune.evaluation.scoring import NextTokenLogits, score_answers
from pockettune.gguf.files import read_gguf
from pockettune.gguf.vocabulary import describe_difference, read_vocabulary
from pockettune.models.folder import (
    check_model_folder,
    load_tokenizer,
    published_name,
    weight_files,
)
from pockettune.runtimes.memory import memory_hint
from pockettune.tasks import load_task
from pockettune.training.teacher import TRAIN, UNLABELLED, UNLABELLED_EXAMPLES, label_tokens

LESS_MEMORY = (
    "take a smaller teacher, or a GGUF file of it, or run it where nothing else takes the memory"
)


@dataclass(frozen=True)
class Inputs:
    """The files that are read."""

    base: Path
    teacher: Path
    tokens: Path
    splits: Sequence[Path]
    texts: Path | None


def score_teacher(settings: Mapping[str, Any], inputs: Inputs, threads: int, output: Path) -> None:
    """Score train's rows and the texts without a label, and write the folder `output`."""
    answers = program.read_json(inputs.tokens / "answers.json")
    label_tokens(answers["words"], answers["ids"])
    check_teacher(inputs, answers)
    unlabelled, left_out = make_unlabelled(settings, inputs)
    train = Examples(inputs.tokens / "train.arrow")
    with program.staged(output) as folder:
        folder.mkdir()
        with open_teacher(inputs.teacher, threads) as next_token_logits:
            scores = score(next_token_logits, train, answers, folder / TRAIN)
            if inputs.texts:
                write_examples(folder / UNLABELLED_EXAMPLES, unlabelled)
                score(next_token_logits, unlabelled, answers, folder / UNLABELLED)
        agreement = measure_agreement(scores, train, answers["words"])
        summary = {
            "teacher": str(inputs.teacher),
            "sha256": {path.name: sha256(path) for path in teacher_weights(inputs.teacher)},
            "train_rows": len(train),
            "train_agreement": agreement,
            "unlabelled_texts": len(unlabelled),
            "left_out": left_out,
        }
        program.write_json(folder / "teacher.json", summary)


def score(
    next_token_logits: NextTokenLogits,
    examples: Sequence[Example],
    answers: Mapping[str, Any],
    path: Path,
) -> np.ndarray:
    """Write each example's id and log probabilities; return those (examples, answers)."""
    prompts = [example.prompt_ids for example in examples]
    scores = score_answers(next_token_logits, prompts, answers["ids"], path.stem)
    table = pd.DataFrame(scores, columns=[f"log_probability_{word}" for word in answers["words"]])
    table.insert(0, "id", [example.id for example in examples])
    table.to_parquet(path, index=False)
    return scores


def measure_agreement(scores: np.ndarray, train: Examples, words: Sequence[str]) -> float:
    """Return how often the likeliest label is the right one; warn where that is no better than one answer."""
    right = [words.index(example.reference) for example in train]
    agreement = float((scores.argmax(axis=1) == right).mean())
    program.logger.info("the teacher answers %.1f %% of train as labelled", 100 * agreement)
    commonest = max(train.count_references().values()) / len(train)
    if agreement <= commonest:
        program.logger.warning(
            "the teacher is right in %.1f %% of train, always the commonest label in %.1f %%: see that it"
            " was trained on this task, with this prompt and these labels",
            100 * agreement, 100 * commonest,
        )  # fmt: skip
    return agreement


def make_unlabelled(settings: Mapping[str, Any], inputs: Inputs) -> tuple[list[Example], int]:
    """Return an example for each text that stands in no split, the first of equal ones.

    And how many were left out. UserError where none remains.
    """
    if inputs.texts is None:
        return [], 0
    task = load_task(settings["task"], settings["dataset"])
    known = {
        normalise_text(record[task.text_field])
        for path in inputs.splits
        for record in read_records(path)
    }
    texts = read_texts(inputs.texts, settings["dataset"]["text_column"])
    records = []
    for number, text in enumerate(texts, start=1):
        key = normalise_text(text)
        if key not in known:
            known.add(key)
            records.append({"id": f"unlabelled-{number}", task.text_field: text})
    left_out = len(texts) - len(records)
    if not records:
        raise UserError(f"{inputs.texts}: each of its {left_out} texts stands in the dataset; take others")  # fmt: skip
    program.logger.info(
        "%d texts without a label; %d left out, which stand in the dataset or above them",
        len(records), left_out,
    )  # fmt: skip
    maker = ExampleMaker(load_tokenizer(inputs.base), task, settings["tokenize"]["max_length"])
    return list(maker.make(records, labelled=False)), left_out


def check_teacher(inputs: Inputs, answers: Mapping[str, Any]) -> None:
    """Raise UserError where the teacher has other tokens than the base, or was taught other labels."""
    teacher, taught = inputs.teacher, None
    run = teacher.parent / "tokens/answers.json"  # of the run that made it
    if run.is_file():
        taught = program.read_json(run)["words"]
    if teacher.is_file():
        taught = read_gguf(teacher, "take another file")[0].get("pockettune.task.labels", taught)
    else:
        check_model_folder(teacher)
    if difference := describe_difference(inputs.base, read_vocabulary(teacher)):
        raise UserError(
            f"train.teacher {teacher} has another tokenizer than {published_name(inputs.base)}:"
            f" {difference}; take one of the same family of models, with its whole vocabulary"
        )
    if taught is not None and set(taught) != set(answers["words"]):
        raise UserError(
            f"train.teacher {teacher} was taught the labels {', '.join(taught)}, task.labels has"
            f" {', '.join(answers['words'])}: take a teacher of the same labels"
        )


def teacher_weights(teacher: Path) -> list[Path]:
    """Return the files that hold a teacher's weights."""
    return [teacher] if teacher.is_file() else weight_files(teacher)


@contextmanager
def open_teacher(teacher: Path, threads: int) -> Iterator[NextTokenLogits]:
    """Load the teacher in the runtime that its kind needs; a folder on a GPU where there is one."""
    if teacher.is_file():
        from pockettune.runtimes.llama import (
            LlamaModel,
        )  # here: each runtime takes a second to load

        with LlamaModel(teacher, threads) as file:
            yield file.next_token_logits
        return
    import torch

    from pockettune.runtimes.exact import load_exact
    from pockettune.runtimes.packing import next_token_logits

    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with memory_hint(LESS_MEMORY):
        yield partial(next_token_logits, load_exact(teacher, device=device))


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections task, tokenize, dataset"
    )
    parser.add_argument("--base", type=Path, required=True, help="base model's folder")
    parser.add_argument(
        "--teacher", type=Path, required=True, help="teacher's folder or .gguf file"
    )
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--splits", type=Path, nargs="+", required=True, help="jsonl of each split")
    # nargs="?": the rule names the option alone where there is no such file.
    parser.add_argument("--texts", type=Path, nargs="?", help="texts without a label")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to make")

    def work(a: argparse.Namespace) -> None:
        inputs = Inputs(a.base, a.teacher, a.tokens, a.splits, a.texts)
        score_teacher(a.settings, inputs, a.threads, a.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
