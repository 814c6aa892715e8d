"""Measure how much each column of the merged model's weights counts, for recipes with `importance`.

Input   merged model; the folder tokens/, of which train's prompts alone are read
Output  importance.gguf, as llama.cpp's llama-imatrix writes it
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from pockettune.common import program
from pockettune.data.prompts import Examples, take_evenly
from pockettune.gguf.importance import name_in_file, write_importance
from pockettune.runtimes.activations import sum_squares
from pockettune.runtimes.exact import load_exact
from pockettune.runtimes.memory import ELSEWHERE, memory_hint

PROMPTS = 512  # evenly spread over train


def measure_importance(model: Path, tokens: Path, threads: int, output: Path) -> None:
    """Write the importance of the weights of a model folder."""
    torch.set_num_threads(threads)
    examples = take_evenly(Examples(tokens / "train.arrow"), PROMPTS)
    prompts = [example.prompt_ids for example in examples]
    with memory_hint(ELSEWHERE):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = load_exact(model, device=device)
        found = sum_squares(network, prompts)
    embeddings: list[Any] = [network.get_input_embeddings(), network.get_output_embeddings()]  # type: ignore[operator]
    tied = embeddings[0].weight is embeddings[1].weight
    names = name_in_file(found, network.config.model_type, tied)  # type: ignore[union-attr, arg-type]
    if unnamed := sorted(found.keys() - names.keys()):
        program.logger.warning("without a name in GGUF files, left out: %s", ", ".join(unnamed))
    with program.staged(output) as partial:
        write_importance(partial, {names[name]: found[name] for name in names}, prompts)
    program.logger.info(
        "%s: %d weights, %d prompts of %d tokens", output, len(names), len(prompts), sum(map(len, prompts))
    )  # fmt: skip


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="merged model's folder")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="importance.gguf to write")

    def work(a: argparse.Namespace) -> None:
        measure_importance(a.model, a.tokens, a.threads, a.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
