"""Laws of verifying a cache: a right one passes, one that only looks right is found, row by row."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from ldm.storage import sha256_of
from pipeline.latent_shard import FLIPPED_MOMENTS, MOMENTS, TEXT_SUFFIX, npy_bytes
from pipeline.latent_verification import sampled, verify_latents
from pipeline.store.manifest import (
    FileRecord,
    commit_shard,
    load_manifest,
    publish_manifest,
    shard_path,
)
from pipeline.store.schema import Row, key_of
from pipeline.store.shards import read_rows, write_shard
from pipeline.text_table import open_text_table, write_table
from tests.tiny_latents import latents_config, write_autoencoder, write_dataset, write_latents


@pytest.fixture
def made(tmp_path: Path) -> Path:
    write_latents(tmp_path)
    return tmp_path


def rewrite(root: Path, change: Callable[[list[Row]], None]) -> None:
    """Change a shard's rows, and its records with them, so that every digest is right again."""
    record = load_manifest(str(root)).shards[0]
    rows = list(read_rows(shard_path(str(root), record.split, record.name, "tar")))
    change(rows)
    files = write_shard(str(root), record.split, record.name, rows)
    publish(root, files)


def publish(root: Path, files: dict[str, FileRecord]) -> None:
    manifest = load_manifest(str(root))
    record = manifest.shards[0]
    commit_shard(str(root), dataclasses.replace(record, files={**record.files, **files}))
    publish_manifest(str(root), manifest.identity, manifest.kind, manifest.summary)


@pytest.mark.parametrize("share, encoded", [(0.0, 0), (1e-9, 4), (1.0, 22)])
def test_verify_a_right_cache_has_no_problems(made: Path, share: float, encoded: int) -> None:
    found = verify_latents(latents_config(made), share)
    assert (found.problems, found.num_rows, found.num_encoded) == ((), 22, encoded)
    assert found.furthest < 1e-2


def test_verify_rows_that_changed_places_are_both_named(made: Path) -> None:
    def swap(rows: list[Row]) -> None:
        rows[1][MOMENTS], rows[4][MOMENTS] = rows[4][MOMENTS], rows[1][MOMENTS]

    rewrite(made / "latents", swap)
    found = verify_latents(latents_config(made), 1.0)
    assert len(found.problems) == 2
    for problem, number in zip(found.problems, (1, 4), strict=True):
        assert f"train/000000: moments.npy of row {key_of(f'row {number}')} is" in problem
    assert verify_latents(latents_config(made), 0.0).problems == ()


def test_verify_an_embedding_of_another_caption_is_named(made: Path) -> None:
    path = made / "latents" / "train" / f"000000.{TEXT_SUFFIX}"
    table = open_text_table(path)
    numbers = range(len(table.offsets) - 1)
    embeddings = [table.embedding(number) for number in numbers]
    texts = [table.text(number) for number in numbers]
    embeddings[1], embeddings[2] = embeddings[2], embeddings[1]
    choices = [
        table.choices[start:stop].tolist()
        for start, stop in zip(table.choice_offsets, table.choice_offsets[1:], strict=False)
    ]
    lengths = [len(embedding.states) for embedding in embeddings]
    write_table(str(path), texts, choices, lengths, [(numbers, embeddings)])
    publish(made / "latents", {TEXT_SUFFIX: FileRecord(path.stat().st_size, sha256_of(str(path)))})
    found = verify_latents(latents_config(made), 1.0)
    assert f"train/000000: the embedding of {texts[1]!r} is not the text encoder's" in found.problems
    assert len(found.problems) == 2


def test_verify_rows_of_another_dataset_shard_are_refused(made: Path) -> None:
    rewrite(made / "latents", list.reverse)
    found = verify_latents(latents_config(made), 1.0)
    assert any(problem.startswith("train/000000: its rows are not those of ") for problem in found.problems)


def test_verify_damaged_bytes_are_found_without_encoding(made: Path) -> None:
    tar = made / "latents" / "train" / "000001.tar"
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    found = verify_latents(latents_config(made), 1.0)
    assert [problem.startswith(f"{tar} has sha256") for problem in found.problems] == [True]
    assert found.num_encoded == 0


def test_verify_with_another_autoencoder_is_refused_with_both_digests(made: Path) -> None:
    write_autoencoder(made / "other", seed=1)
    with pytest.raises(ValueError, match="autoencoder is .* there, .* here"):
        verify_latents(latents_config(made, autoencoder=str(made / "other")), 1.0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 2"):
        verify_latents(latents_config(made), 2)


def test_sample_is_a_share_of_the_keys_and_never_empty() -> None:
    keys = [key_of(str(number)) for number in range(10_000)]
    assert len(sampled(keys, 0.1)) == pytest.approx(1000, abs=100)
    assert set(sampled(keys, 0.01)) <= set(sampled(keys, 0.1))
    assert sampled(keys, 0.0) == [keys.index(min(keys))]


def flipped(rows: list[Row]) -> None:
    rows[2][FLIPPED_MOMENTS] = rows[2][MOMENTS]


def noisier(rows: list[Row]) -> None:
    moments = np.load(io.BytesIO(rows[2][MOMENTS]))
    moments[len(moments) // 2 :] += np.float16(1.0)
    rows[2][MOMENTS] = npy_bytes(moments)


def captions_swapped(rows: list[Row]) -> None:
    for name in ("txt", "json"):
        rows[0][name], rows[2][name] = rows[2][name], rows[0][name]


@pytest.mark.parametrize(
    "change, named",
    [
        (flipped, "moments_flipped.npy of row {2}"),
        (noisier, "moments.npy of row {2} has other log-variances"),
        (captions_swapped, "the captions of row {0} are not those of the dataset"),
    ],
)
def test_verify_finds_what_only_looks_right(tmp_path: Path, change: Callable[[list[Row]], None], named: str) -> None:
    write_latents(tmp_path, flip=True)
    rewrite(tmp_path / "latents", change)
    found = verify_latents(latents_config(tmp_path, flip=True), 1.0)
    said = named.format(*[key_of(f"row {row}") for row in range(3)])
    assert any(said in problem for problem in found.problems), found.problems


def change_table(root: Path, **changed: np.ndarray) -> None:
    path = root / "train" / f"000000.{TEXT_SUFFIX}"
    path.write_bytes(safetensors.numpy.save(safetensors.numpy.load(path.read_bytes()) | changed))
    publish(root, {TEXT_SUFFIX: FileRecord(path.stat().st_size, sha256_of(str(path)))})


def test_verify_finds_another_null_embedding_and_other_choices(made: Path) -> None:
    path = made / "latents" / "train" / f"000000.{TEXT_SUFFIX}"
    whole = safetensors.numpy.load(path.read_bytes())
    tokens = whole["tokens"].copy()
    tokens[: whole["offsets"][1]] = 0
    change_table(made / "latents", tokens=tokens)
    found = verify_latents(latents_config(made), 1.0)
    assert any("the embedding of the empty caption" in problem for problem in found.problems)
    change_table(made / "latents", tokens=whole["tokens"], choices=np.ones_like(whole["choices"]))
    found = verify_latents(latents_config(made), 1.0)
    assert len([problem for problem in found.problems if "the captions of row" in problem]) >= 6


def test_verify_against_a_dataset_that_changed_names_the_shards(made: Path) -> None:
    write_dataset(made / "grown", sizes=(7, 5, 6, 3))
    found = verify_latents(latents_config(made, dataset=str(made / "grown")), 1.0)
    assert "train/000003: the dataset's shard is new, or another than was encoded" in found.problems
    write_dataset(made / "shrunk", sizes=(7, 5))
    found = verify_latents(latents_config(made, dataset=str(made / "shrunk")), 1.0)
    assert "train/000002: the dataset has no such shard any more" in found.problems
