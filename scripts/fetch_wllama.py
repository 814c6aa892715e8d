"""Take llama.cpp for browsers out of an npm package: wllama, compiled to WebAssembly.

Version 2.4.0 and not 3: that has tokenize() and the probability of any token by its id, which 3 has not, so
that the page asks and scores as the file was scored; one build for all browsers, where 3 needs a second one,
of 19 MB, for those without Memory64 and JSPI (Safari); and it is a quarter of the size.

Input   the package's archive, through npm (its registry and cache apply)
Output  a folder with wllama.js, wllama.wasm, wllama-threads.wasm and the MIT licence
"""

import argparse
import tarfile
from pathlib import Path

from pockettune.common import program
from pockettune.sources.packages import Package, download_npm_package

PACKAGE = Package(
    "@wllama/wllama", "2.4.0", "wllama-wllama-2.4.0.tgz",
    sha256="0b4f91b2105e4ee36eb53e0647328a98575f7c87ccdc1317bebb4c13e6db7544", size=3_953_638,
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
