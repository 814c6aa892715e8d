"""A phone through adb, or a board through ssh: run a command there, put a file there.

Both are driven by their own client programs, which know keys, sockets and pairing; nothing of the
device's system is changed but one folder.
"""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pockettune.common.checksums import sha256
from pockettune.common.errors import UserError
from pockettune.common.program import logger

HOW_TO = """no device is to be seen. For an Android phone:
  1. install adb ("platform tools"; Debian: apt install adb), and on the phone open Settings > About
     and tap the build number seven times, then switch on USB debugging under Developer options
  2. plug the phone in, answer its question with Allow, and see it in: adb devices
  3. make phone
For a Raspberry Pi or another 64-bit ARM board that ssh reaches without a password: make phone HOST=user@host"""

ANSWER_SECONDS = 60  # for a command that computes nothing
# No question asked, and a board that lost its power is not waited for.
SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")
SIGILL = 132  # how a shell tells of an instruction that the processor has not


@dataclass(frozen=True)
class Device:
    """How a command is sent to a device, and the folder that is ours there."""

    name: str  # the serial number, or user@host
    client: tuple[str, ...]  # what goes before a shell command
    folder: str

    def run(self, command: str, seconds: float | None = ANSWER_SECONDS) -> str:
        """Return what the command printed. UserError where it fails or the device went away."""
        name = command.rpartition("&& ")[2].split()[0]
        return self._run([*self.client, command], name, seconds, None)

    def put(self, source: Path, name: str) -> str:
        """Copy a file into the folder, unless the same is there; it is there whole or not at all.

        Returns its SHA-256.
        """
        target, expected = f"{self.folder}/{name}", sha256(source)
        if self._checksum(target) == expected:
            logger.info("%s is there already", name)
            return expected
        logger.info("sending %s (%.1f MB)", name, source.stat().st_size / 1e6)
        self._send(source, f"{target}.partial")
        if self._checksum(f"{target}.partial") != expected:
            raise UserError(
                f"{name} did not arrive at {self.name} whole: is its storage full? {self.run('df -h ' + self.folder + ' | tail -n 1').strip()}"
            )
        self.run(f"mv {target}.partial {target}")
        return expected

    def _checksum(self, path: str) -> str:
        return self.run(f"sha256sum {path} 2>/dev/null || true").partition(" ")[0]

    def _send(self, source: Path, target: str) -> None:
        if self.client[0] == "adb":
            push = [*self.client[:-1], "push", str(source), target]
            self._run(push, f"sending {source.name}", None, None)
        else:
            self._run([*self.client, f"cat > {target}"], f"sending {source.name}", None, source)

    def _run(
        self, command: Sequence[str], what: str, seconds: float | None, source: Path | None
    ) -> str:
        with (source or Path("/dev/null")).open("rb") as content:
            try:
                result = subprocess.run(
                    command, stdin=content, capture_output=True, timeout=seconds
                )
            except subprocess.TimeoutExpired as error:
                raise UserError(
                    f"{self.name} gave no answer to {what} in {seconds:.0f} s: unlock it, connect it"
                    " again, and run again"
                ) from error
        if result.returncode == SIGILL:
            raise UserError(
                f"{self.name}: the processor has not what /proc/cpuinfo says of it: Illegal instruction"
            )
        if result.returncode:
            said = _reason(result)
            raise UserError(
                f"{self.name}: {what} failed ({said}); connect it again, see that it is awake and"
                " has room, and run again"
            )
        return result.stdout.decode("utf-8", "replace")


def _reason(result: subprocess.CompletedProcess[bytes]) -> str:
    """Return why a client failed: adb push tells it on stdout, with a count of files below."""
    errors, output = (
        [line.strip() for line in stream.decode("utf-8", "replace").splitlines() if line.strip()]
        for stream in (result.stderr, result.stdout)
    )
    told = (line for line in [*errors, *output] if line.startswith(("adb: error: ", "error: ")))
    return next(told, errors[-1] if errors else f"exit status {result.returncode}")


def find_device(host: str | None, serial: str | None) -> Device:
    """Return the board `host`, or the one phone that adb sees, or that with the serial number.

    UserError, with what to do, where there is none, several, or one that has not allowed it.
    """
    if host:
        if host.startswith("-"):
            raise UserError(f"--host {host}: not user@host")
        board = Device(host, ("ssh", *SSH_OPTIONS, host), ".cache/pockettune")
        board.run("true")
        return board
    states = _adb_devices()
    if serial:
        states = {name: state for name, state in states.items() if name == serial}
    ready = [name for name, state in states.items() if state == "device"]
    if len(ready) > 1:
        raise UserError(
            f"{len(ready)} devices are connected ({', '.join(ready)}): name one, make phone SERIAL={ready[0]}"
        )
    if not ready and states:
        name, state = next(iter(states.items()))
        raise UserError(
            f"{name} is {state}: unlock the phone and answer its question about USB debugging with Allow"
        )
    if not ready:
        raise UserError(HOW_TO)
    return Device(ready[0], ("adb", "-s", ready[0], "shell"), "/data/local/tmp/pockettune")


def _adb_devices() -> dict[str, str]:
    """Return the state of each serial number: device, unauthorized, offline. None without adb."""
    try:
        result = subprocess.run(
            ["adb", "devices"], capture_output=True, text=True, timeout=ANSWER_SECONDS
        )
    except FileNotFoundError:
        return {}
    except subprocess.TimeoutExpired as error:
        raise UserError("adb gave no answer: adb kill-server, and run again") from error
    if result.returncode:
        raise UserError(
            f"adb devices failed: {result.stderr.strip().splitlines()[-1:] or ''}: adb kill-server, and run again"
        )
    lines = [line.split("\t") for line in result.stdout.splitlines() if "\t" in line]
    return {name: state.strip() for name, state in lines}
