"""Laws of copies that several processes share: each downloaded once, whoever is killed while it is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from pipeline.loader import LatentLoader, LoaderConfig
from pipeline.local_shards import CACHE_NAME
from pipeline.store.manifest import load_manifest
from tests.cached_shards import (
    SIZES,
    bytes_of,
    config_of,
    connected,
    content_of,
    local_content,
    settled_size_of,
    shards_of,
    there,
    upload,
    wait_until,
    write_eight_shards,
)
from tests.chaos_proxy import Link, running
from tests.servers import S3Server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of eight shards on this machine."""
    return write_eight_shards(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def remote(s3: S3Server, made: Path) -> str:
    """The same latents on an S3 server."""
    return upload(made, s3, "shared-copies")


@pytest.fixture
def link(s3: S3Server, remote: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    """A link to the server, as slow or wrong as the test says."""
    with running(Link(s3.endpoint)) as proxy, connected(proxy.url, monkeypatch):
        yield proxy


READER = """
import sys
from itertools import islice
import pipeline.loader
from pipeline.loader import LatentLoader, LoaderConfig
from pipeline.store.manifest import load_manifest
pipeline.loader.WINDOW_ROWS = 8
config = LoaderConfig.from_yaml(open(sys.argv[1]).read())
rank, world = int(sys.argv[2]), int(sys.argv[3])
loader = LatentLoader(load_manifest(config.root), config, rank, world)
batches = loader.batches()
for batch in islice(batches, 20):
    print(",".join(batch.keys))
batches.close()
"""


def reader(config: LoaderConfig, folder: Path, rank: int = 0, world: int = 1) -> subprocess.Popen[str]:
    """Start a process that prints the keys of 20 batches."""
    path = folder / f"reader-{rank}-of-{world}.yaml"
    path.write_text(config.to_yaml())
    return subprocess.Popen(
        [sys.executable, "-c", READER, str(path), str(rank), str(world)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )


def test_two_processes_that_want_the_same_shards_download_each_once(
    made: Path, remote: str, link: Link, tmp_path: Path
) -> None:
    link.seconds = 0.3
    processes = [reader(config_of(remote, tmp_path / "cache"), tmp_path) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    expected = LatentLoader(load_manifest(str(made)), config_of(str(made), tmp_path / "none"))
    words = [",".join(batch.keys) for batch in islice(expected.batches(), 20)]
    assert [text.split() for text in printed] == [words, words]
    assert len(link.downloads) == len(SIZES)
    assert set(link.downloads.values()) == {1}


def test_two_ranks_under_a_limit_for_both_end_well(made: Path, remote: str, tmp_path: Path) -> None:
    sizes = [bytes_of(shards_of(remote, tmp_path / "probe"), number) for number in range(len(SIZES))]
    config = config_of(remote, tmp_path / "cache", sum(sorted(sizes)[2:]))
    processes = [reader(config, tmp_path, rank, 2) for rank in range(2)]
    wait_until((tmp_path / "cache" / CACHE_NAME).exists, 60)
    highest = 0
    while any(process.poll() is None for process in processes):
        highest = max(highest, settled_size_of(tmp_path / "cache"))
        time.sleep(0.01)
    keys = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    expected = LatentLoader(load_manifest(str(made)), config_of(str(made), tmp_path / "none"))
    for number, batch in enumerate(islice(expected.batches(), 20)):
        first, second = (lines[number].split(",") for lines in keys)
        assert sorted([*first, *second]) == sorted(batch.keys)
    assert 0 < highest <= config.cache_bytes


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_process_killed_in_a_download_leaves_what_the_next_one_goes_on_from(
    made: Path, remote: str, link: Link, tmp_path: Path, limit: int
) -> None:
    first = shards_of(remote, tmp_path / "cache", limit)
    content_of(first, 2)
    link.seconds = 30.0
    process = reader(config_of(remote, tmp_path / "cache", limit), tmp_path)
    wait_until(lambda: sum(link.downloads.values()) > 2 and any((tmp_path / "cache").rglob("*.tar.partial")))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert any((tmp_path / "cache").rglob("*.tar.partial"))
    assert there(tmp_path / "cache") == ["000002"]
    link.seconds = 0.0
    link.downloads.clear()
    second = shards_of(remote, tmp_path / "cache", limit)
    assert not any((tmp_path / "cache").rglob("*.partial"))
    for number in range(len(SIZES)):
        assert content_of(second, number) == local_content(made, number)
    assert not any(path.endswith("000002.tar") for path in link.downloads)


def test_process_killed_while_another_waits_for_its_download_is_succeeded(
    made: Path, remote: str, link: Link, tmp_path: Path
) -> None:
    link.seconds = 30.0
    process = reader(config_of(remote, tmp_path), tmp_path)
    wait_until(lambda: any(tmp_path.rglob("*.tar.partial")))
    (partial, *_) = tmp_path.rglob("*.tar.partial")
    number = int(re.findall(r"\d{6}", partial.name)[0])
    shards = shards_of(remote, tmp_path)
    assert partial.exists(), "what another process is downloading is not removed"
    found: list[list[bytes]] = []
    waiting = threading.Thread(target=lambda: found.append(content_of(shards, number)))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    link.seconds = 0.0
    process.send_signal(signal.SIGKILL)
    process.wait()
    waiting.join(20)
    assert found == [local_content(made, number)]
