"""A real HTTP server on loopback: plain files, and as much of the hub's protocol as fetching a repository takes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class FileServer:
    """Serves a folder.

    Attributes:
        folder: what is served. As a hub, `folder/ORG/NAME/REVISION` holds the files of a revision.
        seen: (method, path) of every request.
    """

    folder: Path
    seen: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def downloads(self, name: str) -> int:
        """Return how many times a file of this name was sent."""
        return sum(method == "GET" and path.endswith(f"/{name}") for method, path in self.seen)


def commit_of(revision: Path) -> str:
    """Return the 40 digits that stand for the files of a revision."""
    names = sorted(str(path.relative_to(revision)) for path in revision.rglob("*") if path.is_file())
    return hashlib.sha1(json.dumps([str(revision), names]).encode()).hexdigest()


@contextmanager
def file_server(folder: Path) -> Iterator[FileServer]:
    """Serve `folder` until the block ends: its files under /, and its repositories as the hub does."""
    state = FileServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(has_body=False)

        def do_GET(self) -> None:
            self._answer(has_body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, has_body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            state.seen.append((self.command, f"/{path}"))
            status, headers, body = _found(folder, path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if has_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


Answer = tuple[int, dict[str, str], bytes]


def _found(folder: Path, path: str) -> Answer:
    parts = path.split("/")
    if path.startswith("api/models/"):
        return _api(folder, "/".join(parts[2:4]), parts[4:])
    if len(parts) > 4 and parts[2] == "resolve":
        revision = _revision(folder, "/".join(parts[:2]), parts[3])
        return _file(revision / "/".join(parts[4:]), commit_of(revision)) if revision else _refusal("RevisionNotFound")
    return _file(folder / path, "")


def _api(folder: Path, name: str, rest: list[str]) -> Answer:
    if not (folder / name).is_dir():
        return _refusal("RepoNotFound")
    revision = _revision(folder, name, rest[1] if len(rest) > 1 else "main")
    if revision is None:
        return _refusal("RevisionNotFound")
    files = sorted(path for path in revision.rglob("*") if path.is_file())
    if rest[0] == "tree":
        tree = [
            {"type": "file", "path": str(path.relative_to(revision)), "size": path.stat().st_size, "oid": _digest(path)}
            for path in files
        ]
        return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
    siblings = [{"rfilename": str(path.relative_to(revision))} for path in files]
    content = {"id": name, "modelId": name, "sha": commit_of(revision), "siblings": siblings, "tags": []}
    return 200, {"Content-Type": "application/json"}, json.dumps(content | {"private": False}).encode()


def _revision(folder: Path, name: str, revision: str) -> Path | None:
    there = [path for path in (folder / name).iterdir() if path.is_dir()] if (folder / name).is_dir() else []
    return next((path for path in there if revision in (path.name, commit_of(path))), None)


def _file(path: Path, commit: str) -> Answer:
    if not path.is_file():
        return _refusal("EntryNotFound")
    return 200, {"ETag": f'"{_digest(path)}"', **({"X-Repo-Commit": commit} if commit else {})}, path.read_bytes()


def _refusal(code: str) -> Answer:
    return 404, {"X-Error-Code": code, "X-Error-Message": code}, b"not found"


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
