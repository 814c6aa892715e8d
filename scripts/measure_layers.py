"""Choose which layers of a base to keep, by what leaving them out does to the labels' probabilities.

The last ones (tail), or greedily the one whose loss is felt least, again and again (as TALE, arXiv
2510.22767, does by accuracy): label KL of the whole base against the one without, before anything is
trained. Greedy chooses on some rows of validation; on others it must be better than tail beyond their
noise: the first layers of a model are simpler to tell of and to compare, and a search finds luck too.

Input   the base model as it was fetched; the folder tokens/, of which validation's prompts alone are read
Output  layers.json: what tail and greedy keep, the label KL of each, which of the two is chosen, and why
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.data.prompts import Examples, take_evenly
from pockettune.evaluation.intervals import ONE_SIDED
from pockettune.evaluation.scoring import add_log_probabilities, next_tokens, score_answers
from pockettune.evaluation.statistics import kl_divergence, normalise
from pockettune.models.folder import check_unchanged
from pockettune.models.layers import choose_layers, depth, read_configs
from pockettune.runtimes.batching import group_by_tokens
from pockettune.runtimes.exact import load_exact
from pockettune.runtimes.memory import ELSEWHERE, memory_hint
from pockettune.runtimes.packing import TOKENS_A_PASS, Tokens, next_token_logits
from pockettune.runtimes.packing_check import check_packing
from pockettune.runtimes.skipping import Skipping

# Nats by which greedy must be better at least: below lies rounding.
FELT = 1e-3
ROWS = 128  # evenly spread over validation; every other one to choose on, the rest to compare on


def measure_layers(base: Path, tokens: Path, count: int, threads: int, output: Path) -> None:
    """Write layers.json, of `count` layers of a base model's folder."""
    torch.set_num_threads(threads)
    check_unchanged(base)
    whole = read_configs(base)[0]
    layers = depth(whole)
    choose_layers(count, layers)
    if "scale_depth" in whole:
        raise UserError(
            f"model.keep_layers: a {whole['model_type']} model weighs each layer by how many there are, so"
            " none can be left out on trial; give a number or a list instead of choose: auto"
        )
    examples = take_evenly(Examples(tokens / "validation.arrow"), ROWS)
    prompts = [example.prompt_ids for example in examples]
    answers = program.read_json(tokens / "answers.json")["ids"]
    with memory_hint(ELSEWHERE):
        check_packing(base, prompts)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        skipping = Skipping(load_exact(base, device=device))
        removed = remove_greedily(skipping, prompts[::2], answers, layers - count)
        kept = [layer for layer in range(layers) if layer not in removed]
        ways = {"tail": list(range(count)), "greedy": kept}
        divergences = measure_ways(skipping, prompts[1::2], answers, ways)
    measured: dict[str, dict[str, Any]] = {
        way: {"kept": ways[way], "label_kl": float(values.mean()) if len(values) else None}
        for way, values in divergences.items()
    }
    measured["greedy"]["removed"] = [
        {"layer": layer, "label_kl": divergence} for layer, divergence in removed.items()
    ]
    rows = {"chosen_on": len(prompts[::2]), "compared_on": len(prompts[1::2])}
    found = {"layers": layers, "count": count, "rows": rows, **measured, **choose_way(divergences)}
    program.write_json(output, found)
    program.logger.info("%s: %s, layers %s", output, found["chosen"], ways[found["chosen"]])


def remove_greedily(
    skipping: Skipping, prompts: Sequence[Tokens], answers: Sequence[Tokens], count: int
) -> dict[int, float]:
    """Return `count` layers in the order of their removal, and the label KL without each and those before.

    Of layers that are missed alike the last goes, so that what decides nothing leaves the tail's cut.
    """
    whole = score_without(skipping, (), prompts, answers)
    removed: dict[int, float] = {}
    rounds = program.progress(range(count), description="leaving out", unit="layers", total=count)
    for _ in rounds:
        scores = score_without_each(skipping, tuple(removed), prompts, answers)
        felt = {layer: label_kl(whole, scores[layer]).mean() for layer in scores}
        layer = min(felt, key=lambda layer: (felt[layer], -layer))
        removed[layer] = float(felt[layer])
        program.logger.info("without layer %d too: label KL %.4g", layer, felt[layer])
    return removed


def score_without(
    skipping: Skipping,
    removed: Sequence[int],
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens],
) -> np.ndarray:
    """Return the answers' log probabilities (prompts, answers) of the model without some layers."""
    with skipping.without(removed):
        return score_answers(partial(next_token_logits, skipping.model), prompts, answers)


def score_without_each(
    skipping: Skipping,
    removed: Sequence[int],
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens],
) -> dict[int, np.ndarray]:
    """Return by layer what `score_without` does without it and the `removed` ones."""
    limit = TOKENS_A_PASS[next(skipping.model.parameters()).device.type]
    left = [layer for layer in range(len(skipping.layers)) if layer not in removed]
    scores = {layer: np.zeros((len(prompts), len(answers))) for layer in left}
    for start, nexts in next_tokens(answers).items():
        first = 0
        for group in group_by_tokens([[*p, *start] for p in prompts], limit, len):
            for layer, logits in skipping.without_each(group, removed):
                rows = scores[layer][first : first + len(group)]
                for row, values in zip(rows, logits.float().cpu().numpy(), strict=True):
                    add_log_probabilities(row, values, nexts)
            first += len(group)
    return scores


def measure_ways(
    skipping: Skipping,
    prompts: Sequence[Tokens],
    answers: Sequence[Tokens],
    ways: Mapping[str, Sequence[int]],
) -> dict[str, np.ndarray]:
    """Return each prompt's label KL of the whole model against the one of the layers that a way keeps."""
    whole = score_without(skipping, (), prompts, answers)
    divergences = {}
    for name, kept in ways.items():
        removed = [layer for layer in range(len(skipping.layers)) if layer not in kept]
        divergences[name] = label_kl(whole, score_without(skipping, removed, prompts, answers))
    return divergences


def label_kl(whole: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Return KL(whole || cut) of each row among the answers alone, from scores (rows, answers)."""
    return kl_divergence(normalise(whole), normalise(cut))


def choose_way(divergences: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return which way is chosen, and why: by how much greedy's label KL is lower, row by row.

    `bound` is what that is at least, at one-sided 95 %; greedy is chosen where it is above FELT.
    """
    lower = divergences["tail"] - divergences["greedy"]
    if len(lower) < 2:
        return {"chosen": "tail", "greedy_lower_by": None, "bound": None}
    mean, error = float(lower.mean()), float(lower.std(ddof=1)) / math.sqrt(len(lower))
    bound = mean - ONE_SIDED * error
    program.logger.info(
        "label KL on %d other rows: tail %.4g, greedy %.4g, which is lower by %.4g (at least %.4g)",
        len(lower), divergences["tail"].mean(), divergences["greedy"].mean(), mean, bound,
    )  # fmt: skip
    return {"chosen": "greedy" if bound > FELT else "tail", "greedy_lower_by": mean, "bound": bound}


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="base model's folder, whole")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--keep", type=int, required=True, help="how many layers to keep")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="layers.json to write")

    def work(a: argparse.Namespace) -> None:
        measure_layers(a.base, a.tokens, a.keep, a.threads, a.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
