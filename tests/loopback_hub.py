"""A hub on the loopback address that answers as Hugging Face and ModelScope do."""

import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "7ae557604adf67be50417f59c2c2f167def9a775"


class LoopbackHub(ThreadingHTTPServer):
    """Serves the files of one folder as the repository `name`, whatever kind is asked for."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.name = folder, name
        self.revisions = {COMMIT, "main", "master"}
        self.damage: set[str] = set()  # files of which a byte is flipped on the way
        # Bytes after which the next transfers of a file are cut, or stall; None lets one through.
        self.cuts: dict[str, list[int | None]] = {}
        self.stalls: dict[str, list[int | None]] = {}
        self.elsewhere: str | None = None  # address that requests are sent on to,
        self.redirected = r"/resolve/|FilePath"  # those that match
        self.requests: list[str] = []
        self.headers: list[str] = []  # of each request, whole
        self.ranges: list[str] = []  # the file and what was asked of it
        self.over = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def entry(self, protocol: str) -> str:
        """Return this hub as an entry of hub.sources."""
        return self.address if protocol == "huggingface" else f"modelscope:{self.address}"

    def handle_error(self, *_: Any) -> None:
        pass  # a client that goes away is what some tests are about

    def content(self, file: str) -> bytes:
        content = (self.folder / file).read_bytes()
        if file in self.damage:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return content

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    server: LoopbackHub

    def do_GET(self) -> None:
        self.answer(send_body=True)

    def do_HEAD(self) -> None:
        self.answer(send_body=False)

    def answer(self, send_body: bool) -> None:
        hub = self.server
        hub.requests.append(f"{self.command} {self.path}")
        hub.headers.append(f"{self.path}\n{self.headers}")
        url = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(url.path), urllib.parse.parse_qs(url.query)
        name = re.escape(hub.name)
        asked = re.search(r"/(?:revision|resolve|tree)/([^/]+)", path)
        revision = query.get("Revision", [asked[1] if asked else "main"])[0]
        if revision not in hub.revisions:
            self.send_error(404)
        elif hub.elsewhere and re.search(hub.redirected, self.path):
            self.send_response(302)
            self.send_header("Location", hub.elsewhere + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif re.fullmatch(rf"/api/(models|datasets)/{name}(/revision/[^/]+)?", path):
            self.send_json(self.huggingface_info(), send_body)
        elif re.fullmatch(rf"/api/(models|datasets)/{name}/tree/[^/]+", path):
            self.send_json(self.huggingface_tree(), send_body)
        elif match := re.fullmatch(rf"/(?:datasets/)?{name}/resolve/[^/]+/(.+)", path):
            self.send_file(match[1], send_body)
        elif re.fullmatch(rf"/api/v1/(models|datasets)/{name}/(repo/files|repo/tree)", path):
            self.send_json(
                {"Code": 200, "Success": True, "Data": self.modelscope_files()}, send_body
            )
        elif re.fullmatch(rf"/api/v1/(models|datasets)/{name}/repo", path) and "FilePath" in query:
            self.send_file(query["FilePath"][0], send_body)
        elif re.fullmatch(rf"/api/v1/(models|datasets)/{name}(/revisions)?", path):
            self.send_json(
                {"Code": 200, "Success": True, "Data": self.modelscope_info()}, send_body
            )
        else:
            self.send_error(404)

    def huggingface_info(self) -> dict[str, Any]:
        siblings = []
        for path in self.server.files():
            content = path.read_bytes()
            entry: dict[str, Any] = {
                "rfilename": path.relative_to(self.server.folder).as_posix(),
                "size": len(content),
                "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
            }
            if path.suffix in (".safetensors", ".parquet"):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {"id": self.server.name, "sha": COMMIT, "siblings": siblings}

    def huggingface_tree(self) -> list[dict[str, Any]]:
        entries = []
        for sibling in self.huggingface_info()["siblings"]:
            entry = {"type": "file", "path": sibling["rfilename"], "size": sibling["size"],
                     "oid": sibling["blobId"]}  # fmt: skip
            if lfs := sibling.get("lfs"):
                entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 134}
            entries.append(entry)
        return entries

    def modelscope_files(self) -> dict[str, Any]:
        return {
            "Files": [
                {
                    "Name": path.name,
                    "Path": path.relative_to(self.server.folder).as_posix(),
                    "Type": "blob",
                    "Size": path.stat().st_size,
                    "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                    "Revision": COMMIT,
                    "CommittedDate": 1700000000,
                }
                for path in self.server.files()
            ]
        }

    def modelscope_info(self) -> dict[str, Any]:
        branch = {"Revision": "master", "CreatedAt": 1700000000}
        return {
            "RevisionMap": {"Branches": [branch], "Tags": []},
            "Id": 1,
            "Name": self.server.name,
        }

    def send_json(self, content: Any, send_body: bool) -> None:
        self.send_bytes(json.dumps(content).encode(), "application/json", send_body)

    def send_file(self, file: str, send_body: bool) -> None:
        if not (self.server.folder / file).is_file():
            self.send_error(404)
            return
        self.send_bytes(self.server.content(file), "application/octet-stream", send_body, file)

    def send_bytes(self, content: bytes, kind: str, send_body: bool, file: str = "") -> None:
        start = 0
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if file:
            original = (self.server.folder / file).read_bytes()
            self.send_header("ETag", f'"{hashlib.sha256(original).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if send_body and file:
            self.server.ranges.append(f"{file} from {start}")
            self.send_body(file, content[start:])
        elif send_body:
            self.wfile.write(content)

    def send_body(self, file: str, content: bytes) -> None:
        hub = self.server
        for plan, stalls in ((hub.cuts, False), (hub.stalls, True)):
            if plan.get(file) and (limit := plan[file].pop(0)) is not None:
                self.wfile.write(content[:limit])
                self.wfile.flush()
                if stalls:
                    hub.over.wait(60)
                return
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path, name: str) -> Iterator[LoopbackHub]:
    """Serve `folder` as the repository `name` while the block runs."""
    hub = LoopbackHub(folder, name)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.over.set()
        hub.shutdown()
        hub.server_close()
        thread.join()
