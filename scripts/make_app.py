"""Put a page together that asks a GGUF file in a browser: plain files, for any web server.

Input   the page's own files (app/), wllama, the bundle, the tokens
Output  a folder: index.html, app.js, text.js, app.css, sw.js, manifest.webmanifest, icons; wllama; of the bundle
        model.gguf, task.json, conformance.jsonl and the licence;
        app.json (the page's own: its title, the tokens of labels, and the CRC-32 of each part of the file,
        by which a browser goes on with a download that was cut, and notices a damaged part)
"""

import argparse
import json
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pockettune.common import program
from pockettune.common.checksums import sha256

MODEL = "model.gguf"
# Bytes: what is lost at most where a connection is cut, and what a browser keeps as one.
PART = 4 * 2**20
NOT_KEPT = {MODEL, "sw.js"}  # by the service worker: the page keeps the model itself, part by part


def make_app(a: argparse.Namespace) -> None:
    """Write the folder `a.output`."""
    model = a.bundle / MODEL
    with program.staged(a.output, needed=model.stat().st_size) as partial:
        partial.mkdir()
        bundled = [a.bundle / name for name in (MODEL, "task.json", "conformance.jsonl")]
        # Snakemake leaves a hidden file of its own in folders.
        for path in [*a.page, *sorted(a.wllama.glob("[!.]*")), *bundled]:
            shutil.copyfile(path, partial / path.name)
        shutil.copyfile(a.bundle / "LICENSE.txt", partial / "model-LICENSE.txt")
        program.write_json(partial / "app.json", describe_app(a.settings, a.bundle, a.tokens))
        name_app(partial / "manifest.webmanifest", a.settings["report"]["title"])
        fill_service_worker(partial)
    program.logger.info("%s: put it on any web server; make app serves it here", a.output)


def describe_app(settings: Mapping[str, Any], bundle: Path, tokens: Path) -> dict[str, Any]:
    """Return what the page must know besides task.json.

    "labels": the tokens of each label up to where it is decided, none where answers are text;
    "longest_prompt": in tokens, so that the longest answer has room behind it, as in training.
    """
    with (bundle / "conformance.jsonl").open(encoding="utf-8") as rows:
        first = json.loads(next(rows))
    answers = program.read_json(tokens / "answers.json")
    task = program.read_json(bundle / "task.json")
    longest = max(map(len, answers["ids"]), default=task["max_tokens"])
    return {
        "title": settings["report"]["title"],
        "text_column": settings["dataset"]["text_column"],
        "longest_prompt": settings["tokenize"]["max_length"] - longest,
        "labels": {word: label["ids"] for word, label in first.get("labels", {}).items()},
        "model": describe_parts(bundle / MODEL, f"{task['file']}.gguf"),
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
    names = json.dumps(["./", *(path.name for path in files)])
    version = checksum_of([worker, *files])
    text = worker.read_text(encoding="utf-8")
    text = text.replace('["@files@"]', names).replace("@version@", version)
    worker.write_text(text, encoding="utf-8")


def checksum_of(files: Iterable[Path]) -> str:
    """Return eight digits that change with any byte of the files."""
    return f"{zlib.crc32(''.join(map(sha256, files)).encode()):08x}"


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument(
        "--settings", type=json.loads, required=True,
        help="dataset.text_column, sections tokenize and report",
    )  # fmt: skip
    parser.add_argument("--bundle", type=Path, required=True, help="folder of make_bundle.py")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenize_dataset.py")
    parser.add_argument("--wllama", type=Path, required=True, help="folder of fetch_wllama.py")
    parser.add_argument("--page", type=Path, nargs="+", required=True, help="files of app/")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    program.run(parser, make_app)


if __name__ == "__main__":
    main()
