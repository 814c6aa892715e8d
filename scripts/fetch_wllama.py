"""Take llama.cpp for browsers out of an npm package: wllama, compiled to WebAssembly.

Version 2.3.7, the last whose one build runs in every browser: from 2.4 on it asks for Memory64, which Safari
has not, and 3 has a second build of 19 MB for such browsers. 3 has neither tokenize() nor the probability of
a token by its id, without which the page could not ask and score as the file was scored.

Input   the package's archive, through npm (its registry and cache apply)
Output  a folder with wllama.js, wllama.wasm, wllama-threads.wasm and the MIT licence
"""

import argparse
import tarfile
from pathlib import Path

from pockettune.common import program
from pockettune.sources.packages import Package, download_npm_package

PACKAGE = Package(
    "@wllama/wllama", "2.3.7", "wllama-wllama-2.3.7.tgz",
    sha256="297109c76215c7457c230527fe8f930aa578897156c06df2da6cf7e393ee0233", size=3_378_743,
)  # fmt: skip

MEMBERS = {
    "package/esm/index.min.js": "wllama.js",
    "package/esm/single-thread/wllama.wasm": "wllama.wasm",
    "package/esm/multi-thread/wllama.wasm": "wllama-threads.wasm",
    "package/LICENCE": "wllama-LICENCE.txt",
}


def fetch_wllama(downloads: Path, output: Path) -> None:
    """Download the archive, verify it, and unpack what a page needs."""
    archive = download_npm_package(PACKAGE, downloads)
    with program.staged(output) as partial, tarfile.open(archive) as tar:
        partial.mkdir()
        for member, name in MEMBERS.items():
            source = tar.extractfile(member)
            assert source, f"{archive} was verified and has {member}"
            (partial / name).write_bytes(source.read())
    program.logger.info("wllama %s in %s", PACKAGE.version, output)


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--downloads", type=Path, required=True, help="folder for the archive")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")

    def work(arguments: argparse.Namespace) -> None:
        fetch_wllama(arguments.downloads, arguments.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
