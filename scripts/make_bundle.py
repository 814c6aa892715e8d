"""Put a GGUF file together with all that a phone or a chat program needs to ask it rightly.

Input   a GGUF file, its predictions, the rows they are of, the folders of its model and its tokens,
        metrics.json, card.md; best.json where the file is the chosen one
Output  a folder: model.gguf, task.json, conformance.jsonl (rows that show whether a program answers as
        was scored), Modelfile, labels.gbnf (of a task of text answer.gbnf, if it has a grammar),
        llama-server.ini, README.md, card.md, LICENSE.txt, SHA256SUMS
"""

import argparse
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from pockettune.common import program
from pockettune.common.checksums import list_checksums
from pockettune.common.errors import UserError
from pockettune.common.pages import render_page
from pockettune.data.prompts import Example, Examples, take_evenly
from pockettune.data.records import read_records, write_records
from pockettune.data.serving import (
    context_tokens,
    describe_labels,
    describe_task,
    describe_text,
    write_grammar,
    write_modelfile,
    write_preset,
)
from pockettune.data.task_template import Frame, asked_texts, find_frame, holds_conversation
from pockettune.data.turns import Turns, find_turns
from pockettune.evaluation.certainty import watch_answers
from pockettune.evaluation.conformance import NEAR, ROWS, messages_of, unfold
from pockettune.evaluation.scoring import decisive_prefixes
from pockettune.evaluation.text_stages import group_records
from pockettune.models.folder import load_tokenizer
from pockettune.runtimes.greedy import as_text
from pockettune.runtimes.llama import LlamaModel
from pockettune.tasks import Record, Task, TextTask, as_text_task, load_task

MODEL = "model.gguf"
EXAMPLE = ("message", "messages", "prompt", "answer")  # of the first row, in task.json
LICENCE = """The model is made of a base model under this licence: {}
Its text: https://spdx.org/licenses/, and beside the base model that card.md names.
"""
SPARE = 4  # tokens beyond the longest answer, should it be written in others
# Of the rows, texts that were asked about in windows, and windows of each at most: a server has to answer them all.
LONG_TEXTS, MOST_WINDOWS = 3, 6


def make_bundle(a: argparse.Namespace) -> None:
    """Write the folder `a.output`."""
    settings = a.settings
    task = load_task(settings["task"], settings["dataset"])
    tokenizer = load_tokenizer(a.model)
    conversation = holds_conversation(task)
    asked: Frame | Turns = (
        find_turns(tokenizer, task.template_options)
        if conversation
        else find_frame(tokenizer, task)
    )
    answers = program.read_json(a.tokens / "answers.json")
    stop = program.read_json(a.tokens / "chat.json")["end"]
    text = as_text_task(task)
    max_tokens = text.max_answer_tokens + 1 if text else max(map(len, answers["ids"])) + SPARE
    context = context_tokens(settings["tokenize"]["max_length"])
    name = settings["bundle"]["file"]
    if name == "best":
        name = program.read_json(a.choice)["chosen"]
    with program.staged(a.output, needed=a.gguf.stat().st_size) as folder:
        folder.mkdir()
        shutil.copyfile(a.gguf, folder / MODEL)
        with LlamaModel(a.gguf, a.threads) as llama:
            bos = str(tokenizer.bos_token) if llama.adds_bos() else ""
            rows = list(conformance_rows(a, name, llama, task, asked))
        single = unfold(rows)
        what = (
            describe_text(settings["task"], task, text)
            if text
            else describe_labels(settings["task"]["labels"])
        )
        told = {
            **describe_task(settings, what, asked, bos, stop, max_tokens),
            **({} if text else describe_trust(program.read_json(a.metrics)["stages"][name])),
            "near": NEAR,
            "example": {key: single[0][key] for key in EXAMPLE if key in single[0]},
            "model": MODEL,
            "file": name,
        }
        program.write_json(folder / "task.json", told)
        write_records(folder / "conformance.jsonl", rows)
        system = told["system"] if conversation else ""
        grammars = {"labels.gbnf": write_grammar(answers["words"])}
        if text:
            grammars = {"answer.gbnf": grammar} if (grammar := text.grammar()) else {}
        texts = {
            "Modelfile": write_modelfile(
                MODEL, sent(asked, told), bos, stop, max_tokens, context, system
            ),
            **grammars,
            "llama-server.ini": write_preset(MODEL, max_tokens, context),
            "README.md": write_page(a.page, told, single, a.output),
            "card.md": a.card.read_text(encoding="utf-8"),
            "LICENSE.txt": LICENCE.format(settings["card"]["license"]),
        }
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        (folder / "SHA256SUMS").write_text(list_checksums(folder), encoding="utf-8")
    program.logger.info("%s: %s and %d rows to try a server with", a.output, a.gguf.name, len(rows))


def conformance_rows(
    a: argparse.Namespace, name: str, llama: LlamaModel, task: Task, asked: Frame | Turns
) -> Iterator[dict[str, Any]]:
    """Yield rows that were scored: what a program sends, the prompt, its ids, what was answered.

    Ids are the file's own. Rows whose text was cut to tokenize.max_length are left out: no chat template
    cuts.
    """
    table = pd.read_parquet(next(path for path in a.predictions if path.stem == name))
    scored: dict[str, Any] = {row["id"]: row for row in table.to_dict("records")}
    records = {record["id"]: record for record in read_records(a.records)}
    examples = Examples(a.tokens / f"{a.settings['evaluate']['split']}.arrow")
    if text := as_text_task(task):
        return text_rows(a, llama, text, asked, examples, scored, records)
    return label_rows(a, llama, task, examples, scored, records)


def label_rows(
    a: argparse.Namespace,
    llama: LlamaModel,
    task: Task,
    examples: Sequence[Example],
    scored: Mapping[str, Mapping[str, Any]],
    records: Mapping[str, Record],
) -> Iterator[dict[str, Any]]:
    """Yield rows with each label's score."""
    answers = program.read_json(a.tokens / "answers.json")
    prefixes = decisive_prefixes(answers["ids"])
    whole = [e for e in examples if e.id in scored and not e.cut]
    refuse_none(whole)
    for example in take_evenly(whole, ROWS):
        row = scored[example.id]
        yield {
            "id": example.id,
            "message": message(a.settings, task, records[example.id]),
            "prompt": example.prompt,
            "prompt_ids": llama.tokenize(example.prompt),
            "labels": {
                word: {"ids": list(ids), "log_probability": float(row[f"log_probability_{word}"])}
                for word, ids in zip(answers["words"], prefixes, strict=True)
            },
            "answer": row["prediction"],
        }


def text_rows(
    a: argparse.Namespace,
    llama: LlamaModel,
    task: TextTask,
    asked: Frame | Turns,
    examples: Sequence[Example],
    scored: Mapping[str, Mapping[str, Any]],
    records: Mapping[str, Record],
) -> Iterator[dict[str, Any]]:
    """Yield rows with the text that was generated and how sure each of its tokens is.

    Of a conversation the last answer. Of a text that was asked about in windows the texts, a row for each
    window, and the answer that was taken of theirs; they come last.
    """
    for group, told in written_rows(a, llama, task, examples, scored):
        record = records[group[0].record]
        if len(group) > 1:
            assert isinstance(asked, Frame)
            yield {
                "id": record["id"],
                "texts": {name: record[name] for name in asked_texts(task)},
                "windows": [
                    {"id": example.id, "message": asked.message(example.prompt), **row}
                    for example, row in zip(group, told, strict=True)
                ],
                "answer": json.loads(scored[record["id"]]["prediction"]),
            }
        elif isinstance(asked, Turns):
            yield {"id": record["id"], "messages": task.prompt(record), **told[0]}
        else:
            yield {"id": record["id"], "message": message(a.settings, task, record), **told[0]}


def written_rows(
    a: argparse.Namespace,
    llama: LlamaModel,
    task: TextTask,
    examples: Sequence[Example],
    scored: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[list[Example], list[dict[str, Any]]]]:
    """Yield the examples of a record, and of each its prompt and its answer."""
    chosen = choose_groups(a, task, examples, scored)
    single = [example for group in chosen for example in group]
    prompts = [llama.tokenize(example.prompt) for example in single]
    said = [
        ids
        for group in chosen
        for ids in json.loads(scored[group[0].record]["answer_ids"])[-len(group) :]
    ]
    sure = watch_answers(llama, prompts, said, task.max_answer_tokens)
    rows = (
        {
            "prompt": example.prompt,
            "prompt_ids": prompt,
            "answer": as_text(llama, ids),
            "answer_ids": ids,
            **certainty,
        }
        for example, prompt, ids, certainty in zip(single, prompts, said, sure, strict=True)
    )
    for group in chosen:
        yield group, [next(rows) for _ in group]


def choose_groups(
    a: argparse.Namespace,
    task: TextTask,
    examples: Sequence[Example],
    scored: Mapping[str, Mapping[str, Any]],
) -> list[list[Example]]:
    """Return the records that become rows: one example of each, or of some texts all windows."""
    breaks = a.settings["card"]["template"] == "task"  # the file's template breaks control tokens
    groups = [
        group
        for group in group_records(examples)
        if (row := scored.get(group[0].record)) and isinstance(row["answer_ids"], str)
        if not group[-1].cut and (breaks or not any(example.defused for example in group))
    ]
    if holds_conversation(task):
        groups = [group[-1:] for group in groups]
    # Other programs can make windows where task.json tells the stride, and send them where it tells the prompt.
    told = a.settings["task"].get("stride") is not None and not breaks
    windowed = [group for group in groups if 1 < len(group) <= MOST_WINDOWS] if told else []
    long = take_evenly(windowed, LONG_TEXTS)
    short = [group for group in groups if len(group) == 1]
    chosen = [*take_evenly(short, ROWS - sum(map(len, long))), *long]
    refuse_none(chosen)
    return chosen


def refuse_none(whole: Sequence[Any]) -> None:
    if not whole:
        raise UserError(
            "bundle: every evaluated text is longer than tokenize.max_length, or none was answered, so that no"
            " row can show how a program answers; raise tokenize.max_length, evaluate.limit or"
            " evaluate.greedy_rows"
        )


def message(settings: Mapping[str, Any], task: Task, record: dict[str, Any]) -> str:
    """Return what a chat program sends as the user's message."""
    if settings["card"]["template"] == "task":
        return record[task.text_field]
    return task.prompt(record)[-1]["content"]


def write_page(
    template: Path, task: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], output: Path
) -> str:
    """Return the bundle's README, the first row as its example."""
    body = {
        "messages": messages_of(task, rows[0]),
        "temperature": 0,
        "max_tokens": task["max_tokens"],
    }
    request = json.dumps(body, ensure_ascii=False, indent=2)
    content = {
        "task": {
            **dict.fromkeys(("turns", "grammar", "stride", "no_answer")),
            "labels": [],
            "texts": [],
            **task,
        },
        "rows": len(rows),
        "request": request,
        "folder": shlex.quote(str(output)),
    }
    return render_page(template, content, {})


def sent(asked: Frame | Turns, task: Mapping[str, Any]) -> Frame | Turns:
    """Return the frame of what a program sends: the text, or the whole prompt where the file adds none."""
    if isinstance(asked, Turns) or task["template"] == "task":
        return asked
    return replace(asked, parts=("", ""))


def describe_trust(stage: Mapping[str, Any]) -> dict[str, Any]:
    """Return by what a program divides log probabilities, and what refusing unsure answers would leave.

    "threshold" is null: which answers are too unsure is for the program's maker to say.
    """
    fitted = stage.get("at_temperature") or {"temperature": None, "coverage": []}
    return {
        "temperature": fitted["temperature"],
        "threshold": None,
        "coverage": fitted["coverage"],
    }


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True,
        help="sections task, dataset, tokenize, card, bundle; evaluate.split",
    )  # fmt: skip
    parser.add_argument("--model", type=Path, required=True, help="folder the file was made of")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--records", type=Path, required=True, help="rows that were evaluated")
    parser.add_argument("--gguf", type=Path, required=True, help="file to bundle")
    parser.add_argument("--choice", type=Path, nargs="?", help="best.json, for best.gguf")
    parser.add_argument(
        "--predictions",
        type=Path,
        nargs="+",
        required=True,
        help="<file>.parquet of each candidate",
    )
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--card", type=Path, required=True, help="card.md")
    parser.add_argument("--page", type=Path, required=True, help="template of the bundle's README")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    program.run(parser, make_bundle)


if __name__ == "__main__":
    main()
