"""A local nginx that serves each file of a folder under any number of addresses, and notes when each was asked for."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY_SECONDS = 20
PLACES = ("/usr/sbin/nginx", "/usr/local/sbin/nginx")
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
CONFIG = """
daemon off;
worker_processes 1;
{user}
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    {temporary}
    log_format benchmark '$msec $request_time $status $body_bytes_sent $request_uri';
    access_log {folder}/access.log benchmark;
    sendfile on;
    tcp_nopush on;
    types {{ image/jpeg jpg; }}
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        location ~ "^/(?<photo>[a-z0-9.-]+)/[0-9]+\\.jpg$" {{ alias {root}/$photo.jpg; }}
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Request:
    """One answered request.

    Attributes:
        started: when its first bytes came, in seconds of the wall clock.
        status: of the answer.
        num_bytes: of the answer's body.
        path: what was asked for.
    """

    started: float
    status: int
    num_bytes: int
    path: str


class WebServer:
    """A running nginx."""

    def __init__(self, port: int, log: Path) -> None:
        """Keep where it listens and what it writes."""
        self.port = port
        self._log = log
        self._num_read = 0

    def url(self, photo: str, number: int) -> str:
        """Return one of the addresses of the file PHOTO.jpg."""
        return f"http://127.0.0.1:{self.port}/{photo}/{number:06d}.jpg"

    def new_requests(self) -> list[Request]:
        """Return the requests that were answered since the last call."""
        lines = self._log.read_text().splitlines()
        new, self._num_read = lines[self._num_read :], len(lines)
        return [_request(line) for line in new]


@contextmanager
def web_server(root: Path, folder: Path) -> Iterator[WebServer]:
    """Serve ROOT/PHOTO.jpg as /PHOTO/ANY-NUMBER.jpg on loopback with one worker; nginx's own files go to `folder`.

    Raises:
        ValueError: if there is no nginx.
    """
    program = shutil.which("nginx") or next((place for place in PLACES if Path(place).exists()), None)
    if program is None:
        raise ValueError("this benchmark needs nginx, and there is none: install it, such as by apt install nginx")
    folder.mkdir(parents=True)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = int(held.getsockname()[1])
    config = folder / "nginx.conf"
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""  # root's workers could not read our folders
    temporary = " ".join(f"{name}_temp_path {folder}/{name};" for name in TEMPORARY)
    config.write_text(CONFIG.format(folder=folder, root=root, port=port, user=user, temporary=temporary))
    process = subprocess.Popen([program, "-e", f"{folder}/error.log", "-p", str(folder), "-c", str(config)])
    try:
        _wait_until_it_listens(process, port, folder / "error.log")
        yield WebServer(port, folder / "access.log")
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, errors: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"nginx does not answer: {errors.read_text() if errors.exists() else 'it wrote nothing'}")


def _request(line: str) -> Request:
    ended, seconds, status, num_bytes, path = line.split(" ")
    return Request(float(ended) - float(seconds), int(status), int(num_bytes), path)
