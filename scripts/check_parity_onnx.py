"""Prove that an ONNX folder in fp32 is the merged model in PyTorch, before quantized ones are made.

Checked are token ids, chat template, stop tokens, norms, logits, and that onnxruntime-genai, which apps
load the folder with, writes the answers that PyTorch writes. One that fails stops the workflow, with
its cause and the remedy.

Input   merged model's folder (or what trim_vocabulary.py made of it), onnx_float.onnx/; the folder tokens/;
        test.jsonl, its texts
Output  parity_onnx.json: {"passed", "checks": [{"name", "passed", "detail", its numbers}]}
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pockettune.common import program
from pockettune.data.prompts import Example, Examples, take_evenly
from pockettune.data.records import read_records
from pockettune.models.folder import load_tokenizer
from pockettune.parity import exported
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
from pockettune.runtimes.onnx import (
    CHAT_TEMPLATE,
    MODEL,
    OnnxModel,
    OnnxTokenizer,
    import_genai,
    require_runtime,
    stop_tokens,
)
from pockettune.tasks import Message, load_task


def check_parity_onnx(a: argparse.Namespace) -> None:
    """Run every check; write `a.output` where all pass, else name all that failed in one error."""
    torch.set_num_threads(a.threads)
    model, export = a.model, a.export
    require_runtime(export)
    examples = take_evenly(Examples(a.tokens / "test.arrow"), PROMPTS_TOKENIZED)
    answers = program.read_json(a.tokens / "answers.json")["ids"]
    task = load_task(a.settings["task"], a.settings["dataset"])
    records = {record["id"]: record for record in read_records(a.records)}
    few = take_evenly(examples, PROMPTS_RENDERED)
    results = [
        *check_folder(
            model, export, examples, answers, exported.conversations(a.settings, task, few, records)
        ),
        *check_computed(model, export, examples, answers, a.threads),
    ]
    require_passed(results, export, model)
    program.write_json(a.output, {"passed": True, "checks": results})


def check_folder(
    model: Path,
    export: Path,
    examples: Sequence[Example],
    answers: list[list[int]],
    asked: Sequence[tuple[Sequence[Message], str]],
) -> list[Result]:
    """Run the checks for which nothing is computed.

    What a program sends, `asked`, is to become the trained prompt in onnxruntime-genai's engine too.
    """
    own = OnnxTokenizer(export)
    template = (export / CHAT_TEMPLATE).read_text(encoding="utf-8")
    return [
        exported.check_token_ids("onnxruntime-genai", own.tokenize, examples),
        exported.check_stop_tokens(stop_tokens(export), {ids[-1] for ids in answers}),
        exported.misplaced_vectors(read_norms(export), model),
        exported.check_chat_template(load_tokenizer(model), template, own.render, asked),
    ]


def check_computed(
    model: Path, export: Path, examples: Sequence[Example], answers: list[list[int]], threads: int
) -> list[Result]:
    """Run the checks that compare what is computed, one model at a time."""
    prompts = [example.prompt_ids for example in take_evenly(examples, PROMPTS_COMPUTED)]
    few = take_evenly(prompts, PROMPTS_ANSWERED)
    first, ends = sorted({ids[0] for ids in answers}), {ids[-1] for ids in answers}
    limit = max(map(len, answers)) + ROOM_TO_STOP
    runtime = OnnxModel(export, threads)
    found = np.stack(list(runtime.next_token_logits(prompts)))
    del runtime
    said = generate_in_app(export, few, limit)
    exact = load_exact(model)
    merged = logits_of_torch(exact, prompts)
    expected = generate_greedy(exact, few, limit, ends)
    return [
        exported.check_logits(found, merged, first),
        exported.check_answers(said, expected),
    ]


def generate_in_app(export: Path, prompts: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
    """Return what onnxruntime-genai itself writes behind each prompt, up to where it stops."""
    genai = import_genai()
    model = genai.Model(str(export))
    said = []
    for prompt in prompts:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + limit, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array([prompt], np.int32))
        answer = []
        while not generator.is_done():
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
        said.append(answer)
    return said


def read_norms(export: Path) -> dict[str, np.ndarray]:
    """Return the vectors that the export stores, by their names in the model folder."""
    import onnx

    model = onnx.load(str(export / MODEL), load_external_data=True)
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if len(tensor.dims) == 1 and tensor.name.endswith("norm.weight")
    }


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections task, dataset, card"
    )
    parser.add_argument("--model", type=Path, required=True, help="merged model's folder")
    parser.add_argument("--export", type=Path, required=True, help="folder of export_onnx.py, fp32")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--records", type=Path, required=True, help="test.jsonl")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    program.run(parser, check_parity_onnx)


if __name__ == "__main__":
    main()
