"""llama.cpp and a program of ours for 64-bit ARM, compiled on any machine by zig's clang.

One command a source file, no CMake. Only ggml's kernels know the processor: the rest is compiled
once, for ARMv8-A, and the programs differ in the kernels alone. They are linked with musl and
without any shared library, so that the same file starts under Android and on a Raspberry Pi.
"""

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pockettune.common import program
from pockettune.common.errors import UserError

# clang's names of what /proc/cpuinfo calls asimddp and i8mm; the first runs on every 64-bit ARM.
# ggml chooses its kernels when it is compiled: a CMake build without -march has none of them.
PROCESSORS = {
    "armv8-a": "generic",
    "dotprod": "generic+v8_2a+fullfp16+dotprod",
    "i8mm": "generic+v8_2a+fullfp16+dotprod+i8mm",
}

FLAGS = ["-target", "aarch64-linux-musl", "-DNDEBUG", "-fno-sanitize=undefined", "-w",
         "-D_GNU_SOURCE", "-D_XOPEN_SOURCE=600", "-DGGML_SCHED_MAX_COPIES=4", "-DGGML_USE_CPU"]  # fmt: skip
INCLUDE = ["include", "ggml/include", "ggml/src", "ggml/src/ggml-cpu", "src", "src/models"]
# What only sets the kernels to work need not be fast, and compiles in half the time so.
CORE_FLAGS = ["-O1"]
KERNEL_FLAGS = ["-O3", "-DGGML_USE_CPU_REPACK"]
CORE = ["ggml/src/*.c", "ggml/src/*.cpp", "src/*.cpp"]
KERNELS = ["ggml/src/ggml-cpu/*.c", "ggml/src/ggml-cpu/*.cpp", "ggml/src/ggml-cpu/amx/*.cpp",
           "ggml/src/ggml-cpu/tiled/*.cpp", "ggml/src/ggml-cpu/arch/arm/quants.c",
           "ggml/src/ggml-cpu/arch/arm/repack.cpp"]  # fmt: skip
MODELS_A_FILE = 16  # as llama.cpp's own CMake joins them


@dataclass(frozen=True)
class Unit:
    """A source file and what it is compiled to."""

    source: Path
    object: Path
    flags: tuple[str, ...]


def compile_programs(
    zig: Path, source: Path, score: Path, work: Path, output: Path, threads: int, version: str
) -> None:
    """Write the programs score-armv8-a, score-dotprod and score-i8mm into `output`.

    `source` is llama.cpp's folder, `score` the C++ file with `main`, `work` a folder for what is
    in between. Raises UserError with the compiler's first error.
    """
    write_version(source, version)
    files = [*_core_files(source, work), score]
    core = [_unit(path, work / "core", "generic", *CORE_FLAGS) for path in files]
    kernels = {
        name: [_unit(path, work / name, cpu, *KERNEL_FLAGS) for path in _glob(source, KERNELS)]
        for name, cpu in PROCESSORS.items()
    }
    units = [*core, *(unit for group in kernels.values() for unit in group)]
    _compile(zig, source, units, work, threads)
    for name, group in kernels.items():
        objects = [str(unit.object) for unit in [*core, *group]]
        target = str(output / f"score-{name}")
        _run(zig, ["c++", *FLAGS, "-static", "-s", *objects, "-o", target], work)


def write_version(source: Path, version: str) -> None:
    """Write the headers that CMake would: the release of llama-cpp-python stands for both."""
    for path, name in (("ggml/src/ggml-version.h", "GGML"), ("src/llama-version.h", "LLAMA")):
        (source / path).write_text(
            f'#define {name}_VERSION "{version}"\n#define {name}_COMMIT "{version}"\n', "utf-8"
        )


def _glob(source: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(source.glob(pattern))]


def _core_files(source: Path, work: Path) -> list[Path]:
    """Return what is not a kernel: the model architectures joined, since each costs its headers."""
    models = sorted(source.glob("src/models/*.cpp"))
    joined = []
    work.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(models), MODELS_A_FILE):
        path = work / f"models-{start}.cpp"
        lines = [f'#include "{model}"\n' for model in models[start : start + MODELS_A_FILE]]
        path.write_text("".join(lines), encoding="utf-8")
        joined.append(path)
    return [*joined, *_glob(source, CORE)]  # the longest first


def _unit(source: Path, folder: Path, cpu: str, *flags: str) -> Unit:
    # ggml-cpu.c and ggml-cpu.cpp, arch/arm/quants.c and quants.c: the name alone does not tell.
    name = f"{source.parent.name}-{source.name}.o"
    return Unit(source, folder / name, (f"-mcpu={cpu}", *flags))


def _compile(zig: Path, source: Path, units: Sequence[Unit], work: Path, threads: int) -> None:
    include = [f"-I{source / folder}" for folder in INCLUDE]

    def build(unit: Unit) -> None:
        unit.object.parent.mkdir(parents=True, exist_ok=True)
        language = ["cc", "-std=c11"] if unit.source.suffix == ".c" else ["c++", "-std=c++17"]
        files = ["-c", str(unit.source), "-o", str(unit.object)]
        _run(zig, [*language, *FLAGS, *unit.flags, *include, *files], work)

    with ThreadPoolExecutor(threads) as pool:
        done = pool.map(build, units)
        list(program.progress(done, description="compiled", unit="files", total=len(units)))


def _run(zig: Path, arguments: Sequence[str], work: Path) -> None:
    caches = {"ZIG_GLOBAL_CACHE_DIR": str(work / "zig"), "ZIG_LOCAL_CACHE_DIR": str(work / "zig")}
    result = subprocess.run(
        [str(zig), *arguments], capture_output=True, text=True, env={**os.environ, **caches}
    )
    if result.returncode:
        program.logger.info(result.stderr)
        lines = result.stderr.splitlines() or ["no word of why"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise UserError(f"zig could not compile {Path(arguments[-3]).name}: {first}; see the log")
