"""Real servers for tests: an S3 server (SeaweedFS, from a package) on loopback, its data in a folder of the test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import s3fs

READY_SECONDS = 60
PORTS = (
    *("s3.port", "master.port", "volume.port", "filer.port", "admin.port"),
    *("s3.port.grpc", "master.port.grpc", "volume.port.grpc", "filer.port.grpc", "admin.port.grpc"),
)


@dataclass(frozen=True, kw_only=True)
class S3Server:
    endpoint: str
    key: str
    secret: str
    bucket: str

    @property
    def environment(self) -> dict[str, str]:
        """What makes every AWS client of a process talk to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self) -> s3fs.S3FileSystem:
        """A client of its own, that shares no cache with any other."""
        return s3fs.S3FileSystem(key=self.key, secret=self.secret, endpoint_url=self.endpoint, skip_instance_cache=True)


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Start an S3 server with one empty bucket; stop it at the end."""
    ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    server = S3Server(
        endpoint=f"http://127.0.0.1:{ports['s3.port']}", key="testkey", secret="testsecret", bucket="testbucket"
    )
    (folder / "data").mkdir(parents=True)
    command = [
        *(_weed(), f"-logdir={folder}", "mini", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-s3.port.iceberg=0", "-webdav=false", "-admin.ui=false", "-metricsPort=0", f"-bucket={server.bucket}"),
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    with (folder / "output").open("wb") as output:
        environment = {**os.environ, **server.environment}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        _wait_until_it_answers(server, process, folder / "output")
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_until_it_answers(server: S3Server, process: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            # The port is open before identities and the bucket are there.
            if server.bucket in server.client().ls("", refresh=True):
                return
        except (OSError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start:\n{output.read_text(errors='replace')[-2000:]}")


def _weed() -> str:
    found = shutil.which("weed", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    if found is None:
        raise RuntimeError("the tests' S3 server, weed, is not there: pip install -e '.[dev]' brings it")
    return found


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in sockets]
