"""A hub and a mirror of releases on this machine, as far as this project asks them for anything: models, files, parts of files."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BLOCK = 1 << 16


@dataclass
class Site:
    """Files below `folder`: hub/OWNER/NAME/... are repositories of the hub, releases/HOST/PATH are releases.

    `asked` is what was asked for, with the range. A file whose path holds `stall` is sent by half, and then nothing more of it.
    """

    folder: Path
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    stall: str | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def file(self, path: str) -> Path | None:
        """The file that an address names; None where there is none."""
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository, _, name = found.groups()
            place = self.folder / "hub" / repository / name
        else:
            place = self.folder / path.removeprefix("/")
        return place if place.is_file() else None

    def model(self, repository: str) -> dict[str, object] | None:
        """What the hub's API says of a model."""
        if (tree := self.tree(repository)) is None:
            return None
        return {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": file["path"]} for file in tree], "tags": []}

    def tree(self, repository: str) -> list[dict[str, object]] | None:
        """What it says of a model's files."""
        place = self.folder / "hub" / repository
        if not place.is_dir():
            return None
        files = sorted(path for path in place.rglob("*") if path.is_file())
        return [
            {"type": "file", "path": str(file.relative_to(place)), "size": file.stat().st_size, "oid": etag(file)}
            for file in files
        ]


class Answers(BaseHTTPRequestHandler):
    site: Site
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path, span = self.path.partition("?")[0], self.headers.get("Range")
        self.site.asked.append((self.command, path, span))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/tree/[^/]+|/revision/[^/]+)?", path):
            about = self.site.tree(found[1]) if (found[2] or "").startswith("/tree") else self.site.model(found[1])
            self.say(404 if about is None else 200, json.dumps(about).encode())
            return
        file = self.site.file(path)
        if file is None:
            self.say(404, b"no such file")
            return
        size, start = file.stat().st_size, int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
        if start >= size > 0:
            self.say(416, b"")
            return
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        if "/resolve/" in path:
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{etag(file)}"')
        self.end_headers()
        if body:
            self.send_file(file, start, size)

    def send_file(self, file: Path, start: int, size: int) -> None:
        stop = size // 2 if self.site.stall and self.site.stall in self.path else size
        try:
            with file.open("rb") as opened:
                opened.seek(start)
                while (left := stop - opened.tell()) > 0:
                    self.wfile.write(opened.read(min(BLOCK, left)))
            self.wfile.flush()
            if stop < size:
                self.site.stalled.set()
                self.rfile.read(1)  # until the other side is gone
                self.close_connection = True
        except OSError:
            self.close_connection = True

    def say(self, code: int, text: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


def etag(file: Path) -> str:
    """As the hub: SHA-256 of weights, git's digest of small files."""
    data = file.read_bytes()
    if file.suffix in {".safetensors", ".bin", ".pth", ".pt"}:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving(folder: Path) -> Iterator[Site]:
    """The site of a folder, at `url`."""
    site = Site(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisSite", (Answers,), {"site": site}))
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
