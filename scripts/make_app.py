"""Put a page together that asks a GGUF file in a browser: plain files, for any web server.

Input   the page's own files (app/), wllama, the GGUF file, the tokens, the scored rows
Output  a folder: index.html, app.js, app.css, sw.js, manifest.webmanifest, icons; wllama; model.gguf;
        task.json (how it is asked), conformance.jsonl (rows that it must answer as it was scored),
        app.json (the page's own: its title, the labels' tokens, and the CRC-32 of each part of the file,
        by which a browser goes on with a download that was cut, and notices a damaged part)
"""

import argparse
import json
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.common.checksums import sha256
from pockettune.evaluation.replay import conformance_rows, describe_task, longest_prompt
from pockettune.gguf.files import read_gguf

PART = (
    4 * 2**20
)  # bytes; what is lost at most where a connection is cut, and what a browser keeps as one
MODEL = "model.gguf"
NOT_KEPT = {MODEL, "sw.js"}  # by the service worker: the page keeps the model itself, part by part


def make_app(a: argparse.Namespace) -> None:
    """Write the folder."""
    best = program.read_json(a.best)["chosen"]
    metadata, _ = read_gguf(a.model)
    predictions = next(path for path in a.predictions if path.stem == best)
    task = describe_task(a.settings, metadata, a.tokens)
    rows = list(conformance_rows(a.tokens, a.settings["evaluate"]["split"], a.records, predictions))
    with program.staged(a.output, needed=a.model.stat().st_size) as partial:
        partial.mkdir()
        for path in [*a.page, *sorted(a.wllama.iterdir())]:
            shutil.copyfile(path, partial / path.name)
        shutil.copyfile(a.model, partial / MODEL)
        program.write_json(partial / "task.json", task)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (partial / "conformance.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        model = describe_parts(a.model, f"{best}.gguf")
        program.write_json(partial / "app.json", describe_app(a.settings, a.tokens, rows, model))
        name_app(partial / "manifest.webmanifest", a.settings["report"]["title"])
        fill_service_worker(partial)
    program.logger.info("%s: %s, %d rows to check it by", a.output, best, len(rows))


def describe_app(
    settings: Mapping[str, Any],
    tokens: Path,
    rows: Sequence[Mapping[str, Any]],
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what the page must know besides the task."""
    answers = program.read_json(tokens / "answers.json")
    labels = {word: label["ids"] for word, label in rows[0]["labels"].items()}
    return {
        "title": settings["report"]["title"],
        "text_column": settings["dataset"]["text_column"],
        "longest_prompt": longest_prompt(settings["tokenize"]["max_length"], answers["ids"]),
        "labels": labels,
        "model": model,
    }


def describe_parts(path: Path, name: str) -> dict[str, Any]:
    """Return size, checksum and the parts' CRC-32 of the file, which is called `name` to the user."""
    checks = []
    with path.open("rb") as file:
        while part := file.read(PART):
            checks.append(zlib.crc32(part))
    return {
        "file": MODEL, "name": name, "bytes": path.stat().st_size, "sha256": sha256(path),
        "part_bytes": PART, "crc32": checks,
    }  # fmt: skip


def name_app(manifest: Path, title: str) -> None:
    """Give the manifest the run's title, by which the app stands on a phone's screen."""
    content = program.read_json(manifest)
    program.write_json(manifest, {**content, "name": title, "short_name": title})


def fill_service_worker(folder: Path) -> None:
    """Write into sw.js which files it keeps, and a version that changes with any of them."""
    files = sorted(path for path in folder.iterdir() if path.name not in NOT_KEPT)
    worker = folder / "sw.js"
    text = worker.read_text(encoding="utf-8")
    names = ["./", *(path.name for path in files)]
    text = text.replace('["@files@"]', json.dumps(names)).replace(
        "@version@", checksum_of([worker, *files])
    )
    worker.write_text(text, encoding="utf-8")


def checksum_of(files: Iterable[Path]) -> str:
    """Return eight digits that change with any byte of the files."""
    return f"{zlib.crc32(''.join(map(sha256, files)).encode()):08x}"


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True,
        help="sections task, dataset, tokenize, report; evaluate.split",
    )  # fmt: skip
    parser.add_argument("--page", type=Path, nargs="+", required=True, help="files of app/")
    parser.add_argument("--wllama", type=Path, required=True, help="folder of fetch_wllama.py")
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--best", type=Path, required=True, help="best.json, which says what it is")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--records", type=Path, required=True, help="jsonl of the scored split")
    parser.add_argument("--predictions", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    program.run(parser, make_app)


if __name__ == "__main__":
    main()
