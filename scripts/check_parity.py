"""Prove that the F16 GGUF file in llama.cpp is the merged model in PyTorch, before quantizing it.

Checked are token ids, vocabulary, special tokens, chat template, stored tensors, logits, the merge
itself, and that answers stop. One that fails stops the workflow, with its cause and the remedy.

Input   base model, adapter, merged model (or what trim_vocabulary.py made of it, with its vocabulary.json),
        f16.gguf; the folder tokens/ of the latter; test.jsonl, its texts
Output  parity.json: {"passed", "checks": [{"name", "passed", "detail", its numbers}]}
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pockettune.common import program
from pockettune.data.prompts import Example, Examples, take_evenly
from pockettune.data.records import read_records
from pockettune.models.folder import load_tokenizer, read_kept
from pockettune.parity import computed, reference, stored
from pockettune.parity.results import (
    PROMPTS_ANSWERED,
    PROMPTS_COMPUTED,
    PROMPTS_TOKENIZED,
    ROOM_TO_STOP,
    Result,
    require_passed,
)
from pockettune.runtimes.exact import load_exact
from pockettune.runtimes.llama import LlamaModel
from pockettune.tasks import Task, load_task

TOKENS_ANSWERED = 40  # at most: each is computed anew with all before it


@dataclass(frozen=True)
class Asked:
    """What a file whose chat template is the task's must ask: of each example, its text by id."""

    task: Task
    texts: Mapping[str, str]


def check_parity(
    settings: Mapping[str, Any],
    base: Path,
    adapter: Path,
    model: Path,
    gguf: Path,
    tokens: Path,
    records: Path,
    threads: int,
    output: Path,
    vocabulary: Path | None = None,
) -> None:
    """Run every check; write `output` where all pass, else name all that failed in one error."""
    torch.set_num_threads(threads)
    examples = take_evenly(Examples(tokens / "test.arrow"), PROMPTS_TOKENIZED)
    asked = None
    if settings["card"]["template"] == "task":
        task = load_task(settings["task"], settings["dataset"])
        asked = Asked(task, {r["id"]: r[task.text_field] for r in read_records(records)})
    results = run_checks(
        base, adapter, model, gguf, examples, tokens, threads, read_kept(vocabulary), asked
    )
    program.write_json(output, {"passed": True, "checks": results})


def run_checks(
    base: Path,
    adapter: Path,
    model: Path,
    gguf: Path,
    examples: Sequence[Example],
    tokens: Path,
    threads: int,
    kept: Sequence[int] | None = None,
    asked: Asked | None = None,
) -> list[Result]:
    """Return the results of every check; all that failed are named in one UserError.

    `kept` are the base's ids of a trimmed vocabulary's tokens, in their order. Without `asked` the file
    must store the chat template of the model's folder.
    """
    # Of a task of text there are as many answers as rows.
    computed_on = take_evenly(examples, PROMPTS_COMPUTED)
    told = program.read_json(tokens / "answers.json")
    answers = told["ids"] or [
        example.answer_ids for example in computed_on if example.answer_ids[-1] in told["ends"]
    ]
    with LlamaModel(gguf, threads) as llama:
        results = [
            *check_file(llama, base, model, gguf, examples, answers, kept, asked),
            *check_computed(llama, base, adapter, model, examples, answers, kept),
        ]
    require_passed(results, gguf, model)
    return results


def check_file(
    llama: LlamaModel,
    base: Path,
    model: Path,
    gguf: Path,
    examples: Sequence[Example],
    answers: list[list[int]],
    kept: Sequence[int] | None,
    asked: Asked | None,
) -> list[Result]:
    """Run the checks for which nothing is computed."""
    tokenizer = load_tokenizer(model)
    template = (
        stored.check_task_template(llama, tokenizer, asked.task, examples, asked.texts)
        if asked
        else stored.check_chat_template(llama, tokenizer)
    )
    return [
        stored.check_token_ids(llama, tokenizer, examples),
        stored.check_vocabulary(llama, base, model, kept),
        stored.check_special_tokens(
            llama, tokenizer, {ids[-1] for ids in answers}, examples[0].prompt_ids
        ),
        template,
        stored.check_tensors(gguf, model),
    ]


def check_computed(
    llama: LlamaModel,
    base: Path,
    adapter: Path,
    model: Path,
    examples: Sequence[Example],
    answers: list[list[int]],
    kept: Sequence[int] | None,
) -> list[Result]:
    """Run the checks that compare what the models compute, one PyTorch model at a time."""
    prompts = [example.prompt_ids for example in take_evenly(examples, PROMPTS_COMPUTED)]
    few = take_evenly(prompts, PROMPTS_ANSWERED)
    first, ends = sorted({ids[0] for ids in answers}), {ids[-1] for ids in answers}
    limit = min(max(map(len, answers)) + ROOM_TO_STOP, TOKENS_ANSWERED)

    found = computed.logits_of_llama(llama, prompts)
    said = [llama.generate_greedy(prompt, limit) for prompt in few]
    stops = [llama.stops_at(continuation[-1]) for continuation in said]

    exact = load_exact(model)
    merged = reference.logits_of_torch(exact, prompts)
    expected = reference.generate_greedy(exact, few, limit, ends)
    del exact  # before the base is loaded beside it
    plain, adapted = computed.logits_of_adapter(base, adapter, prompts, kept)
    return [
        computed.check_logits(found, merged, first),
        computed.check_merge(merged, adapted, plain, first),
        computed.check_stops(said, expected, stops, ends),
    ]


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections task, dataset, card"
    )
    parser.add_argument("--base", type=Path, required=True, help="base model's folder")
    parser.add_argument("--adapter", type=Path, required=True, help="PEFT adapter folder")
    parser.add_argument("--model", type=Path, required=True, help="merged model's folder")
    parser.add_argument("--vocabulary", type=Path, nargs="?", help="of a trimmed model")
    parser.add_argument("--gguf", type=Path, required=True, help="F16 GGUF file")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--records", type=Path, required=True, help="test.jsonl")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")

    def work(a: argparse.Namespace) -> None:
        check_parity(
            a.settings, a.base, a.adapter, a.model, a.gguf, a.tokens, a.records, a.threads, a.output,
            a.vocabulary,
        )  # fmt: skip

    program.run(parser, work)


if __name__ == "__main__":
    main()
