"""A real HTTP server on loopback that answers with an image, or fails in the way that the path asks for."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from pipeline.ingest.fetch import FetchConfig

LOCAL = FetchConfig(allowed_networks=("127.0.0.1/32",), timeout_seconds=5, max_bytes=9000)


def photo() -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


PHOTO = photo()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.seen.append(self.path)
        kind, _, argument = self.path.strip("/").partition("/")
        if kind == "redirect":
            self.answer(302, b"", Location=argument)
        elif kind == "status":
            self.answer(int(argument), b"no")
        elif kind == "cut":
            self.answer(200, b"x" * 10, announced=1000)
        elif kind == "flaky":
            self.answer(503 if self.server.seen.count(self.path) == 1 else 200, b"second")
        elif kind == "slow":
            self.server.gate.wait(20)
            self.answer(200, b"late")
        elif kind == "drip":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x" * 100)
            self.close_connection = True
        else:
            self.answer(200, PHOTO)

    def answer(self, status, content, announced=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(announced or len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = announced is not None

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients that hang up are what some tests are about."""


@contextmanager
def image_server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.seen, running.gate = [], threading.Event()
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.gate.set()
        running.shutdown()
        thread.join()
