"""A real HTTP server on loopback that answers with an image, or fails in the way that the path asks for.

The pairs of a URL's query are further headers of the answer: /status/302?Location=/photo&X-Robots-Tag=noai.
"""

from __future__ import annotations

import datetime
import gzip
import io
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from pipeline.ingest.fetch import FetchConfig

LOCAL = FetchConfig(
    allowed_networks=("127.0.0.1/32",), timeout_seconds=5, max_bytes=9000, backoff_seconds=0.01, max_host_failures=1000
)
GATE_SECONDS = 20


def photo() -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


PHOTO = photo()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        with server.lock:
            server.seen.append(self.path)
            server.headers.append(self.headers)
            server.reached.append(self.connection.getsockname()[0])
            server.num_active += 1
            server.peak = max(server.peak, server.num_active)
        try:
            parts = urlsplit(self.path)
            kind, _, argument = parts.path.strip("/").partition("/")
            self.more = parse_qsl(parts.query, keep_blank_values=True)
            getattr(self, f"serve_{kind.replace('-', '_')}", self.serve_photo)(argument)
        finally:
            with server.lock:
                server.num_active -= 1

    def serve_photo(self, _):
        self.answer(200, PHOTO)

    def serve_size(self, argument):
        self.answer(200, bytes(int(argument)))

    def serve_status(self, argument):
        self.answer(int(argument), b"" if argument in ("204", "304") else b"no")

    def serve_redirect(self, argument):
        """On to what follows in the path, its query included."""
        query = urlsplit(self.path).query
        self.more = []
        self.answer(302, b"", Location=f"{argument}?{query}" if query else argument)

    def serve_loop(self, _):
        self.answer(302, b"", Location=self.path)

    def serve_flaky(self, argument):
        """The given statuses one after the other, then what was asked for."""
        statuses = [int(status) for status in argument.split(",")] if argument else [503]
        num_before = self.server.seen.count(self.path) - 1
        if num_before < len(statuses):
            self.answer(statuses[num_before], b"not yet")
        else:
            self.more = []
            self.answer(200, b"second")

    def serve_busy(self, argument):
        """503 until the given seconds have passed since the first request."""
        began = self.server.began.setdefault(self.path, time.monotonic())
        is_early = time.monotonic() - began < float(argument)
        self.answer(503 if is_early else 200, b"later")

    def serve_after(self, argument):
        """503 until the server has seen that many requests for other paths."""
        num_others = sum(path != self.path for path in self.server.seen)
        self.answer(503 if num_others < int(argument) else 200, b"last")

    def serve_slow(self, _):
        self.server.gate.wait(GATE_SECONDS)
        self.answer(200, b"late")

    def serve_stall(self, _):
        """Half of the picture, then silence."""
        self.begin(200, [("Content-Length", str(len(PHOTO)))])
        self.wfile.write(PHOTO[: len(PHOTO) // 2])
        self.server.gate.wait(GATE_SECONDS)
        self.close_connection = True

    def serve_trickle(self, _):
        """A byte now and then, without end."""
        self.begin(200, [("Content-Length", "1000000")])
        while not self.server.gate.wait(0.02):
            self.wfile.write(b"x")

    def serve_cut(self, _):
        self.answer(200, b"x" * 10, announced=1000)

    def serve_long(self, _):
        """More bytes than announced."""
        self.answer(200, PHOTO + b"x" * 10, announced=len(PHOTO))

    def serve_drip(self, _):
        """No length announced."""
        self.begin(200, [("Connection", "close")])
        for _ in range(100):
            self.wfile.write(b"x" * 100)
        self.close_connection = True

    def serve_chunked(self, _):
        self.begin(200, [("Transfer-Encoding", "chunked")])
        for start in range(0, len(PHOTO), 1000):
            self.chunk(PHOTO[start : start + 1000])
        self.chunk(b"")

    def serve_endless(self, _):
        self.begin(200, [("Transfer-Encoding", "chunked")])
        while not self.server.gate.is_set():
            self.chunk(b"x" * 1000)

    def serve_gzip(self, argument):
        """A picture, or that many zeros, or half of it, compressed though nobody asked for it."""
        content = gzip.compress(bytes(int(argument)) if argument.isdigit() else PHOTO)
        self.answer(
            200, content[: len(content) // 2] if argument == "half" else content, **{"Content-Encoding": "gzip"}
        )

    def serve_raw(self, argument):
        """The bytes of the path, in hex, as they are."""
        self.wfile.write(bytes.fromhex(argument))
        self.close_connection = True

    def serve_huge_header(self, _):
        self.answer(200, PHOTO, **{"X-Long": "x" * 100_000})

    def serve_many_headers(self, _):
        self.answer(200, PHOTO, **{f"X-{i}": "y" for i in range(10_000)})

    def serve_hang_up(self, _):
        self.close_connection = True

    def serve_reset(self, _):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def answer(self, status, content, announced=None, **headers):
        self.begin(status, [*headers.items(), ("Content-Length", str(announced or len(content)))])
        self.wfile.write(content)
        self.close_connection |= announced is not None

    def begin(self, status, headers):
        self.send_response(status)
        for name, value in [*headers, *self.more]:
            self.send_header(name, value)
        self.end_headers()

    def chunk(self, content):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def get_request(self):
        self.num_connections += 1
        return super().get_request()

    def handle_error(self, request, client_address):
        """Clients that hang up are what some tests are about."""

    def open_gate_when(self, condition: Callable[[], bool]) -> None:
        """Let what waits at the gate go on as soon as the condition holds."""

        def watch() -> None:
            wait_until(condition)
            self.gate.set()

        threading.Thread(target=watch, daemon=True).start()


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds; give up silently, for the test to find what is missing."""
    deadline = time.monotonic() + GATE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


@contextmanager
def image_server(address: str = "127.0.0.1", certificate: Path | None = None) -> Iterator[Server]:
    """Serve at a free port of `address`; over TLS with the key and certificate of a PEM file."""
    with Server((address, 0), Handler) as running:
        running.seen, running.headers, running.reached, running.began = [], [], [], {}
        running.num_active = running.peak = running.num_connections = 0
        running.lock, running.gate = threading.Lock(), threading.Event()
        running.url = f"http{'s' if certificate else ''}://127.0.0.1:{running.server_port}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            running.socket = context.wrap_socket(running.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield running
        finally:
            running.gate.set()
            running.shutdown()
            thread.join()


def self_signed_certificate(path: Path) -> Path:
    """Write a key and a certificate for 127.0.0.1 that nobody vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(encoding))
    return path
