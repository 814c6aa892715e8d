"""Serve the app's folder on the local network and print its address, also as a QR code for a phone.

Answers with ranges, so that a download goes on where it was cut, and with the headers by which a browser
lets the page compute with several threads (COOP, COEP) and forbids it every other host (CSP).

Input   the folder app/ in a run's results
Output  nothing; serves until Ctrl-C
"""

import argparse
import ipaddress
import os
import re
import socket
import sys
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.machine.run import Run, load_config

ROOT = Path(__file__).parent.parent

RANGE = re.compile(r"bytes=(\d+)-(\d*)$")
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the rest stands in index.html
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
TYPES = {
    ".js": "text/javascript", ".wasm": "application/wasm", ".webmanifest": "application/manifest+json",
    ".json": "application/json", ".jsonl": "application/jsonl", ".svg": "image/svg+xml",
}  # fmt: skip


class AppHandler(SimpleHTTPRequestHandler):
    """Serves the files of one folder, no listings, one range a request."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | TYPES
    protocol_version = "HTTP/1.1"
    left: int | None = None  # bytes still to send of a range

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: Any) -> None:
        self.send_error(HTTPStatus.NOT_FOUND)

    def send_head(self) -> Any:
        """Answer a range of a file with 206; everything else as SimpleHTTPRequestHandler does."""
        self.left = None
        path = Path(self.translate_path(self.path))
        wanted = RANGE.match(self.headers.get("Range", ""))
        if wanted is None or not path.is_file():
            return super().send_head()
        size, first = path.stat().st_size, int(wanted[1])
        last = min(int(wanted[2] or size - 1), size - 1)
        if first > last:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        file = path.open("rb")
        file.seek(first)
        self.left = last - first + 1
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(self.left))
        self.end_headers()
        return file

    def copyfile(self, source: IO[bytes], outputfile: Any) -> None:  # type: ignore[override]
        if self.left is None:
            super().copyfile(source, outputfile)
            return
        while self.left and (block := source.read(min(self.left, 1 << 16))):
            outputfile.write(block)
            self.left -= len(block)

    def log_message(self, form: str, *values: Any) -> None:
        """Say nothing of each request."""


class AppServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A phone that went away is no error of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def open_server(folder: Path, port: int, host: str = "") -> AppServer:
    """Return a server of the folder; UserError where it is no app's, or the port is taken."""
    if not (folder / "app.json").is_file():
        raise UserError(f"{folder} is no app's folder; make it: snakemake --cores all -- app")
    try:
        return AppServer((host, port), partial(AppHandler, directory=os.fspath(folder)))
    except OSError as error:
        raise UserError(f"port {port}: {error.strerror}; take another with --port") from error


def local_address() -> str | None:
    """Return this machine's address on the local network, if it has one. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation (RFC 5737)
        except OSError:
            return None
        address = str(probe.getsockname()[0])
    return None if ipaddress.ip_address(address).is_loopback else address


def print_addresses(port: int) -> None:
    """Print where the app is, for this machine and for a phone."""
    print(f"On this computer:     http://localhost:{port}/")
    if address := local_address():
        url = f"http://{address}:{port}/"
        print(f"On the same network:  {url}\n")
        print_qr(url)
    else:
        print("This computer is on no network that a phone could reach.")
    print(
        "\nA browser keeps the page for use without a network only at localhost or an https address: put the"
        f"\nfolder on any https server, or, Android on a cable: adb reverse tcp:{port} tcp:{port}, then"
        f"\nhttp://localhost:{port}/ on the phone. Ctrl-C ends.",
        flush=True,
    )


def print_qr(url: str) -> None:
    """Print an address for a phone's camera."""
    import segno

    segno.make(url, error="m").terminal(compact=True)


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--configfile", type=Path, help="run file; without one, config.yaml's run")
    parser.add_argument("--port", type=int, default=8017)

    def work(arguments: argparse.Namespace) -> None:
        files = [arguments.configfile] if arguments.configfile else []
        folder = Run(ROOT, load_config(ROOT, files)).results / "app"
        with open_server(folder, arguments.port) as server:
            print_addresses(arguments.port)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()

    program.run(parser, work)


if __name__ == "__main__":
    main()
