"""Stands in for a phone's adbd, for the real adb: its transport, shell and sync protocols over TCP.

As AOSP's packages/modules/adb describes them in protocol.txt, SYNC.TXT and shell_protocol.h. What the
phone's shell does is stand_in_device.py's; FAULT is read from the environment as there, and then the
connection itself is cut (lost, lost-running), the file refused (full) or the key never accepted (unauthorized).
"""

import os
import queue
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PLACE = "/data/local/tmp"
VERSION, LARGEST = 0x01000001, 1 << 18  # without checksums; bytes of a message
BANNER = b"device::ro.product.name=stand_in;ro.product.model=Pixel 6;ro.product.device=stand_in;features=shell_v2,cmd"
TOKEN, STDOUT, STDERR, EXIT = 1, 1, 2, 3


def fault() -> str:
    return os.environ.get("FAULT", "")


class UnpluggedError(Exception):
    """The phone was unplugged."""


class Link:
    """A connection of an adb server, which carries streams."""

    def __init__(self, connection: socket.socket, device: Path) -> None:
        self.connection, self.device = connection, device
        self.streams: dict[int, Stream] = {}
        self.sending = threading.Lock()

    def send(self, command: bytes, first: int, second: int, content: bytes = b"") -> None:
        magic = struct.unpack("<I", command)[0] ^ 0xFFFFFFFF
        head = struct.pack("<4sIIIII", command, first, second, len(content), 0, magic)
        with self.sending:
            self.connection.sendall(head + content)

    def serve(self) -> None:
        """Answer messages until one side has gone."""
        with suppress(OSError), self.connection, self.connection.makefile("rb") as incoming:
            while len(head := incoming.read(24)) == 24:
                command, first, second, size, _, _ = struct.unpack("<4sIIIII", head)
                self.answer(command, first, second, incoming.read(size))

    def answer(self, command: bytes, first: int, second: int, content: bytes) -> None:
        if command in (b"CNXN", b"AUTH"):
            if fault() == "unauthorized":
                self.send(b"AUTH", TOKEN, 0, bytes(20))
            else:
                self.send(b"CNXN", VERSION, LARGEST, BANNER)
        elif command == b"OPEN":
            own = len(self.streams) + 1
            self.streams[own] = Stream(self, own, first, content.rstrip(b"\0").decode())
        elif command == b"WRTE":
            self.send(b"OKAY", second, first)
            self.streams[second].incoming.put(content)
        elif command == b"OKAY":
            self.streams[second].may_send.release()

    def cut(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)


class Stream:
    """A service that was asked for, with a thread of its own."""

    def __init__(self, link: Link, own: int, other: int, service: str) -> None:
        self.link, self.own, self.other = link, own, other
        self.incoming: queue.Queue[bytes] = queue.Queue()
        self.may_send, self.rest = threading.Semaphore(1), b""
        link.send(b"OKAY", own, other)
        kind, _, argument = service.partition(":")
        work: Callable[[], None] = self.sync if kind == "sync" else lambda: self.shell(argument)
        threading.Thread(target=self.run, args=(work,), daemon=True).start()

    def run(self, work: Callable[[], None]) -> None:
        try:
            work()
            self.may_send.acquire()
            self.link.send(b"CLSE", self.own, self.other)
        except UnpluggedError:
            self.link.cut()

    def send(self, content: bytes) -> None:
        for start in range(0, len(content), LARGEST):
            self.may_send.acquire()  # one message at a time: the other side says when
            self.link.send(b"WRTE", self.own, self.other, content[start : start + LARGEST])

    def read(self, size: int) -> bytes:
        while len(self.rest) < size:
            self.rest += self.incoming.get()
        content, self.rest = self.rest[:size], self.rest[size:]
        return content

    def shell(self, command: str) -> None:
        """Run a command as the phone would, its output and its exit status each in packets."""
        result = subprocess.run(["ssh", "phone", command], capture_output=True)
        for kind, content in ((STDOUT, result.stdout), (STDERR, result.stderr)):
            if content:
                self.send(struct.pack("<BI", kind, len(content)) + content)
        if fault() == "lost-running" and "./score" in command:
            raise UnpluggedError
        self.send(struct.pack("<BIB", EXIT, 1, result.returncode))

    def sync(self) -> None:
        """Take the files that are pushed."""
        while True:
            request, size = struct.unpack("<4sI", self.read(8))
            if request == b"QUIT":
                return
            path = self.read(size).decode().replace(PLACE, str(self.link.device))
            if request == b"STAT":
                self.send(struct.pack("<4sIII", b"STAT", 0, 0, 0))
            elif request == b"SEND":
                self.receive(Path(path.rpartition(",")[0]))
            else:
                raise AssertionError(request)

    def receive(self, target: Path) -> None:
        with target.open("wb") as file:
            while True:
                part, size = struct.unpack("<4sI", self.read(8))
                if part == b"DONE":
                    break
                file.write(self.read(size))
                if fault() == "lost":
                    raise UnpluggedError
        words = b"No space left on device" if fault() == "full" else b""
        self.send(struct.pack("<4sI", b"FAIL" if words else b"OKAY", len(words)) + words)


@contextmanager
def serve(device: Path) -> Iterator[int]:
    """Listen as the phone whose storage is the folder `device`; the port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed
                    return
                threading.Thread(target=Link(connection, device).serve, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
