"""Bad tars: the sound rows still come, and a row for everything that is wrong.

Each case is a tar, the keys of the sound rows that come out of it, and words of what its broken rows say.
"""

from __future__ import annotations

import io
import json
import tarfile
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sources.tar_members import read_members
from pipeline.sources.tars import TarsConfig
from tests.fuzzing import FUZZ_SECONDS, damage, damaged, fuzz
from tests.test_sources_bad import GOOD, read


def member(name, content=GOOD, **facts):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in facts.items():
        setattr(info, field, value)
    return info, content


def tar_of(*members, form=tarfile.GNU_FORMAT):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return stream.getvalue()


A, B = (member("a.jpg"), member("a.txt", b"a")), (member("b.jpg"), member("b.txt", b"b"))
WHOLE = tar_of(*A, *B)
SPARSE = bytearray(tar_of(*A, member("s.jpg", b"x" * 600), *B))
SPARSE[2048 + 156] = ord("S")
SPARSE[2048 + 148 : 2048 + 156] = b"%06o\0 " % (256 + sum(SPARSE[2048:2196]) + sum(SPARSE[2204:2560]))
BEYOND = tarfile.TarInfo("x.jpg")
BEYOND.size = 10**9
TARS = {
    "empty file": (b"", [], ["no members"]),
    "zeros only": (bytes(10240), [], ["no members"]),
    "HTML": (b"<html>" * 400, [], ["2400 bytes at 0 are no tar"]),
    "cut off in a member": (
        tar_of(*A, member("b.txt", b"b"), member("b.jpg", b"x" * 900))[: 3584 + 300],
        ["a"],
        ["b.jpg is cut off"],
    ),
    "cut off in a header": (WHOLE[: 2048 + 100], ["a"], ["100 bytes at 2048 are no tar"]),
    "without its end": (WHOLE[: 4 * 1024], ["a", "b"], []),
    "two tars in one": (tar_of(*A) + tar_of(*B), ["a", "b"], []),
    "broken header": (
        WHOLE[:2048] + b"\xff" * 512 + WHOLE[2560:],
        ["a"],
        ["1024 bytes at 2048 are no tar", "no member is an image"],
    ),
    "garbage between": (WHOLE[:2048] + b"junk" * 256 + WHOLE[2048:], ["a", "b"], ["1024 bytes at 2048 are no tar"]),
    "size beyond the end": (tar_of(*A)[:2048] + BEYOND.tobuf() + tar_of(*B), ["a", "b"], ["x.jpg is cut off"]),
    "symbolic link": (
        tar_of(*A, member("s.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), *B),
        ["a", "b"],
        ["is a link"],
    ),
    "hard link": (
        tar_of(*A, member("s.jpg", b"", type=tarfile.LNKTYPE, linkname="a.jpg"), *B),
        ["a", "b"],
        ["is a link"],
    ),
    "caption is a link": (
        tar_of(member("a.jpg"), member("a.txt", b"", type=tarfile.SYMTYPE, linkname="/x"), *B),
        ["a", "b"],
        ["is a link"],
    ),
    "device": (tar_of(*A, member("d.jpg", b"", type=tarfile.CHRTYPE), *B), ["a", "b"], ["no regular file"]),
    "pipe": (tar_of(*A, member("d.jpg", b"", type=tarfile.FIFOTYPE), *B), ["a", "b"], ["no regular file"]),
    "folder": (tar_of(member("x", b"", type=tarfile.DIRTYPE), *A, *B), ["a", "b"], []),
    "sparse": (bytes(SPARSE), ["a", "b"], ["s.jpg is sparse"]),
    "absolute path": (tar_of(*A, member("/etc/x.jpg"), *B), ["a", "b"], ["leads out of the tar"]),
    "path with ..": (tar_of(*A, member("../x.jpg"), *B), ["a", "b"], ["leads out of the tar"]),
    "no suffix": (tar_of(*A, member("README"), *B), ["a", "b"], ["no name of the form KEY.SUFFIX"]),
    "hidden file": (tar_of(*A, member("._a.jpg"), *B), ["a", "b"], ["no name of the form KEY.SUFFIX"]),
    "member twice": (tar_of(*A, member("a.jpg", b"other"), *B), ["a", "b"], ["a.jpg stands twice"]),
    "key twice": (tar_of(*A, *B, *A), ["a", "b"], ["a stands again"]),
    "missing image": (tar_of(*A, member("c.txt", b"c"), *B), ["a", "b"], ["no member is an image"]),
    "missing caption": (tar_of(member("a.jpg"), *B), ["a", "b"], []),
    "broken json": (tar_of(*A, member("a.json", b"{"), *B), ["a", "b"], []),
    "json of a list": (tar_of(*A, member("a.json", b"[1]"), *B), ["a", "b"], []),
    "image over the limit": (
        tar_of(*A, member("c.jpg", b"x" * 5000), *B),
        ["a", "b"],
        ["5000 bytes; 4000 are allowed"],
    ),
    "long name, GNU": (tar_of(*A, member("n" * 10_000 + ".jpg"), *B), ["a", "n" * 10_000, "b"], []),
    "long name, pax": (
        tar_of(*A, member("n" * 10_000 + ".jpg"), *B, form=tarfile.PAX_FORMAT),
        ["a", "n" * 10_000, "b"],
        [],
    ),
    "name with a newline": (tar_of(*A, member("x\ny.jpg"), *B), ["a", "x\ny", "b"], []),
    "name that is no UTF-8": (tar_of(*A, member("x\udcff.jpg"), *B), ["a", "x\ufffd", "b"], []),
    "unicode name, pax": (
        tar_of(*A, member("\u05d0\U0001f600.jpg"), *B, form=tarfile.PAX_FORMAT),
        ["a", "\u05d0\U0001f600", "b"],
        [],
    ),
}


@pytest.mark.parametrize("kind", TARS)
def test_broken_tar_gives_its_sound_rows_and_a_row_for_what_is_broken(kind, tmp_path):
    content, sound, problems = TARS[kind]
    (tmp_path / "x.tar").write_bytes(content)
    (tmp_path / "z.tar").write_bytes(tar_of(member("z.jpg"), member("z.txt", b"z")))
    rows = read(TarsConfig(folder=str(tmp_path), holdout_share=0.0, max_bytes=4000).build())
    assert rows[-1].payload == GOOD
    rows = rows[:-1]
    assert [row.attributes["key"] for row in rows if row.payload is not None] == sound
    assert all(row.payload == GOOD for row in rows if row.payload is not None)
    broken = [row.attributes["broken"] for row in rows if row.payload is None]
    assert len(broken) == len(problems), broken
    assert all(word in said for word, said in zip(problems, broken, strict=True)), broken
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        if (
            row.payload is not None
            and row.attributes["key"] in "ab"
            and kind not in ("missing caption", "caption is a link")
        ):
            assert row.captions == (row.attributes["key"],)


def test_tar_of_img2dataset_keeps_its_json(tmp_path):
    facts = {"caption": "said", "url": "http://a.example", "similarity": 0.3, "exif": {"a": [1]}, "nan": float("nan")}
    (tmp_path / "0.tar").write_bytes(tar_of(*A, member("a.json", json.dumps(facts).encode())))
    (row,) = read(TarsConfig(folder=str(tmp_path), holdout_share=0.0).build())
    assert row.captions == ("a", "said")
    assert row.attributes == {**facts, "nan": None, "tar": "0.tar", "key": "a"}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, len(WHOLE)), st.integers(0, 1500))
def test_members_of_any_bytes_lie_in_order_and_inside_the_file(junk, place, width):
    content = WHOLE[:place] + junk + WHOLE[place + width :]
    found = list(read_members(io.BytesIO(content)))
    offsets = [one.offset for one in found]
    assert offsets == sorted(set(offsets))
    assert all(one.problem or one.start + one.num_bytes <= len(content) for one in found)


STARTS = [content for content, _, _ in TARS.values() if 0 < len(content) < 20_000]


def read_damaged(folder, content, changes):
    """Read a damaged tar as a source; its rows have each their own key, and a payload or what is wrong."""
    (folder / "x.tar").write_bytes(damaged(content, changes))
    rows = read(TarsConfig(folder=str(folder), holdout_share=0.0, max_bytes=4000).build())
    assert len({row.key for row in rows}) == len(rows)
    assert all((row.payload is None) == ("broken" in row.attributes) for row in rows)


def test_damaged_tar_never_raises(tmp_path):
    assert fuzz(partial(read_damaged, tmp_path), st.sampled_from(STARTS), damage, seconds=3.0) > 50


@pytest.mark.slow
@pytest.mark.timeout(FUZZ_SECONDS + 300)
def test_damaged_tar_never_raises_for_ten_minutes(tmp_path):
    fuzz(partial(read_damaged, tmp_path), st.sampled_from(STARTS), damage)
