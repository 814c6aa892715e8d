"""What recipes, fewer tokens and fewer layers make of a model of Qwen2.5-0.5B's shape: bytes and speed.

The weights are random, which changes neither; what is lost in accuracy, small.py measures on real models.

    python benchmarks/recipes.py [--texts reviews.tsv]

The vocabulary is trimmed to what the texts need (a table's column `text_a`; else generated reviews), and to all
tokens of Han. Writes benchmarks/recipes.md. Takes 4 GB of the disk and half an hour.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (  # fmt: skip
    CONVERTER,
    WORK,
    default_settings,
    machine,
    make_data,
    make_model,
    measure,
    program,
    step,
    write_page,
)

WHOLE, FOLDER = WORK / "model", WORK / "recipes"
DEPTHS = (24, 16, 12)
EMBEDDING = {"token_embd": "Q8_0"}
STOCK = "Q4_K_M"
RECIPES: dict[str, dict[str, Any]] = {
    STOCK: {"type": "Q4_K_M"},
    "Q8_0": {"type": "Q8_0"},
    "Q6_K": {"type": "Q6_K"},
    "Q5_K_M": {"type": "Q5_K_M"},
    "Q4_K_S": {"type": "Q4_K_S"},
    "Q4_1": {"type": "Q4_1"},
    "Q4_0": {"type": "Q4_0"},
    "IQ4_NL": {"type": "IQ4_NL"},
    "Q4_0, pure": {"type": "Q4_0", "pure": True},
    "IQ4_NL, pure but the embedding": {"type": "IQ4_NL", "pure": True, "tensors": EMBEDDING},
    "IQ4_NL, ffn_down Q3_K": {"type": "IQ4_NL", "tensors": {"ffn_down": "Q3_K"}},
}
# Aims of 4-bit files with a trimmed vocabulary: MB at most, and times stock's prompt rate.
GOALS = {24: (235, 2.0), 16: (168, 3.0), 12: (134, 4.0)}


@dataclass
class Row:
    """One file: what it was made of, what it weighs and how fast it is."""

    layers: int
    vocabulary: str
    recipe: str
    size: int
    predicted: int
    bits: float
    seconds: float
    speed: dict[str, Any]


def make_folders(texts: list[str]) -> Iterator[tuple[int, str, Path]]:
    """Yield layers, vocabulary and model folder of each combination; the folder is gone afterwards."""
    from pockettune.models.shards import list_stored
    from shrink_model import shrink_model

    program.write_json(WHOLE / "source.json", {"sha256": {}})
    kept = choose(texts)
    for layers in DEPTHS:
        cut = FOLDER / "cut"
        shrink_model(WHOLE, layers, cut)
        assert sum(1 for _ in list_stored(cut)) == 2 + 12 * layers
        yield layers, "full", cut
        trimmed = FOLDER / "trimmed"
        trim(cut, kept, trimmed)
        yield layers, "trimmed", trimmed
        program.remove(trimmed)
        program.remove(cut)


def choose(texts: list[str]) -> list[int]:
    """Return the ids that the texts and Han need."""
    from tokenizers import Tokenizer

    from pockettune.models.folder import embedding_rows
    from pockettune.models.kept_tokens import Vocabulary, choose_tokens

    path = WHOLE / "tokenizer.json"
    encoded = Tokenizer.from_file(str(path)).encode_batch(texts)
    emitted = {number for one in encoded for number in one.ids}
    wanted = {"keep": "task", "scripts": ["han"], "frequent": 0}
    vocabulary = Vocabulary(program.read_json(path), WHOLE.name)
    return choose_tokens(vocabulary, emitted, wanted, embedding_rows(WHOLE))[0]


def trim(model: Path, kept: list[int], output: Path) -> None:
    from pockettune.models.trimming import trim_files, trim_weights

    output.mkdir()
    trim_files(model, kept, output)
    trim_weights(model, kept, output)


def measure_folder(layers: int, vocabulary: str, model: Path, threads: int) -> Iterator[Row]:
    """Yield a row for each recipe."""
    from pockettune.gguf.files import describe_file
    from pockettune.machine.estimate import VOCABULARY
    from pockettune.machine.quantized import tensor_bytes
    from pockettune.machine.shape import shape_of_folder

    settings = json.dumps(default_settings(), ensure_ascii=False)
    f16, file, speed = FOLDER / "f16.gguf", FOLDER / "file.gguf", FOLDER / "speed.json"
    measure(step("convert_model", "--model", model, "--whole", WHOLE, "--converter", CONVERTER, "--settings", settings, "--output", f16))  # fmt: skip
    shape = shape_of_folder(model)
    for name, recipe in RECIPES.items():
        seconds = measure(step("quantize_model", "--settings", json.dumps(recipe), "--source", f16, "--threads", threads, "--output", file)).seconds  # fmt: skip
        measure(step("measure_speed", "--model", file, "--threads", threads, "--output", speed))
        predicted = tensor_bytes(shape, recipe) + VOCABULARY * shape.vocabulary
        yield Row(layers, vocabulary, name, file.stat().st_size, predicted,
                  describe_file(file)["bits_per_weight"], seconds, program.read_json(speed))  # fmt: skip


def describe(row: Row, stock: Row) -> str:
    """Return a row of the page."""
    rates = [(row.speed[kind]["mean"], stock.speed[kind]["mean"]) for kind in ("prompt", "generation")]  # fmt: skip
    told = [f"{own:.0f} ({own / other:.2f}x)" for own, other in rates]
    error = row.predicted / row.size - 1
    return (
        f"| {row.layers} | {row.vocabulary} | {row.recipe} | {row.size:,} | {100 * error:+.2f} % | {row.bits:.2f}"
        f" | {row.seconds:.1f} s | {' | '.join(told)} | {row.speed['resident_bytes'] / 1e6:.0f} |"
    )


def judge(rows: list[Row], stock: Row) -> Iterator[str]:
    """Yield a row for each depth: the smallest and the fastest 4-bit file with a trimmed vocabulary."""
    for layers, (size_mb, times) in GOALS.items():
        of_depth = [row for row in rows if row.layers == layers and row.vocabulary == "trimmed"
                    and row.recipe in ("Q4_0", "IQ4_NL")]  # fmt: skip
        for row in of_depth:
            rate = row.speed["prompt"]["mean"] / stock.speed["prompt"]["mean"]
            met = ["yes" if good else "no" for good in (row.size <= size_mb * 1e6, rate >= times)]
            yield f"| {layers} | {row.recipe} | {row.size / 1e6:.1f} | {size_mb}: {met[0]} | {rate:.2f} | {times}: {met[1]} |"


def read_texts(path: Path | None) -> list[str]:
    import pandas as pd

    if path is None:
        make_data(2000)
        return [str(text) for text in pd.read_csv(WORK / "data/train.csv")["text"]]
    return [str(text) for text in pd.read_csv(path, sep="\t")["text_a"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--texts", type=Path, help="a .tsv with a column text_a")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    make_model(WHOLE)
    texts = read_texts(arguments.texts)
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for layers, vocabulary, model in make_folders(texts):
        for row in measure_folder(layers, vocabulary, model, arguments.threads):
            rows.append(row)
            print(describe(row, rows[0]), flush=True)
    stock = rows[0]
    assert (stock.recipe, stock.layers, stock.vocabulary) == (STOCK, 24, "full")
    write_page("recipes", [
        "# Recipes, tokens and layers on a model of Qwen2.5-0.5B's shape", "",
        f"Made by `python benchmarks/recipes.py{' --texts train.tsv' if arguments.texts else ''}` on {machine()};"
        f" random weights. Trimmed to what {len(texts):,} reviews and Han need. Predicted: what `make doctor` says"
        " before anything is made, against the file. Rates in tokens a second, in brackets against stock"
        f" {STOCK} of the whole model in the same run; memory is what loading and running added.", "",
        "| layers, trimmed | recipe | MB | at most, MB | prompt rate against stock | at least |", "|---|---|---|---|---|---|",
        *judge(rows, stock), "",
        "| layers | vocabulary | recipe | bytes | predicted | bits a weight | quantize | prompt | generation | memory, MB |",
        "|---|---|---|---|---|---|---|---|---|---|", *(describe(row, stock) for row in rows),
    ])  # fmt: skip
    program.remove(FOLDER)


if __name__ == "__main__":
    main()
