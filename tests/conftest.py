"""What every test shares: shapes checked at run time, one thread, and real servers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests import shape_checks
from tests.servers import S3Server, s3_server

# The thread that sends metrics was seen to abort its process at the end of a module's Ray. Read when Ray is imported.
os.environ.setdefault("RAY_enable_metrics_collection", "0")
# Hooked before any of them is imported; only where tensors are, since beartype can't read Self or plain Protocols.
TENSOR_PACKAGES = (
    "ldm.autoencoder",
    "ldm.unet",
    "ldm.diffusion",
    "ldm.losses",
    "ldm.samplers",
    "ldm.latents",
    "ldm.evaluation",
    "ldm.watermark",
)
install_import_hook(TENSOR_PACKAGES, f"{shape_checks.__name__}.{shape_checks.checked.__name__}")

# Sums depend on how many threads share them: one thread makes equal runs equal on every machine.
torch.set_num_threads(1)

# One change is tested on the same examples wherever and whenever; `make soak` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

STARTS_MANY_PROCESSES = {
    "test_cluster",
    "test_dataset_kills",
    "test_generate_kills",
    "test_jobs",
    "test_lost_nodes",
    "test_run",
    "test_shards_at_once",
    "test_worker_deaths",
}
"""Modules whose tests take Ray or servers and leave nothing to another of their kind."""
TAKES_LONG = {
    "test_attempts",
    "test_dataset_duplicates",
    "test_elastic_training",
    "test_engine_weights",
    "test_engines",
    "test_memory_forecast",
    "test_remote_checkpoints",
    "test_rollback",
    "test_self_tests",
    "test_stage1_ranks",
    "test_tracking",
    "test_watchdog",
}
"""Modules whose tests start a few ranks, a server or one Ray: long, but they can run beside those."""


class OneAtATime(LoadScopeScheduling):
    """With `-n 2`, one worker goes through the tests that start many processes while the other does the rest.

    xdist's own groups do not reach it: it reads them from a private name that pytest 9.2 has given up.
    """

    def _split_scope(self, nodeid: str) -> str:
        module = Path(nodeid.partition("::")[0]).stem
        return "processes" if module in STARTS_MANY_PROCESSES else module


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneAtATime:
    return OneAtATime(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    items.sort(key=lambda item: (item.path.stem not in STARTS_MANY_PROCESSES, item.path.stem not in TAKES_LONG))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server for the whole session; every AWS client of this process and its children talks to it."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def s3_root(s3: S3Server, request: pytest.FixtureRequest) -> str:
    """An `s3://` folder of the test's own."""
    return f"s3://{s3.bucket}/{request.node.name.replace('[', '-').rstrip(']')}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 40 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
