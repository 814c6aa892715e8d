"""Time scoring against llama-bench's prompt rate, on the files that true_scale.py made, in turn.

    python benchmarks/scoring.py --llama-bench PATH [--rows 48] [--rounds 3]

Ours counts the tokens that are really computed: the prompts' common start once, and the rest of each
prompt. llama-bench computes a prompt of 512 tokens and nothing else (-p 512 -n 0). Both take all
cores. Writes benchmarks/scoring.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np

from common import WORK, machine, write_page
from pockettune.common import program
from pockettune.data.prompts import Example, Examples, take_evenly
from pockettune.evaluation.scoring import score_answers
from pockettune.evaluation.stages import Runtime, measure_noise
from pockettune.runtimes.batching import common_prefix
from pockettune.runtimes.llama import LlamaModel


def read_inputs(rows: int) -> tuple[list[list[int]], list[Example]]:
    """Return the answers' token ids and some examples of true_scale.py."""
    answers = program.read_json(WORK / "tokens/answers.json")["ids"]
    return answers, take_evenly(Examples(WORK / "tokens/train.arrow"), rows)


def score(gguf: Path, rows: int, threads: int) -> tuple[float, int, int, np.ndarray]:
    """Return seconds, tokens computed, tokens of all prompts, and the scores."""
    answers, examples = read_inputs(rows)
    with LlamaModel(gguf, threads) as model:
        prompts = [model.tokenize(example.prompt) for example in examples]
        list(model.next_token_logits(prompts[:2]))  # warm up, as llama-bench does
        started = time.perf_counter()
        scores = score_answers(model.next_token_logits, prompts, answers)
        seconds = time.perf_counter() - started
    start, total = len(common_prefix(prompts)), sum(map(len, prompts))
    return seconds, total - start * (len(prompts) - 1), total, scores


def llama_bench(tool: Path, gguf: Path, threads: int) -> float:
    """Return llama-bench's tokens a second on a prompt of 512."""
    command = [tool, "-m", gguf, "-p", 512, "-n", 0, "-t", threads, "-r", 3, "-o", "json"]
    output = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    ).stdout
    return float(json.loads(output)[0]["avg_ts"])


def largest_noise(gguf: Path, rows: int, threads: int, scores: np.ndarray) -> float:
    """Return the largest change of a log probability when prompts are computed one at a time."""
    answers, examples = read_inputs(rows)
    with LlamaModel(gguf, threads) as model:
        prompts = [model.tokenize(example.prompt) for example in examples]
        runtime = Runtime(model.next_token_logits, prompts, model.vocabulary_size)
        return float(measure_noise(runtime, answers, scores)["largest_difference"])


def compare(gguf: Path, tool: Path, rows: int, rounds: int, threads: int) -> str:
    """Run both in turn; return a table's row."""
    ours, theirs, prompt_rates, scores = [], [], [], []
    for _ in range(rounds):
        seconds, computed, total, scored = score(gguf, rows, threads)
        ours.append(computed / seconds)
        prompt_rates.append(total / seconds)
        scores.append(scored)
        theirs.append(llama_bench(tool, gguf, threads))
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    same = all(np.array_equal(scores[0], other) for other in scores[1:])
    noise = largest_noise(gguf, rows, threads, scores[0])
    return (
        f"| {gguf.stem} | {statistics.median(ours):.0f} | {statistics.median(theirs):.0f}"
        f" | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        f" | {statistics.median(prompt_rates):.0f} | {noise:.4f}"
        f" | {'yes' if same else 'no'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--llama-bench", type=Path, required=True, help="llama.cpp's own tool")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    a = parser.parse_args()
    lines = [
        compare(WORK / f"{name}.gguf", a.llama_bench, a.rows, a.rounds, a.threads)
        for name in ("f16", "q4_k_m")
    ]
    write_page("scoring", [
        "# Scoring against llama-bench", "",
        f"Made by `python benchmarks/scoring.py --llama-bench PATH` on {machine()}, behind `true_scale.py`:"
        f" {a.rows} prompts, {a.rounds} rounds in turn, medians.", "",
        "| file | tokens/s really computed | llama-bench, tokens/s | ratio, median (range) | prompt tokens/s with the shared start | one at a time: largest change of a log probability | runs alike to the byte |",
        "|---|---|---|---|---|---|---|", *lines,
    ])  # fmt: skip


if __name__ == "__main__":
    main()
