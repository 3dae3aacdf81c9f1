"""Laws of the loaders: every rank count sees the same rows, any start is a tail of the whole, errors are raised."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.numpy
import torch

from ldm.conditioning.text import TextEncoder, TextEncoderConfig, TextEncoderKind
from ldm.conditioning.text_embedding import condition_of
from ldm.types import Condition, LatentBatch
from pipeline.images import ImageBatch, ImageLoader, ImageLoaderConfig, decode_pixels, image_of_pixels
from pipeline.latent_shard import FLIPPED_MOMENTS, MOMENTS
from pipeline.loader import WINDOW_ROWS, LatentLoader, LoaderConfig
from pipeline.prefetch import prefetched
from pipeline.store.manifest import FileRecord, load_manifest
from pipeline.store.schema import Row, Split
from pipeline.store.shards import read_rows
from pipeline.text_table import open_text_table
from tests.tiny_latents import write_latents
from tests.tiny_text import encoder_config, write_sdxl

NUM_TRAIN = 18


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_latents(folder, flip=True)
    return folder


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents whose text encoder is a pair with a pooled output."""
    folder = tmp_path_factory.mktemp("pooled")
    write_latents(folder, text=encoder_config(TextEncoderKind.SDXL, write_sdxl(folder / "text")))
    return folder


def latent_loader(folder: Path, rank: int = 0, world: int = 1, **fields: object) -> LatentLoader:
    settings: dict[str, object] = {"root": str(folder / "latents"), "batch_size": 4, "num_streams": 4, "block_rows": 3}
    config = LoaderConfig(**(settings | fields))  # type: ignore[arg-type]
    return LatentLoader(load_manifest(str(folder / "latents")), config, rank, world)


def image_loader(folder: Path, rank: int = 0, world: int = 1, **fields: object) -> ImageLoader:
    settings: dict[str, object] = {"root": str(folder / "dataset"), "batch_size": 4, "num_streams": 4, "block_rows": 3}
    config = ImageLoaderConfig(**(settings | fields))  # type: ignore[arg-type]
    return ImageLoader(load_manifest(str(folder / "dataset")), config, rank, world)


def rows_of(folder: Path, part: str, split: Split = Split.TRAIN) -> list[Row]:
    tars = sorted((folder / part / split.value).glob("*.tar"))
    return [row for tar in tars for row in read_rows(str(tar))]


def joined(batches: Sequence[LatentBatch]) -> dict[int, tuple[str, bytes, bytes, bytes]]:
    """Return everything a row carries, by its position."""
    return {
        int(batch.samples[row]): (
            batch.keys[row],
            batch.moments[row].numpy().tobytes(),
            states_of(batch.condition)[row].numpy().tobytes(),
            mask_of(batch.condition)[row].numpy().tobytes(),
        )
        for batch in batches
        for row in range(len(batch.keys))
    }


def states_of(condition: Condition) -> torch.Tensor:
    assert condition.states is not None
    return condition.states


def mask_of(condition: Condition) -> torch.Tensor:
    assert condition.mask is not None
    return condition.mask


def take(batches: Iterator[LatentBatch], number: int) -> list[LatentBatch]:
    return list(islice(batches, number))


@pytest.mark.parametrize("world", [2, 4])
def test_loader_global_batches_are_the_same_rows_on_every_number_of_ranks(made: Path, world: int) -> None:
    alone = take(latent_loader(made).batches(), 11)  # two epochs and a part
    shares = [take(latent_loader(made, rank, world).batches(), 11) for rank in range(world)]
    for number, whole in enumerate(alone):
        parts = [share[number] for share in shares]
        assert {len(part.keys) for part in parts} == {4 // world}
        assert joined(parts) == joined([whole])


def test_loader_start_at_samples_seen_is_the_tail_of_the_unbroken_sequence(made: Path) -> None:
    unbroken = take(latent_loader(made).batches(), 12)
    for seen in (4, 20, 36):
        resumed = take(latent_loader(made).batches(seen), 3)
        assert joined(resumed) == joined(unbroken[seen // 4 : seen // 4 + 3])
    # A start that is no multiple of the batch, as after a change of batch size, goes on at that very row.
    odd = joined(take(latent_loader(made).batches(5), 3))
    everything = joined(unbroken)
    assert odd == {position: everything[position] for position in range(5, 17)}


def test_loader_positions_run_on_over_every_seam_of_its_gathers(made: Path) -> None:
    num_batches = 2 * WINDOW_ROWS // 4 + 3
    unbroken = take(latent_loader(made).batches(), num_batches)
    assert torch.equal(torch.cat([batch.samples for batch in unbroken]), torch.arange(4 * num_batches))
    resumed = take(latent_loader(made).batches(20), num_batches - 5)
    assert joined(resumed) == joined(unbroken[5:])


def test_loader_epoch_holds_every_row_once_with_its_own_moments_and_one_of_its_captions(made: Path) -> None:
    by_key = {row["__key__"]: row for row in rows_of(made, "latents")}
    encoder = TextEncoder(TextEncoderConfig(max_tokens=16), torch.device("cpu"))
    batches = take(latent_loader(made, batch_size=6, num_streams=2, caption_dropout=0.0).batches(), 3)
    assert sorted(key for batch in batches for key in batch.keys) == sorted(by_key)
    chosen = []
    forms = []
    for batch in batches:
        assert batch.moments.dtype == torch.float32
        for place, key in enumerate(batch.keys):
            row = by_key[key]
            stored = [np.load(io.BytesIO(row[name])).astype(np.float32) for name in (MOMENTS, FLIPPED_MOMENTS)]
            forms += [form for form in (0, 1) if np.array_equal(stored[form], batch.moments[place].numpy())]
            captions = json.loads(row["json"])["captions"]
            own = condition_of(encoder.encode(captions), 16)
            given_states, given_mask = states_of(batch.condition)[place], mask_of(batch.condition)[place]
            fits = [
                torch.equal(given_mask, one_mask) and bool((given_states - one_states).abs().max() < 1e-2)
                for one_states, one_mask in zip(states_of(own), mask_of(own), strict=True)
            ]
            chosen.append(fits.index(True))
    assert set(chosen) == {0, 1}
    assert len(forms) == NUM_TRAIN
    assert set(forms) == {0, 1}


def test_loader_dropout_share_is_the_one_asked_for(made: Path) -> None:
    loader = latent_loader(made, batch_size=200, caption_dropout=0.3)
    null = states_of(loader.null_condition(1))[0]
    states = torch.cat([states_of(batch.condition) for batch in take(loader.batches(), 10)])
    dropped = (states == null).flatten(1).all(dim=1).double().mean().item()
    assert dropped == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 2000) ** 0.5)
    for share in (0.0, 1.0):
        batch = take(latent_loader(made, caption_dropout=share).batches(), 1)[0]
        assert ((states_of(batch.condition) == null).flatten(1).all(dim=1) == bool(share)).all()


def test_loader_null_condition_is_the_embedding_of_the_empty_caption(made: Path) -> None:
    encoder = TextEncoder(TextEncoderConfig(max_tokens=16), torch.device("cpu"))
    own = condition_of(encoder.encode([""]) * 3, 16)
    null = latent_loader(made).null_condition(3)
    assert torch.equal(states_of(null), states_of(own))
    assert torch.equal(mask_of(null), mask_of(own))
    assert null.pooled is None


def test_loader_pooled_text_is_that_of_the_caption_whose_states_are_drawn(pooled: Path) -> None:
    tables = [open_text_table(path) for path in (pooled / "latents" / "train").glob("*.text.safetensors")]
    pooled_of_states = {
        table.embedding(caption).states.astype(np.float32).tobytes(): table.embedding(caption).pooled
        for table in tables
        for caption in range(len(table.offsets) - 1)
    }
    encoder = TextEncoder(encoder_config(TextEncoderKind.SDXL, pooled / "text"), torch.device("cpu"))
    empty = encoder.encode([""])[0].pooled
    drawn = []
    for batch in take(latent_loader(pooled, caption_dropout=0.3).batches(), 9):
        for states, vector in zip(states_of(batch.condition), batch.condition.pooled, strict=True):
            expected = pooled_of_states[states.numpy().tobytes()]
            assert vector.numpy().astype(np.float16).tobytes() == expected.tobytes()
            drawn.append(expected.tobytes())
    assert empty.tobytes() in drawn
    assert len(set(drawn)) > 5
    loader = latent_loader(pooled, caption_dropout=1.0)
    null = loader.null_condition(4).pooled
    assert null.numpy().tobytes() == np.stack([empty] * 4).astype(np.float32).tobytes()
    assert torch.equal(take(loader.batches(), 1)[0].condition.pooled, null)
    assert not torch.equal(loader.rows(0, 4).condition.pooled, null)


def test_loader_shard_without_the_pooled_text_of_the_others_is_refused(pooled: Path, tmp_path: Path) -> None:
    shutil.copytree(pooled / "latents", tmp_path / "latents")
    path = tmp_path / "latents" / "train" / "000001.text.safetensors"
    stored = safetensors.numpy.load_file(path)
    content = safetensors.numpy.save({name: part for name, part in stored.items() if name != "pooled"})
    path.write_bytes(content)
    manifest = load_manifest(str(tmp_path / "latents"))
    record = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    shards = [
        dataclasses.replace(shard, files={**shard.files, "text.safetensors": record})
        if (shard.split, shard.name) == (Split.TRAIN, "000001")
        else shard
        for shard in manifest.shards
    ]
    manifest = dataclasses.replace(manifest, shards=tuple(shards))
    config = LoaderConfig(root=str(tmp_path / "latents"), batch_size=4, num_streams=4, block_rows=3)
    loader = LatentLoader(manifest, config)
    assert loader.rows(0, 7).condition.pooled is not None
    assert loader.rows(7, 12).condition.pooled is None
    with pytest.raises(ValueError, match="13 of 18 rows have pooled text"):
        loader.rows(0, 18)


def test_loader_rows_are_the_manifests_with_first_captions_and_nothing_drawn(made: Path) -> None:
    loader = latent_loader(made, split=Split.VALIDATION, caption_dropout=1.0, seed=5)
    rows = rows_of(made, "latents", Split.VALIDATION)
    batch = loader.rows(1, 4)
    assert batch.keys == tuple(row["__key__"] for row in rows[1:4])
    stored = np.stack([np.load(io.BytesIO(row[MOMENTS])) for row in rows[1:4]]).astype(np.float32)
    assert np.array_equal(batch.moments.numpy(), stored)
    assert loader.captions(0, 4) == [row["txt"].decode() for row in rows]
    assert joined([batch]) == joined([latent_loader(made, split=Split.VALIDATION, seed=9).rows(1, 4)])
    with pytest.raises(ValueError, match=r"rows \[3, 5\) are not within the split's 4"):
        loader.rows(3, 5)


def test_loader_epochs_and_seeds_differ(made: Path) -> None:
    batches = take(latent_loader(made, batch_size=6, num_streams=2).batches(), 6)
    other_batches = take(latent_loader(made, batch_size=6, num_streams=2, seed=1).batches(), 3)
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys[:18]) == sorted(keys[18:])
    assert keys[:18] != keys[18:]
    assert keys[:18] != [key for batch in other_batches for key in batch.keys]


@pytest.mark.parametrize("world, fields, named", [(3, {}, "num_streams=4"), (4, {"batch_size": 6}, "batch_size=6")])
def test_loader_world_that_does_not_divide_is_refused(
    made: Path, world: int, fields: dict[str, int], named: str
) -> None:
    with pytest.raises(ValueError, match=f"{named}, got {world} ranks"):
        latent_loader(made, 0, world, **fields)
    with pytest.raises(ValueError, match=f"{named}, got {world} ranks"):
        image_loader(made, 0, world, **fields)


@pytest.mark.parametrize("suffix", ["tar", "index", "text.safetensors"])
def test_loader_missing_truncated_and_altered_files_are_refused_by_name(
    made: Path, tmp_path: Path, suffix: str
) -> None:
    shutil.copytree(made / "latents", tmp_path / "latents")
    path = tmp_path / "latents" / "train" / f"000001.{suffix}"
    content = path.read_bytes()
    latent_loader(tmp_path, has_digest_check=True)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"000001.{suffix} has sha256"):
        latent_loader(tmp_path, has_digest_check=True)
    path.write_bytes(content[:-1])
    with pytest.raises(
        ValueError, match=f"000001.{suffix} has {len(content) - 1} bytes, the manifest says {len(content)}"
    ):
        latent_loader(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=f"000001.{suffix} is missing"):
        latent_loader(tmp_path)


@pytest.fixture
def remote_root(made: Path) -> Iterator[str]:
    """The latents on a file system that is not this machine's disk."""
    memory = fsspec.filesystem("memory")
    memory.put(str(made / "latents"), "/latents", recursive=True)
    yield "memory://latents"
    memory.rm("/latents", recursive=True)


def test_loader_of_a_remote_root_reads_verified_copies(made: Path, remote_root: str, tmp_path: Path) -> None:
    manifest = load_manifest(remote_root)
    with pytest.raises(ValueError, match="give a cache_folder"):
        LatentLoader(manifest, LoaderConfig(root=remote_root, batch_size=4))
    config = LoaderConfig(root=remote_root, batch_size=4, num_streams=4, block_rows=3, cache_folder=str(tmp_path))
    expected = joined(take(latent_loader(made).batches(), 6))
    assert joined(take(LatentLoader(manifest, config).batches(), 6)) == expected
    assert not list(tmp_path.rglob("*.partial"))
    fsspec.filesystem("memory").pipe("/latents/train/000000.tar", b"altered")
    assert joined(take(LatentLoader(manifest, config).batches(), 6)) == expected  # the copies are there
    other = dataclasses.replace(config, cache_folder=str(tmp_path / "fresh"))
    with pytest.raises(ValueError, match=r"000000.tar has sha256 \w+, the manifest says"):
        take(LatentLoader(manifest, other).batches(), 6)


def test_loader_damage_behind_its_back_is_raised_in_the_consumer(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "latents", tmp_path / "latents")
    loader = latent_loader(tmp_path)
    (tmp_path / "latents" / "train" / "000002.index").unlink()
    with pytest.raises(FileNotFoundError, match="000002.index"):
        take(loader.batches(), 6)


def test_prefetch_keeps_order_bounds_its_lead_and_ends_its_thread() -> None:
    made_pieces: list[int] = []
    waits: list[float] = []

    def produce(piece: int) -> int:
        made_pieces.append(piece)
        return piece * piece

    before = threading.active_count()
    results = prefetched(produce, iter(range(1000)), 3, waits.append)
    assert list(islice(results, 5)) == [0, 1, 4, 9, 16]
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert len(made_pieces) <= 5 + 3
    assert len(waits) == 5


def test_prefetch_error_comes_at_its_own_piece() -> None:
    results = prefetched(lambda piece: 6 // piece, iter([3, 2, 0, 1]), 4, lambda seconds: None)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_loader_records_what_the_consumer_waited(made: Path) -> None:
    loader = latent_loader(made)
    assert loader.wait_seconds == 0.0
    take(loader.batches(), 1)
    assert loader.wait_seconds > 0.0


def images_by_position(batches: Sequence[ImageBatch]) -> dict[int, tuple[str, bytes]]:
    return {
        int(batch.samples[row]): (batch.keys[row], batch.images[row].numpy().tobytes())
        for batch in batches
        for row in range(len(batch.keys))
    }


def test_images_come_in_the_order_of_the_latents(made: Path) -> None:
    images = list(islice(image_loader(made).batches(8), 5))
    latents = take(latent_loader(made).batches(8), 5)
    assert [batch.keys for batch in images] == [batch.keys for batch in latents]


@pytest.mark.parametrize("max_cached_bytes", [0, 16 * 16 * 3 * 5, 1 << 30])
def test_images_do_not_depend_on_ranks_start_or_cache(made: Path, max_cached_bytes: int) -> None:
    whole = images_by_position(list(islice(image_loader(made).batches(), 10)))
    shares = [
        batch
        for rank in range(2)
        for batch in islice(image_loader(made, rank, 2, max_cached_bytes=max_cached_bytes).batches(4), 9)
    ]
    assert images_by_position(shares) == {position: row for position, row in whole.items() if position >= 4}


def test_images_are_the_stored_pixels_or_their_mirror_images(made: Path) -> None:
    pixels = {row["__key__"]: decode_pixels(row["png"]) for row in rows_of(made, "dataset")}
    mirrored = 0
    for batch in islice(image_loader(made).batches(), 9):
        assert batch.images.dtype == torch.float32
        for key, image in zip(batch.keys, batch.images, strict=True):
            plain = image_of_pixels([pixels[key]])[0]
            is_mirrored = not torch.equal(image, plain)
            assert torch.equal(image.flip(-1) if is_mirrored else image, plain)
            mirrored += is_mirrored
    assert 8 <= mirrored <= 28  # 36 fair coins, beyond three deviations
    unflipped = next(iter(image_loader(made, has_flips=False).batches()))
    assert torch.equal(unflipped.images, image_of_pixels([pixels[key] for key in unflipped.keys]))


def test_images_rows_are_the_manifests_from_minus_one_to_one(made: Path) -> None:
    batch = image_loader(made, split=Split.VALIDATION).rows(0, 4)
    rows = rows_of(made, "dataset", Split.VALIDATION)
    assert batch.keys == tuple(row["__key__"] for row in rows)
    expected = np.stack([decode_pixels(row["png"]) for row in rows]).transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(batch.images.numpy(), expected, atol=1e-6)
    black, white = np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 255, np.uint8)
    assert image_of_pixels([black, white]).flatten().tolist() == [-1.0] * 3 + [1.0] * 3
