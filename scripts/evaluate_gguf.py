"""Score a GGUF file on the evaluation rows, in llama.cpp, the runtime that will serve it.

Input   a GGUF file; the folder tokens/
Output  metrics JSON; predictions parquet
"""

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pockettune import metrics, program
from pockettune.gguf_files import describe_tensors
from pockettune.llama import LlamaModel
from pockettune.prompts import read_examples, take_evenly
from pockettune.scoring import score_answers
from pockettune.tasks import load_task


def evaluate_gguf(
    settings: Mapping[str, Any], stage: str, gguf: Path, tokens: Path, threads: int
) -> tuple[dict[str, Any], Any]:
    """Return the stage's metrics and its table of predictions."""
    task = load_task(settings["task"], settings["dataset"])
    words, answer_ids = metrics.read_answers(tokens)
    split, limit = settings["evaluate"]["split"], settings["evaluate"]["limit"]
    examples = take_evenly(read_examples(tokens / f"{split}.parquet"), limit)
    started = time.perf_counter()
    with LlamaModel(gguf, threads) as model:
        prompts = [model.tokenize(example.prompt) for example in examples]
        differing = sum(
            ours != example.prompt_ids for ours, example in zip(prompts, examples, strict=True)
        )
        scores = score_answers(model.next_token_logits, prompts, answer_ids, stage)
    predictions = metrics.predict(examples, words, scores)
    return {
        "stage": stage,
        **metrics.score_predictions(task, predictions),
        "split": split,
        "size_bytes": gguf.stat().st_size,
        "stored": describe_tensors(gguf),
        "seconds": round(time.perf_counter() - started, 2),
        "prompts_tokenized_otherwise": differing,
        "provenance": metrics.provenance("llama-cpp-python"),
    }, predictions


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections task, dataset, evaluate"
    )
    parser.add_argument("--stage", required=True, help="name of the stage in the metrics")
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--metrics", type=Path, required=True, help="JSON to write")
    parser.add_argument("--predictions", type=Path, required=True, help="parquet to write")

    def work(a: argparse.Namespace) -> None:
        result, predictions = evaluate_gguf(a.settings, a.stage, a.gguf, a.tokens, a.threads)
        metrics.write_stage(result, predictions, a.metrics, a.predictions)

    program.run(parser, work)


if __name__ == "__main__":
    main()
