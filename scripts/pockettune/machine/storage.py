"""Whether the run fits on the disk and in the memory, and whether it may write where it must."""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from pockettune.common import limits
from pockettune.machine import estimate
from pockettune.machine.findings import Finding, State, in_words
from pockettune.machine.probe import Answer
from pockettune.machine.run import Run

TIGHT = 0.85  # of what is free; an estimate is within a fifth


def check_folders(run: Run) -> list[Finding]:
    """Whether the run may write, and on what kind of file system."""
    places = {
        "results": run.results,
        "resources": run.path("resources"),
        ".snakemake": run.path(".snakemake"),
    }
    closed = [
        name
        for name, path in places.items()
        if not os.access(limits.existing(path), os.W_OK | os.X_OK)
    ]
    if closed:
        return [
            Finding(
                "folders",
                "problem",
                f"cannot be written: {', '.join(closed)}",
                "a checkout of your own, or pathvars.results elsewhere",
            )
        ]
    kind = limits.file_system(run.results)
    where = (
        ""
        if kind is None
        else f", on {kind}, {'shared over a network' if kind in limits.NETWORKS else 'local'}"
    )
    if kind and run.on_cluster and kind not in limits.NETWORKS:
        return [
            Finding(
                "folders",
                "warning",
                f"results can be written{where}",
                "SLURM's nodes must see it: a checkout on the shared file system",
            )
        ]
    return [Finding("folders", "ok", f"results can be written{where}")]


def check_disk(run: Run) -> list[Finding]:
    """What the run will write against what is free, each file system by itself."""
    items = estimate.disk_items(run, run.facts["shape"](), run.facts["rows"]())
    by_device: dict[int, list[str]] = defaultdict(list)
    for name, item in items.items():
        by_device[limits.existing(item.path).stat().st_dev].append(name)
    findings = []
    for names in by_device.values():
        mine = {name: items[name] for name in names}
        findings.append(judge_disk(run.root, mine))
    return findings


def judge_disk(root: Path, items: dict[str, estimate.Item]) -> Finding:
    """Compare items of one file system with the room there."""
    needed, free = (
        sum(item.missing for item in items.values()),
        limits.free_disk(next(iter(items.values())).path),
    )
    unknown = [name for name, item in items.items() if item.size is None and not item.there]
    told = f"{in_words(needed)} still to be written, {in_words(free)} free"
    if unknown:
        told += f"; not known until it is here: {', '.join(unknown)}"
    sizes = {f"{name}{', there' if item.there else ''}": item.size for name, item in items.items()}
    state: State = "problem" if needed > free else "warning" if needed > TIGHT * free else "ok"
    remedy = (
        ""
        if state == "ok"
        else "make room, drop variants of `quantize:`, or lay results elsewhere (pathvars.results)"
    )
    return Finding("disk", state, told, remedy, sizes)


def training_device(run: Run) -> tuple[str, str, Any]:
    """Return what the training would compute on: device, number format, and the GPU's facts if any."""
    answer: Answer = run.facts["torch"]()
    wanted = run.settings["train"].get("precision", "auto")
    device = answer.facts.get("device", "cpu")
    card = answer.facts["gpus"][0] if device == "cuda" else None
    if wanted != "auto":
        return device, wanted, card
    if card:
        return device, "bf16" if card["bf16"] else "fp16", card
    known = answer.facts.get("cpu", {})
    return device, "bf16" if known.get("avx512_bf16") or known.get("amx_bf16") else "fp32", None


def check_memory(run: Run) -> list[Finding]:
    """The largest program against the memory that is free, and the training against the GPU's."""
    device, precision, card = training_device(run)
    shape, rows = run.facts["shape"](), run.facts["rows"]()
    free = limits.free_memory()
    items = estimate.memory_items(run, shape, rows, device, precision, free)
    if shape is None:
        return [
            Finding(
                "memory",
                "ok",
                f"{in_words(free)} free; what is needed is not known until the model is here",
                "",
                items,
            )
        ]
    name, peak = max(((n, v) for n, v in items.items() if v is not None), key=lambda pair: pair[1])
    how = (
        ""
        if rows
        else ", of the longest rows that tokenize.max_length allows: the dataset is not here"
    )
    findings = [
        judge_memory(
            "memory",
            f"{name} takes {in_words(peak)} at its peak{how if name == 'train' else ''}",
            peak,
            free,
            run.on_cluster,
            items,
        )
    ]
    if card and not run.settings["train"]["adapter"]:
        needed = estimate.training_bytes(run.settings, shape, rows, device, precision)
        findings.append(
            judge_memory(
                "gpu memory",
                f"train takes {in_words(needed)}{how}",
                round(needed),
                card["free"],
                run.on_cluster,
                {"train": round(needed)},
            )
        )
    return findings


def judge_memory(
    name: str, told: str, needed: int, free: int, elsewhere: bool, items: dict[str, int | None]
) -> Finding:
    """Compare a peak with what is free; of a cluster's nodes this machine says nothing."""
    state: State = "problem" if needed > free else "warning" if needed > TIGHT * free else "ok"
    if elsewhere and state != "ok":
        state = "warning"
    remedy = (
        ""
        if state == "ok"
        else (
            "see that the nodes have it (mem_mb in the profile)"
            if elsewhere
            else "close other programs; train.batch_size lower, train.gradient_checkpointing: true; a smaller model or a larger machine"
        )
    )
    return Finding(name, state, f"{told}; {in_words(free)} free", remedy, items)
