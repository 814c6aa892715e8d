"""Take llama.cpp's own converter out of the pinned llama-cpp-python source release.

The wheel of llama-cpp-python has no converter; its source release holds all of llama.cpp, so the
converter comes from the same commit as the library that quantizes and scores.

Input   llama-cpp-python's source release, through pip (its mirror settings and cache apply)
Output  a folder with convert_hf_to_gguf.py, conversion/, gguf-py/, the vocabulary of Qwen2 that
        llama.cpp tests with, and the MIT licence
"""

import argparse
import tarfile
from pathlib import Path

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.sources.packages import Package, download_package

# Of the source releases that were looked at; another version needs its own line.
SHA256 = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}

SIZE = 76_000_000  # bytes of a source release, a little less

WANTED = ("LICENSE", "convert_hf_to_gguf.py", "conversion/", "gguf-py/gguf/", "gguf-py/LICENSE",
          "models/ggml-vocab-qwen2.gguf")  # fmt: skip


def fetch_converter(version: str, downloads: Path, output: Path) -> None:
    """Download the source release, verify it, and unpack the converter."""
    if version not in SHA256:
        raise UserError(f"llama-cpp-python {version}: known are {', '.join(SHA256)}")
    file = f"llama_cpp_python-{version}.tar.gz"
    release = Package("llama-cpp-python", version, file, SHA256[version], SIZE)
    archive = download_package(release, downloads)
    with program.staged(output) as partial:
        unpack(archive, f"llama_cpp_python-{version}/vendor/llama.cpp/", partial)
    program.logger.info("converter of llama-cpp-python %s in %s", version, output)


def unpack(archive: Path, prefix: str, target: Path) -> None:
    """Unpack the files of WANTED below `prefix`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(prefix)
            if member.isfile() and member.name != name and name.startswith(WANTED):
                member.name = name
                tar.extract(member, target, filter="data")


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
