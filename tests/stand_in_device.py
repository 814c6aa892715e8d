#!/usr/bin/env python3
"""Stands in for `adb` or `ssh`, by the name it is called by: a folder of this machine is the device.

DEVICE is the folder; CPUINFO and MACHINE what it says of itself; STATE adb's word for it (none: not
there); FAULT: lost (at the first send), lost-running, cut (half of a file arrives), full, silent.
What it was called with is appended to DEVICE/calls.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

DEVICE, FAULT = Path(os.environ["DEVICE"]), os.environ.get("FAULT", "")
PLACE = "/data/local/tmp"


def lose() -> None:
    print("error: device 'R58N' not found", file=sys.stderr)
    sys.exit(1)


def receive(content: bytes, target: Path) -> None:
    if FAULT == "lost":
        lose()
    if FAULT == "full":
        print("cannot write: No space left on device", file=sys.stderr)
        sys.exit(1)
    target.write_bytes(content[: len(content) // 2] if FAULT == "cut" else content)


def shell(command: str) -> int:
    if FAULT == "silent":
        time.sleep(60)
    told = {"uname -m": os.environ.get("MACHINE", "aarch64"), "cat /proc/cpuinfo": os.environ["CPUINFO"],
            "getprop ro.product.model": "Pixel 6"}  # fmt: skip
    if command in told:
        print(told[command])
        return 0
    if FAULT == "lost-running" and "./score" in command:
        print('{"rows": [')
        lose()
    command = command.replace(PLACE, str(DEVICE))
    code = subprocess.run(["bash", "-c", command], cwd=DEVICE).returncode
    if code < 0:  # of a signal, sshd tells ssh no number, adbd a shell's
        return 255 if Path(sys.argv[0]).name == "ssh" else 128 - code
    return code


def main() -> int:
    words = sys.argv[1:]
    with (DEVICE / "calls").open("a") as calls:
        calls.write(" ".join(words) + "\n")
    if Path(sys.argv[0]).name == "ssh":
        command = words[-1]
        if command.startswith("cat > "):
            receive(sys.stdin.buffer.read(), DEVICE / command.removeprefix("cat > "))
            return 0
        return shell(command)
    if words == ["devices"]:
        states = os.environ.get("STATE", "device").split()
        lines = [f"R58N{n or ''}\t{state}" for n, state in enumerate(states) if state != "none"]
        print("List of devices attached", *lines, sep="\n")
        return 0
    assert words[0] == "-s", words
    if words[2] == "push":
        receive(Path(words[3]).read_bytes(), Path(words[4].replace(PLACE, str(DEVICE))))
        return 0
    return shell(words[3])


sys.exit(main())
