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
from pockettune.common.native import output_in_log
from pockettune.data.prompts import Example, Examples, take_evenly
from pockettune.data.records import read_records
from pockettune.litert.bundles import make_serving, open_bundle, write_bundle
from pockettune.models.folder import load_tokenizer
from pockettune.parity import exported
from pockettune.parity.litert import check_tensors
from pockettune.parity.reference import generate_greedy, logits_of_torch
from pockettune.parity.results import (
    PROMPTS_ANSWERED,
    PROMPTS_COMPUTED,
    PROMPTS_RENDERED,
    PROMPTS_TOKENIZED,
    ROOM_TO_STOP,
    Result,
    require_passed,
)
from pockettune.runtimes.exact import load_exact
from pockettune.runtimes.litert import LitertModel
from pockettune.tasks import load_task


def check_parity_litert(a: argparse.Namespace) -> None:
    """Run every check; write `a.output` where all pass, else name all that failed in one error."""
    torch.set_num_threads(a.threads)
    examples = take_evenly(Examples(a.tokens / "test.arrow"), PROMPTS_TOKENIZED)
    answers = program.read_json(a.tokens / "answers.json")
    results = [
        check_tensors(a.export, a.model),
        check_computed(a, examples, answers["ids"]),
        *check_bundle(a, examples, answers),
    ]
    require_passed(results, a.export, a.model)
    program.write_json(a.output, {"passed": True, "checks": results})


def check_computed(
    a: argparse.Namespace, examples: Sequence[Example], answers: list[list[int]]
) -> Result:
    """Compare logits, one model at a time."""
    prompts = [example.prompt_ids for example in take_evenly(examples, PROMPTS_COMPUTED)]
    with output_in_log("LiteRT"):
        found = np.stack(list(LitertModel(a.export, a.threads).next_token_logits(prompts)))
    merged = logits_of_torch(load_exact(a.model), prompts)
    return exported.check_logits(found, merged, sorted({ids[0] for ids in answers}))


def check_bundle(
    a: argparse.Namespace, examples: Sequence[Example], answers: Mapping[str, Any]
) -> list[Result]:
    """Write a bundle of the export, open it in LiteRT-LM, and ask it as an app does."""
    tokenizer = load_tokenizer(a.model)
    task = load_task(a.settings["task"], a.settings["dataset"])
    records = {record["id"]: record for record in read_records(a.records)}
    asked = exported.conversations(a.settings, task, take_evenly(examples, PROMPTS_RENDERED), records)  # fmt: skip
    few = take_evenly(asked, PROMPTS_ANSWERED)
    limit = max(map(len, answers["ids"])) + ROOM_TO_STOP
    serving = make_serving(a.settings, a.model, answers["ends"])
    with (
        # Beside the export, where there is room for another of its size; cleared as `staged` does.
        tempfile.TemporaryDirectory(
            dir=a.output.parent, prefix=f".{a.output.name}.", suffix=".partial"
        ) as work,
        output_in_log("LiteRT-LM"),
    ):
        path = Path(work, "float.litertlm")
        write_bundle(a.export, a.model / "tokenizer.json", serving, path)
        with open_bundle(path, a.threads) as bundle:
            results = [
                exported.check_token_ids("LiteRT-LM", bundle.tokenize, examples),
                exported.check_chat_template(tokenizer, serving.template, bundle.render, asked),
                exported.check_stop_tokens(bundle.ends(), answers["ends"]),
            ]
            said = [bundle.answer(talk, limit) for talk, _ in few]
    prompts = {example.prompt: example.prompt_ids for example in examples}
    expected = generate_greedy(
        load_exact(a.model), [prompts[prompt] for _, prompt in few], limit, answers["ends"]
    )
    # What does not end within the limit may be cut elsewhere.
    ended = [i for i, ids in enumerate(expected) if ids[-1] in answers["ends"]]
    texts = [str(tokenizer.decode(expected[i][:-1])).strip() for i in ended]
    return [*results, exported.check_answers([said[i].strip() for i in ended], texts)]


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
    program.run(parser, check_parity_litert)


if __name__ == "__main__":
    main()
