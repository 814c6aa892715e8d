"""llama.cpp's own source, out of the source release of llama-cpp-python: the commit that scores the files."""

import tarfile
from pathlib import Path

from pockettune.common.errors import UserError
from pockettune.sources.packages import Package

# Of the source releases that were looked at; another version needs its own line.
SHA256 = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}

SIZE = 76_000_000  # bytes of a source release, a little less


def source_release(version: str) -> Package:
    """Return the package to download. UserError for a version that was not looked at."""
    if version not in SHA256:
        raise UserError(f"llama-cpp-python {version}: known are {', '.join(SHA256)}")
    file = f"llama_cpp_python-{version}.tar.gz"
    return Package("llama-cpp-python", version, file, SHA256[version], SIZE)


def unpack(archive: Path, prefix: str, target: Path, wanted: tuple[str, ...]) -> None:
    """Unpack the files below `prefix` whose path there starts with one of `wanted`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix(prefix)
            if member.isfile() and member.name != name and name.startswith(wanted):
                member.name = name
                tar.extract(member, target, filter="data")
