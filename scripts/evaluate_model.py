"""Score a model in PyTorch on the evaluation rows: the base model, or the merged one.

Input   a model folder; the folder tokens/
Output  metrics JSON; predictions parquet
"""

import argparse
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pockettune import metrics, program
from pockettune.models import load_model, weight_files
from pockettune.packing import next_token_logits
from pockettune.prompts import read_examples, take_evenly
from pockettune.scoring import score_answers
from pockettune.tasks import load_task


def evaluate_model(
    settings: Mapping[str, Any], stage: str, folder: Path, tokens: Path, threads: int
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Return the stage's metrics and its table of predictions."""
    task = load_task(settings["task"], settings["dataset"])
    words, answer_ids = metrics.read_answers(tokens)
    split, limit = settings["evaluate"]["split"], settings["evaluate"]["limit"]
    examples = take_evenly(read_examples(tokens / f"{split}.parquet"), limit)
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    # fp32 holds what is stored in 16 bits exactly: this is the reference for what follows.
    model = load_model(folder, dtype=torch.float32).to(device).eval()
    logits = partial(next_token_logits, model)
    prompts = [example.prompt_ids for example in examples]
    scores = score_answers(logits, prompts, answer_ids, stage)
    predictions = metrics.predict(examples, words, scores)
    return {
        "stage": stage,
        **metrics.score_predictions(task, predictions),
        "split": split,
        "size_bytes": sum(path.stat().st_size for path in weight_files(folder)),
        "seconds": round(time.perf_counter() - started, 2),
        "provenance": metrics.provenance("torch", "transformers"),
    }, predictions


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="sections task, dataset, evaluate"
    )
    parser.add_argument("--stage", required=True, help="name of the stage in the metrics")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--metrics", type=Path, required=True, help="JSON to write")
    parser.add_argument("--predictions", type=Path, required=True, help="parquet to write")

    def work(a: argparse.Namespace) -> None:
        result, predictions = evaluate_model(a.settings, a.stage, a.model, a.tokens, a.threads)
        metrics.write_stage(result, predictions, a.metrics, a.predictions)

    program.run(parser, work)


if __name__ == "__main__":
    main()
