"""Which of the programs a device's processor can run."""

import re

from pockettune.common.errors import UserError

# What /proc/cpuinfo must name for it, the fastest first. asimdhp are the half floats that ggml takes where
# it is compiled with dot products.
NEEDED = {
    "i8mm": {"asimdhp", "asimddp", "i8mm"},
    "dotprod": {"asimdhp", "asimddp"},
    "armv8-a": set[str](),
}


def choose_program(machine: str, cpuinfo: str) -> str:
    """Return i8mm, dotprod or armv8-a, by `uname -m` and /proc/cpuinfo.

    A program does not refuse a processor that is too old, it dies; and a phone's cores differ, so
    only what all of them have counts. UserError where the system is not one of 64 bits on ARM.
    """
    if machine.strip() not in ("aarch64", "arm64"):
        raise UserError(
            f"the device says it is {machine.strip() or 'nothing'}, the programs are for aarch64: a"
            " 64-bit system on ARM is needed"
        )
    cores = [set(line.split()) for line in re.findall(r"^Features\s*:(.*)$", cpuinfo, re.MULTILINE)]
    common = set.intersection(*cores) if cores else set()
    return next(name for name, needed in NEEDED.items() if needed <= common)
