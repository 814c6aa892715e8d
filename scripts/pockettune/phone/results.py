"""What a device computed, beside what was scored."""

import json
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from pockettune.common.errors import UserError
from pockettune.evaluation.conformance import Reply, judge


def summarize(printed: str) -> dict[str, Any]:
    """Return what score printed, with the median rates of its rounds."""
    try:
        measured = json.loads(printed)
        rounds = measured["rounds"]
    except (ValueError, KeyError) as error:
        raise UserError(
            "the device's program ended before its last word: was the device lost, or its memory too"
            " little? connect it again, and run again"
        ) from error

    def middle(phase: str, value: str) -> float | None:
        found = [round_[phase][value] for round_ in rounds]
        return median(found) if found and None not in found else None

    for round_ in rounds:
        for phase in ("prompt", "generation"):
            round_[phase]["tokens_per_s"] = round_[phase]["tokens"] / round_[phase]["seconds"]
    measured["peak_memory_bytes"] = int(measured["peak_memory_bytes"])
    medians = {
        f"{phase}_{value}": middle(phase, value)
        for phase in ("prompt", "generation")
        for value in ("tokens_per_s", "joules_a_token")
    }
    return {"median": medians, **measured}


def compare(
    rows: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return how many rows a device answers as scored, and by how much its scores differ, in nats."""
    if [row["id"] for row in rows] != [row["id"] for row in found]:
        raise UserError("the device answered other rows than were sent: run again")
    if any(None in row["labels"].values() for row in found):
        raise UserError(
            "the device computed no number for a label: is its copy of the model whole?"
        )
    differences, how = [], []
    for row, other in zip(rows, found, strict=True):
        answer = max(row["labels"], key=other["labels"].__getitem__)
        how.append((row["id"], judge(row, Reply(text=answer)), answer))
        differences += [
            abs(other["labels"][word] - label["log_probability"])
            for word, label in row["labels"].items()
        ]
    return {
        "rows": len(how),
        "right": sum(judged == "right" for _, judged, _ in how),
        "near": [identity for identity, judged, _ in how if judged == "near"],
        "wrong": {identity: answer for identity, judged, answer in how if judged == "wrong"},
        "largest_difference": max(differences, default=None),
    }


def describe(result: Mapping[str, Any]) -> str:
    """Return the result in a sentence."""
    comparison, medians = result["comparison"], result["median"]
    told = (
        f"{result['device']['model']}: {comparison['right']} of {comparison['rows']} rows as scored"
    )
    if comparison["near"]:
        told += (
            f", {len(comparison['near'])} otherwise whose labels were close, as another build may"
        )
    if medians["prompt_tokens_per_s"] is not None:
        told += (
            f"; {medians['prompt_tokens_per_s']:.0f} prompt tokens/s, generation"
            f" {medians['generation_tokens_per_s']:.1f} tokens/s"
        )
    told += f", {result['peak_memory_bytes'] / 1e6:.0f} MB of memory"
    if (joules := medians["prompt_joules_a_token"]) is not None:
        told += f", {joules:.3f} J a prompt token"
    return told
