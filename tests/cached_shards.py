"""Latents of eight small shards, and copies of them, for the laws of such copies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import s3fs

from pipeline import shard_cache
from pipeline.latent_shard import PART_SUFFIXES, TEXT_SUFFIX
from pipeline.loader import LoaderConfig
from pipeline.local_shards import CACHE_NAME, LocalShards, groups_of, open_local_shards
from pipeline.store.manifest import load_manifest
from pipeline.store.schema import Split
from tests.servers import S3Server
from tests.tiny_latents import carry_out, latents_config, plan_latents, write_autoencoder, write_dataset

LATENT_FILES = (*PART_SUFFIXES, TEXT_SUFFIX)
SIZES = (7, 5, 6, 8, 5, 7, 6, 9)


def write_eight_shards(folder: Path) -> Path:
    """Publish latents of eight shards and return their folder."""
    write_dataset(folder / "dataset", sizes=SIZES)
    write_autoencoder(folder / "autoencoder")
    carry_out(plan_latents(latents_config(folder)))
    return folder / "latents"


def upload(made: Path, s3: S3Server, name: str) -> str:
    """Put them on an S3 server and return their URL."""
    root = f"s3://{s3.bucket}/{name}"
    s3.client().put(str(made), root, recursive=True)
    return root


@contextmanager
def connected(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have this process's S3 clients, and its children's, talk to a server by this address."""
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield
    s3fs.S3FileSystem.clear_instance_cache()


def shards_of(root: str, cache: Path, limit: int = 0) -> LocalShards:
    groups = groups_of(load_manifest(root), Split.TRAIN, LATENT_FILES)
    return open_local_shards(root, Split.TRAIN, groups, cache_folder=str(cache), cache_bytes=limit)


def config_of(root: str, cache: Path, limit: int = 0) -> LoaderConfig:
    return LoaderConfig(
        root=root, batch_size=4, num_streams=2, block_rows=6, cache_folder=str(cache), cache_bytes=limit
    )


def bytes_of(shards: LocalShards, *numbers: int) -> int:
    return sum(shards.shards[number].record.files[suffix].num_bytes for number in numbers for suffix in LATENT_FILES)


def there(cache: Path) -> list[str]:
    """Return the shards of which there is a whole tar."""
    return sorted(path.stem for path in cache.glob("*/train/*/*.tar"))


def size_of(cache: Path) -> int:
    """Return the bytes of all files, however they come and go meanwhile."""
    found = 0
    for folder, _, names in os.walk(cache):  # which forgives folders that vanish
        for name in names:
            with suppress(FileNotFoundError):
                found += Path(folder, name).stat().st_size
    return found


def settled_size_of(cache: Path) -> int:
    """Return the same while nobody makes or takes room: counted meanwhile, what went and what came would both count."""
    with (cache / CACHE_NAME / shard_cache.LOCK_NAME).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return size_of(cache)


def content_of(shards: LocalShards, number: int) -> list[bytes]:
    with shards.paths(number) as paths:
        return [path.read_bytes() for path in paths]


def local_content(made: Path, number: int) -> list[bytes]:
    return [(made / "train" / f"{number:06d}.{suffix}").read_bytes() for suffix in LATENT_FILES]


def wait_until(is_so: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)
