"""What a run will take of disk and memory, from its config, the model's shape and the rows.

Decimal bytes throughout. A number that cannot be known yet is None and shown as unknown. Memory is
the largest resident set of each program, as benchmarks/*.tsv has it; the constants were fitted to
benchmarks/true_scale.md, growth.md and the demo, on Linux with PyTorch 2.13. A test holds the disk
to a fifth; in memory it sees the libraries alone, which differ between machines.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pockettune.common.disk import used_bytes
from pockettune.common.formats import (
    BUNDLE,
    FOREIGN,
    GGUF,
    LITERT,
    ONNX,
    file_name,
    float_rung,
    variants_of,
)
from pockettune.machine.exported import file_bytes, float_bytes
from pockettune.machine.quantized import tensor_bytes
from pockettune.machine.rows import Rows
from pockettune.machine.run import Run
from pockettune.machine.shape import Shape, find_shape_here

RELEASE = 76_600_000  # bytes of llama-cpp-python's source release
CONVERTER = 7_800_000  # of what is unpacked of it
VOCABULARY = 39  # bytes a token in a GGUF file: its text, type and merges
LOGS = 3_000_000  # logs, metrics and report

TOKENS_A_PASS = {"cpu": 2048, "cuda": 16384}  # as in runtimes/packing, which imports PyTorch
# Resident sets of programs before a model is loaded: the libraries.
TORCH, SCORING, LLAMA, CONVERT, TABLES = 480e6, 600e6, 240e6, 310e6, 400e6
# What a training in bf16 on a CPU holds besides, fitted: 0.66 GB in the demo, 0.93 GB in growth.py.
# Part of it are the kernels that oneDNN compiles and keeps for every length of a pass: with
# ONEDNN_PRIMITIVE_CACHE_CAPACITY=1 the demo's first 38 updates peaked at 813 MiB instead of 943.
KERNELS = 0.75e9
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
SHARD = 2e9  # bytes that merging gathers before it writes them, as in models/merging
BESIDE = 1.5e9  # what computing in fp32 takes besides weights, as in runtimes/exact
ONNX_PROGRAMS = ("export (ONNX)", "check_parity (ONNX)", "evaluate (ONNX)")
# What the builder (0.18.0) holds a weight of the largest matrix while it quantizes that, in bytes.
TO_QUANTIZE = {"default": 12, "rtn": 23, "k_quant_mixed": 41}
LITERT_PROGRAMS = (
    "export (LiteRT)",
    "check_parity (LiteRT)",
    "quantize (LiteRT)",
    "evaluate (LiteRT)",
)
SPARE = 1.25  # of a job's request: an estimate is within a fifth
ADAM = 4 * 4  # bytes a trainable parameter: itself, its gradient and two moments, in fp32


@dataclass(frozen=True)
class Item:
    """Something that a run writes: where, how many bytes, and whether it is there already."""

    path: Path
    size: int | None
    there: bool

    @property
    def missing(self) -> int:
        return 0 if self.there else self.size or 0


def disk_items(run: Run, shape: Shape | None, rows: Rows | None) -> dict[str, Item]:
    """Return what a run leaves on the disk, and the checkpoint that comes and goes."""
    settings = run.settings
    sizes = dict(_disk_sizes(settings, shape, rows))
    places = {
        "base model": run.base,
        "llama.cpp's source": run.path(f"resources/downloads/llama_cpp_python-{run.converter_version}.tar.gz"),
        "llama.cpp's converter": run.converter,
        "dataset": run.results / "dataset",
        "tokens": run.results / "tokens",
        "adapter": run.results / "adapter",
        "checkpoint": run.results / "scratch",
        "merged": run.results / "merged",
        "trimmed": run.results / "trimmed",
        "f16.gguf": run.results / "f16.gguf",
        "logits": run.results / "logits/f16.npy",
        "logs and report": run.results / "report.html",
        **{name: run.results / name for name in file_names(settings["quantize"])},
    }  # fmt: skip
    items = {name: Item(path, sizes.get(name), path.exists()) for name, path in places.items()}
    if settings["vocabulary"]["keep"] == "full":
        del items["trimmed"]
    if items["adapter"].there or settings["train"]["adapter"]:
        del items["checkpoint"]
    if items["llama.cpp's converter"].there:
        del items["llama.cpp's source"]
    return items


def file_names(quantize: Any) -> list[str]:
    """Return the names of the recipes' files, and of the float rungs of their formats."""
    rungs = [file_name(float_rung(kind), kind) for kind in FOREIGN if variants_of(quantize, kind)]
    files = [file_name(name, recipe.get("format", GGUF)) for name, recipe in quantize.items()]
    return rungs + files + [variant + BUNDLE for variant in variants_of(quantize, LITERT)]


def _disk_sizes(settings: Any, shape: Shape | None, rows: Rows | None) -> Iterator[tuple[str, int]]:
    yield "llama.cpp's source", RELEASE
    yield "llama.cpp's converter", CONVERTER
    yield "logs and report", LOGS
    if rows:
        count = sum(rows.counts.values())
        yield "dataset", round(count * (rows.text_bytes + 50))
        tokens = sum(map(sum, rows.tokens.values())) / max(sum(map(len, rows.tokens.values())), 1)
        frame = len((settings["task"]["system"] + settings["task"]["prompt"]).encode())
        # 50 bytes of a chat template, 50 of the other columns.
        yield "tokens", round(count * (rows.text_bytes + frame + 4 * tokens + 100))
    if not shape:
        return
    weights = 2 * shape.parameters
    extra = shape.extra_bytes or VOCABULARY * shape.vocabulary
    yield "base model", shape.file_bytes or weights + extra  # a hub's file is moved, not copied
    own = settings["train"]["adapter"]
    yield (
        "adapter",
        used_bytes(Path(own)) if own else 4 * trainable(settings["train"], shape) + 30_000,
    )
    # Weights, two moments and the best weights so far; the old one stays until the new is written.
    yield "checkpoint", 2 * 16 * trainable(settings["train"], shape)
    yield "merged", weights + extra
    # At most, and so the files: which tokens stay, train's texts will tell.
    yield "trimmed", weights + extra
    vocabulary = VOCABULARY * shape.vocabulary
    yield "f16.gguf", tensor_bytes(shape, None) + vocabulary
    if rows:
        yield "logits", 2 * rows.scored(settings["evaluate"]) * shape.vocabulary
    for kind in FOREIGN:
        yield file_name(float_rung(kind), kind), float_bytes(shape) + vocabulary
    for variant, recipe in settings["quantize"].items():
        if (size := file_bytes(shape, recipe)) is not None:
            yield file_name(variant, recipe.get("format", GGUF)), size + vocabulary
            yield variant + BUNDLE, size + vocabulary


def trainable(train: Any, shape: Shape) -> int:
    """Return the parameters that are trained: none, where the adapter comes from elsewhere."""
    if train.get("adapter"):
        return 0
    wanted = train["target_modules"]
    inner = {t.name for t in shape.tensors} - {"embed_tokens", "lm_head"}
    names = inner if wanted == "all-linear" else set(wanted)
    chosen = [t for t in shape.tensors if t.name in names and len(t.shape) == 2]
    magnitudes = sum(t.shape[0] for t in chosen) if train["variant"] == "dora" else 0
    return train["rank"] * sum(map(sum, (t.shape for t in chosen))) + magnitudes


def memory_items(
    run: Run,
    shape: Shape | None,
    rows: Rows | None,
    device: str,
    precision: str,
    free: float = math.inf,
) -> dict[str, int | None]:
    """Return the peak memory of each program that takes much; on a GPU of its host's side.

    `free` bytes decide whether weights are held in fp32 where the gate and scoring compute in it.
    """
    names: tuple[str, ...] = (
        "tokenize",
        "check_base",
        "train",
        "merge",
        "convert",
        "check_parity",
        "quantize",
        "evaluate (PyTorch)",
        "evaluate (llama.cpp)",
    )
    sizes = _memory_sizes(run.settings, shape, rows, device, precision, free) if shape else ()
    known = dict(sizes)
    if variants_of(run.settings["quantize"], ONNX):
        names += ONNX_PROGRAMS
    if variants_of(run.settings["quantize"], LITERT):
        names += LITERT_PROGRAMS
    if run.settings["train"]["adapter"]:
        names = tuple(name for name in names if name != "train")
    return {name: round(known[name]) if name in known else None for name in names}


def request(run: Run, name: str) -> int:
    """Return the bytes that a job of a program is to ask a cluster for; 0 before the base is here.

    A training is taken to run on a GPU, unless `train.device` is cpu.
    """
    shape = find_shape_here(run)
    device = "cpu" if run.settings["train"].get("device") == "cpu" else "cuda"
    return round(SPARE * (memory_items(run, shape, None, device, "fp32").get(name) or 0))


def _memory_sizes(
    settings: Any, shape: Shape, rows: Rows | None, device: str, precision: str, free: float
) -> Iterator[tuple[str, float]]:
    stored, f16 = 2.0 * shape.parameters, tensor_bytes(shape, None)
    largest = max((tensor.elements for tensor in shape.tensors), default=0)
    # Loading in another format keeps the file mapped beside its copy.
    fits = 4.0 * shape.parameters + BESIDE <= free
    exact = stored + (4.0 * shape.parameters if fits else stored + 4.0 * largest)
    yield "tokenize", TABLES + 700 * shape.vocabulary
    yield "check_base", SCORING + exact
    if not settings["train"]["adapter"]:
        loading = BYTES[precision] * shape.parameters + stored
        kernels = KERNELS if precision == "bf16" else 0
        computing = training_bytes(settings, shape, rows, device, precision) + kernels
        yield "train", TORCH + (stored if device == "cuda" else max(loading, computing))
    yield "merge", TORCH + min(stored, SHARD) + 2 * largest
    yield "convert", CONVERT + 2 * largest + 500 * shape.vocabulary
    yield "check_parity", SCORING + f16 + exact
    yield "quantize", 60e6 + f16
    yield "evaluate (PyTorch)", SCORING + exact
    yield "evaluate (llama.cpp)", LLAMA + f16
    yield from _exported_sizes(settings, shape, stored, exact)


def _exported_sizes(
    settings: Any, shape: Shape, stored: float, exact: float
) -> Iterator[tuple[str, float]]:
    """Yield the programs of other formats; the constants were fitted to SmolLM2-135M and Gemma 3 270M."""
    largest = max((tensor.elements for tensor in shape.tensors), default=0)
    whole = float_bytes(shape)
    recipes = [settings["quantize"][name] for name in variants_of(settings["quantize"], ONNX)]
    most = max((TO_QUANTIZE[r.get("algorithm", "default")] for r in recipes), default=0)
    # The model as it is stored, in fp32, and its largest matrix again and again.
    yield "export (ONNX)", 0.35e9 + stored + whole + most * largest
    # Of a table that is the head, ONNX Runtime keeps one copy to look up in and one packed for products.
    in_runtime = whole + 8 * largest
    yield "check_parity (ONNX)", SCORING + max(in_runtime, exact)
    yield "evaluate (ONNX)", 0.3e9 + in_runtime
    # The traced graphs and MLIR's hold the weights again and again; fitted at 1.3, 135 and 268 million parameters.
    yield "export (LiteRT)", 0.75e9 + 5 * whole
    # XNNPACK packs the weights of each graph anew.
    yield "check_parity (LiteRT)", SCORING + max(3 * whole, exact)
    yield "quantize (LiteRT)", 0.12e9 + 1.7 * whole
    # The table's own weights are not packed where tokens are looked up.
    yield "evaluate (LiteRT)", SCORING + 3 * whole - 4 * largest


def training_bytes(
    settings: Any, shape: Shape, rows: Rows | None, device: str, precision: str
) -> float:
    """Return what a training holds: weights, adapter, and the activations of its longest pass.

    On the device that trains: a GPU's memory, or the process's.
    """
    train = settings["train"]
    width = BYTES[precision]
    body = sum(
        t.elements for t in shape.tensors if t.layer or t.name not in ("embed_tokens", "lm_head")
    )
    # NF4 packs the layers' matrices: half a byte a weight, and an eighth of a bit for the scales.
    weights = (
        width * (shape.parameters - body)
        + (0.52 if train["quantization"] == "nf4" else width) * body
    )
    tokens = pass_tokens(settings, rows, device)
    layer = 18 * shape.hidden + 9 * shape.intermediate  # numbers kept of a token for the way back
    kept = (1.3 if train["gradient_checkpointing"] else shape.layers) * layer * width * tokens
    return weights + ADAM * trainable(train, shape) + kept


def pass_tokens(settings: Any, rows: Rows | None, device: str) -> int:
    """Return the tokens of the longest forward pass: of the rows if known, else the most allowed."""
    train, most = settings["train"], TOKENS_A_PASS[device]
    if train["batch_tokens"]:
        return min(train["batch_tokens"], most)
    if rows:
        return rows.longest_pass(train["batch_size"], most)
    return min(train["batch_size"] * settings["tokenize"]["max_length"], most)
