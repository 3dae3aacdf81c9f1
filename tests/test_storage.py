"""Laws of ldm/storage.py, on the local disk and on a real S3 server."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import s3fs

from ldm import storage
from tests.servers import S3Server


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "root") if request.param == "local" else str(request.getfixturevalue("s3_root"))


def test_written_bytes_are_read_back_with_their_digest(root: str) -> None:
    content = os.urandom(3 * storage.CHUNK_BYTES + 17)
    path = storage.join(root, "a", "b.bin")
    storage.write_bytes(path, content)
    assert storage.read_bytes(path) == content
    assert storage.sha256_of(path) == hashlib.sha256(content).hexdigest()
    assert storage.exists(path)


def test_text_keeps_every_character(root: str) -> None:
    storage.write_text(storage.join(root, "t"), "Käse 😀\r\nline\n")
    assert storage.read_text(storage.join(root, "t")) == "Käse 😀\r\nline\n"


def test_a_block_that_fails_publishes_nothing_and_leaves_nothing(root: str) -> None:
    path = storage.join(root, "x")
    with pytest.raises(RuntimeError, match="power cut"), storage.open_atomic(path) as file:
        file.write(b"half")
        raise RuntimeError("power cut")
    assert not storage.exists(path)
    assert storage.list_names(root) == []


def test_a_block_that_fails_leaves_the_old_content(root: str) -> None:
    path = storage.join(root, "x")
    storage.write_bytes(path, b"old")
    with pytest.raises(RuntimeError, match="power cut"), storage.open_atomic(path) as file:
        file.write(b"new, and lon")
        raise RuntimeError("power cut")
    assert storage.read_bytes(path) == b"old"


def test_a_file_has_no_name_before_its_block_ends(root: str) -> None:
    path = storage.join(root, "x")
    with storage.open_atomic(path) as file:
        file.write(b"content")
        file.flush()
        assert not storage.exists(path)
    assert storage.exists(path)


def test_names_in_a_folder_are_sorted_and_hold_folders(root: str) -> None:
    for name in ("b", "a/inner", "c"):
        storage.write_bytes(storage.join(root, name), b"1")
    assert storage.list_names(root) == ["a", "b", "c"]


def test_an_absent_folder_is_empty_and_an_absent_file_is_an_error(root: str) -> None:
    assert storage.list_names(storage.join(root, "nowhere")) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))


def test_a_writable_folder_is_accepted_and_left_as_it_was(root: str) -> None:
    storage.check_writable(root)
    assert storage.list_names(root) == []


def test_a_download_says_whether_the_file_is_the_one_of_the_digest(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.0)
    source, target = storage.join(root, "deep", "source"), tmp_path / "new" / "target"
    content = os.urandom(2 * storage.CHUNK_BYTES + 1)
    storage.write_bytes(source, content)
    assert storage.download(source, target, storage.sha256_of(source))
    assert target.read_bytes() == content
    assert not storage.download(source, target, hashlib.sha256(b"other").hexdigest())
    with pytest.raises(FileNotFoundError):
        storage.download(storage.join(root, "nothing"), target, "")


def test_a_copy_has_the_digest_of_its_source(root: str) -> None:
    source, target = storage.join(root, "source"), storage.join(root, "deep", "target")
    storage.write_bytes(source, os.urandom(2 * storage.CHUNK_BYTES + 1))
    storage.copy_file(source, target)
    assert storage.sha256_of(target) == storage.sha256_of(source)


def test_a_removed_folder_is_gone_and_its_neighbour_stays(root: str) -> None:
    for name in ("gone/a", "gone/deep/b", "gone-not/c"):
        storage.write_bytes(storage.join(root, name), b"1")
    storage.remove_folder(storage.join(root, "gone"))
    assert storage.list_files(root) == ["gone-not/c"]
    assert not storage.exists(storage.join(root, "gone", "a"))


def test_files_of_another_writer_are_seen_after_a_listing(s3: S3Server, s3_root: str) -> None:
    storage.write_bytes(storage.join(s3_root, "mine"), b"1")
    assert storage.list_names(s3_root) == ["mine"]
    s3.client().pipe(storage.join(s3_root, "theirs"), b"2")
    assert storage.list_names(s3_root) == ["mine", "theirs"]
    assert storage.exists(storage.join(s3_root, "theirs"))


def test_content_that_another_writer_replaced_is_read_anew(s3: S3Server, s3_root: str) -> None:
    path = storage.join(s3_root, "x")
    storage.write_bytes(path, b"first")
    assert storage.list_names(s3_root) == ["x"]
    s3.client().pipe(path, b"the second, which is longer")
    assert storage.read_bytes(path) == b"the second, which is longer"
    assert storage.sha256_of(path) == hashlib.sha256(b"the second, which is longer").hexdigest()


def test_a_wrong_secret_is_refused_before_any_work(s3: S3Server, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(ValueError, match=f"cannot write into {s3_root}: .*signature"):
            storage.check_writable(s3_root)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_file_in_the_way_of_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=f"cannot write into {tmp_path}/file"):
        storage.check_writable(str(tmp_path / "file"))


def test_a_full_disk_is_refused_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs about 1,000,000,000,000\.0 MB free, its disk has [\d,]+\.\d MB"):
        storage.check_writable(str(tmp_path), needed_bytes=10**18)


def test_partials_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "deep" / "whole.tar"), b"1")
    for name in (".whole.tar.0123abcd.partial", "deep/.next.tar.89abcdef.partial"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "deep" / "not.partial").write_bytes(b"a person's own")
    assert storage.remove_partials(str(tmp_path)) == 2
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["not.partial", "whole.tar"]


def test_a_place_is_local_only_on_this_machines_disk(tmp_path: Path) -> None:
    assert storage.is_local(str(tmp_path))
    assert storage.is_local(f"file://{tmp_path}")
    assert not storage.is_local("s3://bucket/x")


@pytest.mark.parametrize("folder", ["/data/x", "/data/x/", "s3://bucket/x", "s3://bucket/x/"])
def test_join_puts_one_slash_between_parts(folder: str) -> None:
    assert storage.join(folder, "train", "000000.tar") == folder.rstrip("/") + "/train/000000.tar"
