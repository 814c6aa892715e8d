"""Take llama.cpp's own converter out of the pinned llama-cpp-python source release.

The wheel of llama-cpp-python has no converter; its source release holds all of llama.cpp, so the
converter comes from the same commit as the library that quantizes and scores.

Input   llama-cpp-python's source release, through pip (its mirror settings and cache apply)
Output  a folder with convert_hf_to_gguf.py, conversion/, gguf-py/, the vocabulary of Qwen2 that
        llama.cpp tests with, and the MIT licence
"""

import argparse
from pathlib import Path

from pockettune.common import program
from pockettune.sources.llama_cpp import source_release, unpack
from pockettune.sources.packages import download_package

WANTED = ("LICENSE", "convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "gguf-py/LICENSE",
          "models/ggml-vocab-qwen2.gguf")  # fmt: skip


def fetch_converter(version: str, downloads: Path, output: Path) -> None:
    """Download the source release, verify it, and unpack the converter."""
    archive = download_package(source_release(version), downloads)
    with program.staged(output) as partial:
        unpack(archive, f"llama_cpp_python-{version}/vendor/llama.cpp/", partial, WANTED)
    program.logger.info("converter of llama-cpp-python %s in %s", version, output)


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--version", required=True, help="of llama-cpp-python")
    parser.add_argument("--downloads", type=Path, required=True, help="folder for the release")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")

    def work(arguments: argparse.Namespace) -> None:
        fetch_converter(arguments.version, arguments.downloads, arguments.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
