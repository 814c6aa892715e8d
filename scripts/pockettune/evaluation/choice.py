"""Which file to ship: the smallest that is proved as good as F16, within a budget of size and memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pockettune.common.formats import GGUF
from pockettune.common.words import Words, english
from pockettune.evaluation.verdict import judge, say

REFERENCE = "f16"
MB = 1e6  # bytes


@dataclass(frozen=True)
class Limits:
    """What a file may weigh and take of memory, in MB, None for any; and the margin of the claim."""

    size_mb: float | None
    memory_mb: float | None
    margin: float


def read_limits(settings: Mapping[str, Any]) -> Limits:
    """Return the limits that the sections choose, which may be null, and evaluate set."""
    given = settings["choose"] or {}
    margin = given.get("margin") or settings["evaluate"]["margin"]
    return Limits(given.get("size_mb"), given.get("memory_mb"), margin)


def choose(
    stages: Mapping[str, Any], speed: Mapping[str, Any], limits: Limits, words: Words = english
) -> dict[str, Any]:
    """Return {"chosen", "proved", "why", "limits", "files": {name: …}}, the smallest file first.

    `stages` are those of metrics.json, `speed` what measure_speed.py wrote of each file, by name. Of
    the files proved as good the smallest is chosen, of equal size that with the higher bound; where
    none is proved, the file with the highest bound; None where none is within budget. F16 stands
    among the files and is not chosen: the others are compared with it; nor is one of another format, which is
    not what best.gguf is. "why" and each file's "over" are
    sentences, in the language of `words`.
    """
    files = {
        name: describe_file(entry, speed[name], limits, words)
        for name, entry in sorted(stages.items(), key=lambda item: item[1].get("size_bytes") or 0)
        if "stored" in entry
    }
    for entry in files.values():
        entry["front"] = not any(is_better(other, entry) for other in files.values())
    candidates = {
        name: entry
        for name, entry in files.items()
        if name != REFERENCE and entry["format"] == GGUF
    }
    chosen, proved, why = decide(candidates, limits, words)
    return {
        "chosen": chosen, "proved": proved, "why": why, "limits": asdict(limits), "files": files,
    }  # fmt: skip


def decide(
    candidates: Mapping[str, Any], limits: Limits, words: Words
) -> tuple[str | None, bool, str]:
    """Return which of the described files is chosen, whether it is proved as good, and why it is that one."""
    within = {name: entry for name, entry in candidates.items() if not entry["over"]}
    proved = {name: e for name, e in within.items() if e["verdict"]["claim"] == "as good"}
    if proved:
        chosen = min(proved, key=lambda n: (proved[n]["size_bytes"], -proved[n]["bound"], n))
        claim = say(proved[chosen]["verdict"], words)
        return chosen, True, words("the smallest within the budget that is {claim}", claim=claim)
    files = list_why(candidates, words)
    if not within:
        return None, False, words("no file is within the budget: {files}", files=files)
    chosen = min(within, key=lambda n: (-within[n]["bound"], within[n]["size_bytes"], n))
    why = words(
        "no file within the budget is proved as good as F16; this one has the closest bound"
        " (difference at least {bound} points, margin {margin}): {files}",
        bound=f"{100 * within[chosen]['bound']:+.2f}",
        margin=f"{100 * limits.margin:.4g}",
        files=files,
    )
    return chosen, False, why


def describe_file(
    entry: Mapping[str, Any], speed: Mapping[str, Any], limits: Limits, words: Words
) -> dict[str, Any]:
    """Return what a file costs and is worth; "over" says which limits it breaks.

    "bound": the lowest that its difference of "score", the task's metric, to F16 may be, one-sided at 95 %; it and
    "verdict" are missing for F16 itself.
    """
    size, memory = entry["size_bytes"], speed["resident_bytes"]
    told = {
        "format": entry.get("format", GGUF), "size_bytes": size, "memory_bytes": memory, "score": entry["score"],
        "prompt_rate": speed["prompt"]["mean"],
        "over": broken_limits(size, memory, limits, words),
    }  # fmt: skip
    if paired := entry.get("against_f16"):
        told["bound"] = paired["one_sided"][0]
        told["verdict"] = judge(paired, limits.margin)
    return told


def broken_limits(size: int, memory: int | None, limits: Limits, words: Words) -> list[str]:
    """Return which limits a file of this size and memory, in bytes, breaks."""
    over = []
    if limits.size_mb is not None and size > limits.size_mb * MB:
        told = {"size": f"{size / MB:,.1f}", "limit": f"{limits.size_mb:g}"}
        over.append(words("size {size} MB, choose.size_mb is {limit}", **told))
    if limits.memory_mb is None:
        return over
    limit = f"{limits.memory_mb:g}"
    if memory is None:
        over.append(
            words("memory not measured on this system, choose.memory_mb is {limit}", limit=limit)
        )
    elif memory > limits.memory_mb * MB:
        told = {"memory": f"{memory / MB:,.1f}", "limit": limit}
        over.append(words("memory {memory} MB, choose.memory_mb is {limit}", **told))
    return over


def is_better(other: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether `other` is as small, as good and as fast as `entry`, and in one of them better."""
    a, b = ((-e["size_bytes"], e["score"], e["prompt_rate"]) for e in (other, entry))
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def list_why(files: Mapping[str, Any], words: Words = english) -> str:
    """Return what keeps each file from being chosen."""
    return words("; ").join(
        words("{name}: {why}", name=name, why=say_why(entry, words))
        for name, entry in files.items()
    )


def say_why(entry: Mapping[str, Any], words: Words = english) -> str:
    """Return a file's verdict, behind the limits that it breaks, if any."""
    claim = say(entry["verdict"], words)
    if not entry["over"]:
        return claim
    return words(
        "over budget ({limits}), {claim}", limits=words(", ").join(entry["over"]), claim=claim
    )
