"""Laws of the copies of remote shards: whole, below their limit, never taken from who uses them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from ldm.storage import TransferError, list_files
from ldm.types import LatentBatch
from pipeline import shard_cache
from pipeline.loader import LatentLoader
from pipeline.local_shards import CACHE_NAME
from pipeline.store.manifest import load_manifest
from tests.cached_shards import (
    LATENT_FILES,
    SIZES,
    bytes_of,
    config_of,
    connected,
    content_of,
    local_content,
    settled_size_of,
    shards_of,
    size_of,
    there,
    upload,
    wait_until,
    write_eight_shards,
)
from tests.chaos_proxy import Link, chaos_proxy, running
from tests.servers import S3Server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of eight shards on this machine."""
    return write_eight_shards(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def remote(s3: S3Server, made: Path) -> str:
    """The same latents on an S3 server."""
    return upload(made, s3, "copies")


@pytest.fixture
def link(s3: S3Server, remote: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    """A link to the server, as slow or wrong as the test says."""
    with running(Link(s3.endpoint)) as proxy, connected(proxy.url, monkeypatch):
        yield proxy


def test_cache_limit_is_kept_the_longest_unused_shard_goes_first(made: Path, remote: str, tmp_path: Path) -> None:
    everything = shards_of(remote, tmp_path / "all")
    limit = bytes_of(everything, 3) + bytes_of(everything, 7) + bytes_of(everything, 0)
    shards = shards_of(remote, tmp_path / "some", limit)
    for number in (0, 3, 7):
        assert content_of(shards, number) == local_content(made, number)
    content_of(shards, 0)  # now 3 is the longest unused
    assert content_of(shards, 4) == local_content(made, 4)
    assert there(tmp_path / "some") == ["000000", "000004", "000007"]
    assert size_of(tmp_path / "some") <= limit
    assert content_of(shards, 3) == local_content(made, 3)


def test_cache_shard_in_use_is_not_deleted_however_long_it_is_unused(made: Path, remote: str, tmp_path: Path) -> None:
    limit = bytes_of(shards_of(remote, tmp_path), 0, 3)
    mine, theirs = (shards_of(remote, tmp_path, limit) for _ in range(2))
    with mine.paths(0) as paths:
        for number in (1, 2, 4):
            content_of(theirs, number)
            assert [path.read_bytes() for path in paths] == local_content(made, 0)
    content_of(theirs, 3)
    content_of(theirs, 7)
    assert "000000" not in there(tmp_path)


def test_cache_without_room_left_by_others_is_refused_with_what_is_lacking(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "ROOM_SECONDS", 0.2)
    probe = shards_of(remote, tmp_path / "probe")
    limit = bytes_of(probe, 0, 3)
    mine, theirs = (shards_of(remote, tmp_path / "cache", limit) for _ in range(2))
    mine.use([0, 3])
    with pytest.raises(ValueError, match=rf"may hold {limit:,} bytes .* is {bytes_of(probe, 1):,} too many"):
        theirs.use([1])
    assert there(tmp_path / "cache") == ["000000", "000003"]
    mine.use([0])
    theirs.use([1])
    assert there(tmp_path / "cache") == ["000000", "000001"]


def test_cache_room_that_is_given_back_while_another_waits_is_taken(remote: str, tmp_path: Path) -> None:
    limit = bytes_of(shards_of(remote, tmp_path / "probe"), 7)
    mine, theirs = (shards_of(remote, tmp_path / "cache", limit) for _ in range(2))
    mine.use([7])
    waiting = threading.Thread(target=theirs.use, args=([3],))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    mine.use([])
    waiting.join(20)
    assert there(tmp_path / "cache") == ["000003"]


def test_cache_limit_below_one_window_is_refused_at_the_start(remote: str, tmp_path: Path) -> None:
    manifest = load_manifest(remote)
    with pytest.raises(ValueError, match=r"cache_bytes is 1,000, and the \d+ shards .* take [\d,]+: raise it, or"):
        LatentLoader(manifest, config_of(remote, tmp_path, 1000))
    with pytest.raises(ValueError, match="cache_bytes must be at least 0, got -1"):
        config_of(remote, tmp_path, -1)


def positions(batches: list[LatentBatch]) -> list[tuple[int, str, bytes]]:
    return [
        (int(batch.samples[row]), batch.keys[row], batch.moments[row].numpy().tobytes())
        for batch in batches
        for row in range(len(batch.keys))
    ]


def test_loader_under_a_limit_yields_the_same_batches_and_never_holds_more(
    made: Path, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.loader.WINDOW_ROWS", 8)
    sizes = [bytes_of(shards_of(remote, tmp_path / "probe"), number) for number in range(len(SIZES))]
    limit = sum(sorted(sizes)[2:])  # six of the eight: what a border of blocks needs here
    highest, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            highest[0] = max(highest[0], settled_size_of(tmp_path / "cache"))

    loader = LatentLoader(load_manifest(remote), config_of(remote, tmp_path / "cache", limit))
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        some = list(islice(loader.batches(), 60))
        loader.null_condition(1)
    finally:
        is_over.set()
        watcher.join()
    unlimited = LatentLoader(load_manifest(str(made)), config_of(str(made), tmp_path / "none"))
    assert positions(some) == positions(list(islice(unlimited.batches(), 60)))
    assert 0 < highest[0] <= limit
    # A file that is deleted while it is mapped takes up its room for as long.
    mapped = Path("/proc/self/maps").read_text().splitlines()
    assert any(str(tmp_path) in line for line in mapped)
    assert not any(str(tmp_path) in line and "(deleted)" in line for line in mapped)


def test_loader_copies_of_later_windows_come_ahead(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.loader.WINDOW_ROWS", 4)
    monkeypatch.setattr("pipeline.loader.AHEAD_WINDOWS", 7)
    loader = LatentLoader(load_manifest(remote), replace(config_of(remote, tmp_path), prefetch_batches=1))
    needed = {loader._files.shards[number].record.name for number in loader._shards_between(0, 8)}
    ahead = {loader._files.shards[number].record.name for number in loader._shards_between(28, 32)}
    assert ahead - needed
    batches = loader.batches()
    next(batches)
    wait_until(lambda: ahead <= set(there(tmp_path)))
    assert len(there(tmp_path)) < len(SIZES)
    batches.close()  # type: ignore[attr-defined]


def test_copies_wrong_at_first_are_downloaded_again(made: Path, remote: str, link: Link, tmp_path: Path) -> None:
    link.num_wrong = 2
    assert content_of(shards_of(remote, tmp_path), 1) == local_content(made, 1)
    assert list(link.downloads.values()) == [3]


def test_copies_always_wrong_are_refused_by_name_digests_and_attempts(remote: str, link: Link, tmp_path: Path) -> None:
    link.num_wrong = 1000
    shards = shards_of(remote, tmp_path)
    digest = shards.shards[1].record.files["tar"].sha256
    size = shards.shards[1].record.files["tar"].num_bytes
    words = rf"train/000001.tar has sha256 (?!{digest})\w{{64}}, the manifest says {digest}: {size:,} bytes came of "
    with pytest.raises(ValueError, match=words + rf"{size:,} \({shard_cache.NUM_ATTEMPTS} attempts\)"):
        shards.use([1])
    assert list(link.downloads.values()) == [shard_cache.NUM_ATTEMPTS]
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize("length", [100, 1 << 20])
def test_source_of_another_length_is_refused_with_both_lengths(
    made: Path, s3: S3Server, s3_root: str, tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "FIRST_PAUSE_SECONDS", 0.0)
    s3.client().put(str(made), s3_root, recursive=True)
    s3.client().pipe(f"{s3_root}/train/000001.tar", b"x" * length)
    shards = shards_of(s3_root, tmp_path)
    with pytest.raises(
        ValueError, match=rf"{length:,} bytes came of {shards.shards[1].record.files['tar'].num_bytes:,}"
    ):
        shards.use([1])
    assert not list(tmp_path.rglob("*.tar"))


def test_downloads_that_break_off_are_tried_again_and_then_named(
    made: Path, remote: str, link: Link, tmp_path: Path
) -> None:
    shards = shards_of(remote, tmp_path)
    link.num_cut = 7  # s3fs tries five times by itself
    assert content_of(shards, 1) == local_content(made, 1)
    assert sum(link.downloads.values()) == 8


def test_server_that_always_breaks_off_is_named_with_the_attempts(
    remote: str, link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "NUM_ATTEMPTS", 2)
    link.num_cut = 1000
    with pytest.raises(TransferError, match=r"train/000001.tar did not come: .* \(2 attempts\)"):
        shards_of(remote, tmp_path).use([1])
    assert not list(tmp_path.rglob("*.partial"))


def test_loader_through_a_server_that_fails_and_cuts_yields_the_same_batches(
    made: Path, s3: S3Server, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = LatentLoader(load_manifest(str(made)), config_of(str(made), tmp_path / "none"))
    with chaos_proxy(s3.endpoint, 3) as proxy, connected(proxy.url, monkeypatch):
        loader = LatentLoader(load_manifest(remote), config_of(remote, tmp_path))
        assert positions(list(islice(loader.batches(), 12))) == positions(list(islice(expected.batches(), 12)))
        assert proxy.troubles["cut"]


def test_shard_half_deleted_by_a_killed_process_is_made_whole(made: Path, remote: str, tmp_path: Path) -> None:
    shards = shards_of(remote, tmp_path)
    content_of(shards, 1)
    next(tmp_path.rglob("*.index")).unlink()
    assert content_of(shards, 1) == local_content(made, 1)


def test_cache_deletes_nothing_that_is_not_its_own(remote: str, tmp_path: Path) -> None:
    limit = bytes_of(shards_of(remote, tmp_path / "probe"), 7)
    foreign = [tmp_path / "photos" / "holiday" / "1.tar", tmp_path / CACHE_NAME / "train" / "mine" / "2.tar"]
    for path in foreign:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * limit)
    shards = shards_of(remote, tmp_path, limit)
    for number in range(3):
        content_of(shards, number)
    assert all(path.exists() for path in foreign)
    assert len(list_files(str(tmp_path / CACHE_NAME))) <= 2 + 2 * len(LATENT_FILES)


def test_holds_of_many_threads_and_constant_deletion_always_find_their_files(
    made: Path, remote: str, tmp_path: Path
) -> None:
    """Room for two of eight shards, and eight readers: each is deleted as soon as it is let go."""
    limit = bytes_of(shards_of(remote, tmp_path / "probe"), 3, 7)
    expected = [local_content(made, number) for number in range(len(SIZES))]

    def read(seed: int) -> bool:
        shards = shards_of(remote, tmp_path / "cache", limit)
        numbers = [(seed * 5 + turn * 3) % len(SIZES) for turn in range(12)]
        return all(content_of(shards, number) == expected[number] for number in numbers)

    with ThreadPoolExecutor(4) as readers:
        assert all(readers.map(read, range(4)))
    assert size_of(tmp_path / "cache") <= limit
