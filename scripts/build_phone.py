"""Compile scripts/pockettune/phone/score.cpp for 64-bit ARM: Android phones and boards under Linux.

The compiler is zig's, a Python package; the source is llama.cpp's in llama-cpp-python's source
release, the same commit that scored the files. Nothing of either is installed.

Input   both packages, through pip (its mirror settings and cache apply)
Output  a folder with score-armv8-a, score-dotprod and score-i8mm, which need nothing of the device
        but its kernel, and llama.cpp's licence
"""

import argparse
import platform
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.phone.compiling import compile_programs
from pockettune.sources.llama_cpp import source_release, unpack
from pockettune.sources.packages import Package, download_package

ZIG = "0.17.1"
# By sys.platform and platform.machine(): the wheel's tag, its SHA-256, its bytes.
WHEELS = {
    ("linux", "x86_64"): (
        "manylinux_2_12_x86_64.manylinux2010_x86_64.musllinux_1_1_x86_64",
        "ea6cc5d87b033cf0aedfbc8f9549a908cae6c50ac31f1698188fa48a74524b54", 101_083_562),
    ("linux", "aarch64"): (
        "manylinux_2_17_aarch64.manylinux2014_aarch64.musllinux_1_1_aarch64",
        "b7c5f02fccd40f89b999ee16a1f5ddced56e6182370f8affe494bcf8a28cf07e", 98_063_064),
    ("darwin", "arm64"): (
        "macosx_13_0_arm64",
        "09953b6af7f64168b915180a42774f520f92d86ef6331b28e33915c7e1f0bb23", 100_390_379),
    ("win32", "AMD64"): (
        "win_amd64",
        "69c3dfc3aff6a297ec4017aa904782c0e450eb988982d7f675d83edce27526fb", 101_924_940),
}  # fmt: skip
UNPACKED = 1_000_000_000  # bytes of the compiler, the source, its library's and our objects

SOURCE = ("LICENSE", "include/", "src/", "ggml/include/", "ggml/src/")
FOLDER = Path(__file__).parent / "pockettune" / "phone"


def build_phone(version: str, downloads: Path, threads: int, output: Path) -> None:
    """Fetch compiler and source, and write the three programs and the licence into `output`."""
    wheel = download_package(zig_package(), downloads)
    release = download_package(source_release(version), downloads)
    with (
        program.staged(output, UNPACKED) as partial,
        tempfile.TemporaryDirectory(prefix=".phone-", dir=output.parent) as name,
    ):
        work = Path(name).resolve()
        partial.mkdir()
        zig = unpack_zig(wheel, work)
        prefix = f"llama_cpp_python-{version}/vendor/llama.cpp/"
        unpack(release, prefix, work / "llama.cpp", SOURCE)
        compile_programs(
            zig, work / "llama.cpp", FOLDER / "score.cpp", work, partial, threads, version
        )
        shutil.copyfile(work / "llama.cpp" / "LICENSE", partial / "LICENSE.llama.cpp")
    program.logger.info("programs for armv8-a, dotprod and i8mm in %s", output)


def zig_package() -> Package:
    """Return this machine's wheel. UserError where none was looked at."""
    machine = (sys.platform, platform.machine())
    if machine not in WHEELS:
        known = ", ".join(" ".join(pair) for pair in WHEELS)
        raise UserError(
            f"no compiler for {' '.join(machine)} is pinned, only for {known}: build on one of those"
            " and copy resources/phone"
        )
    tag, checksum, size = WHEELS[machine]
    return Package("ziglang", ZIG, f"ziglang-{ZIG}-py3-none-{tag}.whl", checksum, size)


def unpack_zig(wheel: Path, target: Path) -> Path:
    """Unpack the compiler and return its program."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target, [n for n in archive.namelist() if n.startswith("ziglang/")])
    zig = target / "ziglang" / ("zig.exe" if sys.platform == "win32" else "zig")
    zig.chmod(0o755)  # zipfile does not keep modes
    return zig


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--version", required=True, help="of llama-cpp-python")
    parser.add_argument("--downloads", type=Path, required=True, help="folder for the packages")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to make")

    def work(arguments: argparse.Namespace) -> None:
        build_phone(arguments.version, arguments.downloads, arguments.threads, arguments.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
