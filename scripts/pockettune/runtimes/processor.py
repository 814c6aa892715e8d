"""Compares the processor with the one that llama.cpp was compiled for."""

import ctypes
import platform
import re
from pathlib import Path

import llama_cpp

from pockettune.common.errors import UserError

# What the library may have been compiled for, and the processor's name for it in /proc/cpuinfo.
INSTRUCTIONS = {"avx": "avx", "avx2": "avx2", "f16c": "f16c", "fma": "fma", "bmi2": "bmi2", "avx_vnni": "avx_vnni",
                "avx512": "avx512f", "avx512_vbmi": "avx512vbmi", "avx512_vnni": "avx512_vnni",
                "avx512_bf16": "avx512_bf16", "amx_int8": "amx_int8"}  # fmt: skip
CPUINFO = Path("/proc/cpuinfo")


def check_processor() -> None:
    """Raise UserError where llama.cpp was compiled for another processor than this one.

    It would die of an illegal instruction at its first call: llama.cpp is built for the machine it
    is built on, and a compute node may be older than the login node. Only on Linux on x86, where the
    system tells what the processor has; the functions asked are those that hold no such instruction.
    """
    libraries = sorted(Path(llama_cpp.__file__).parent.glob("lib/libggml-cpu.so*"))
    cpuinfo = CPUINFO.read_text(encoding="utf-8") if CPUINFO.exists() else ""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    if not libraries or flags is None:
        return
    library = ctypes.CDLL(str(libraries[0]))
    missing = [
        flag
        for name, flag in INSTRUCTIONS.items()
        if getattr(library, f"ggml_cpu_has_{name}")() and flag not in flags[1].split()
    ]
    if missing:
        raise UserError(
            f"llama.cpp was built on a machine whose processor has {', '.join(missing)}; this one,"
            f" {platform.node()}, has not, and would stop at an illegal instruction. Build it for both:"
            " CMAKE_ARGS=-DGGML_NATIVE=OFF, see docs/cluster.md"
        )
