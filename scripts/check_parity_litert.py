"""Prove that the float LiteRT export is the merged model in PyTorch, before it is quantized.

The file itself is compared, what LiteRT computes, and what LiteRT-LM makes of a bundle of it: token ids,
chat template, stop tokens, answers. One that fails stops the workflow, with its cause and the remedy.

Input   the model folder that was exported, its tokens/; litert_float.tflite; test.jsonl, its texts
Output  parity_litert.json: {"passed", "checks": [{"name", "passed", "detail", its numbers}]}
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.common.native import output_in_log
from pockettune.data.prompts import Example, Examples, take_evenly
from pockettune.data.records import read_records
from pockettune.litert.bundles import make_serving, open_bundle, write_bundle
from pockettune.models.folder import load_tokenizer
from pockettune.parity import computed, litert
from pockettune.runtimes.exact import load_exact
from pockettune.runtimes.litert import LitertModel
from pockettune.tasks import load_task

PROMPTS_TOKENIZED = 1_000  # all of them where there are no more
PROMPTS_RENDERED = 200
PROMPTS_COMPUTED = 32
PROMPTS_ANSWERED = 8
ROOM_TO_STOP = 8  # tokens beyond the longest answer


def check_parity(a: argparse.Namespace) -> None:
    """Run every check; write `a.output` where all pass, else name all that failed in one error."""
    torch.set_num_threads(a.threads)
    examples = take_evenly(Examples(a.tokens / "test.arrow"), PROMPTS_TOKENIZED)
    answers = program.read_json(a.tokens / "answers.json")
    results = [
        litert.check_tensors(a.export, a.model),
        *check_computed(a, examples, answers["ids"]),
        *check_bundle(a, examples, answers),
    ]
    for result in results:
        mark = "passed" if result["passed"] else "FAILED"
        program.logger.info("%s  %s: %s", mark, result["name"], result["detail"])
    if failed := [result for result in results if not result["passed"]]:
        told = " | ".join(f"{result['name']}: {result['detail']}" for result in failed)
        raise UserError(
            f"{a.export} is not the merged model {a.model}: {len(failed)} of {len(results)} checks"
            f" failed: {told}"
        )
    program.write_json(a.output, {"passed": True, "checks": results})


def check_computed(
    a: argparse.Namespace, examples: Sequence[Example], answers: list[list[int]]
) -> list[litert.Result]:
    """Compare logits, one model at a time."""
    prompts = [example.prompt_ids for example in take_evenly(examples, PROMPTS_COMPUTED)]
    with output_in_log("LiteRT"):
        found = np.stack(list(LitertModel(a.export, a.threads).next_token_logits(prompts)))
    expected = computed.logits_of_torch(load_exact(a.model), prompts)
    return [litert.check_logits(found, expected, sorted({ids[0] for ids in answers}))]


def check_bundle(
    a: argparse.Namespace, examples: Sequence[Example], answers: Mapping[str, Any]
) -> list[litert.Result]:
    """Write a bundle of the export, open it in LiteRT-LM, and ask it as an app does."""
    tokenizer, ends = load_tokenizer(a.model), set(answers["ends"])
    whole = [example for example in examples if not example.cut]
    asked = messages_of(a, take_evenly(whole, PROMPTS_RENDERED))
    few = asked[:: max(len(asked) // PROMPTS_ANSWERED, 1)][:PROMPTS_ANSWERED]
    limit = max(map(len, answers["ids"])) + ROOM_TO_STOP
    by_prompt = {example.prompt: example.prompt_ids for example in whole}
    # Beside the export, where there is room for another of its size.
    with (
        tempfile.TemporaryDirectory(
            dir=a.output.parent, prefix=f".{a.output.name}.", suffix=".partial"
        ) as work,
        output_in_log("LiteRT-LM"),
    ):
        path = Path(work, "float.litertlm")
        serving = make_serving(a.settings, a.model, sorted(ends))
        write_bundle(a.export, a.model / "tokenizer.json", serving, path)
        with open_bundle(path, a.threads) as bundle:
            results = [
                litert.check_token_ids(bundle, tokenizer, examples),
                litert.check_template(bundle, asked),
                litert.check_stops(bundle, ends),
            ]
            said = [bundle.answer(talk, limit) for talk, _ in few]
    exact = load_exact(a.model)
    generated = computed.generate_greedy(exact, [by_prompt[p] for _, p in few], limit, ends)
    expected = [str(tokenizer.decode(ids[:-1])) if ids[-1] in ends else None for ids in generated]
    return [*results, litert.check_answers(said, expected)]


def messages_of(
    a: argparse.Namespace, examples: Sequence[Example]
) -> list[tuple[list[dict[str, str]], str]]:
    """Return of each example what an app sends, and the prompt that it must become."""
    task = load_task(a.settings["task"], a.settings["dataset"])
    records = {record["id"]: record for record in read_records(a.records)}
    if a.settings["card"]["template"] == "base":
        return [(task.prompt(records[e.id]), e.prompt) for e in examples]
    return [
        ([{"role": "user", "content": records[e.id][task.text_field]}], e.prompt) for e in examples
    ]


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections task, dataset, tokenize, card"
    )
    parser.add_argument("--model", type=Path, required=True, help="folder that was exported")
    parser.add_argument("--export", type=Path, required=True, help="float .tflite file")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--records", type=Path, required=True, help="test.jsonl")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    program.run(parser, check_parity)


if __name__ == "__main__":
    main()
