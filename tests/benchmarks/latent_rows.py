"""Rows of latents for the loader's benchmark in every side's own form: our shards, plain tars, mapped arrays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import webdataset

from ldm.conditioning.text_embedding import TextEmbedding
from pipeline.latent_columns import ColumnsBuilder
from pipeline.latent_config import ColumnsConfig
from pipeline.latent_shard import MOMENTS, npy_bytes
from pipeline.store.manifest import FileRecord, ShardRecord, claim_root, commit_shard, publish_manifest, shard_path
from pipeline.store.schema import Split, key_of
from pipeline.store.shards import write_shard
from pipeline.text_table import distinct_captions, write_table

BATCH_SIZE = 64
SHARD_ROWS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class RowShape:
    """What a row holds."""

    name: str
    rows: int
    moments: tuple[int, int, int]
    min_tokens: int
    max_tokens: int
    width: int


SHAPES = (
    RowShape(name="256 px, MiniLM", rows=20_000, moments=(8, 32, 32), min_tokens=6, max_tokens=24, width=384),
    RowShape(name="512 px, CLIP", rows=1_536, moments=(8, 64, 64), min_tokens=77, max_tokens=77, width=768),
)
"""The last line speaks of the first."""


def write_all(shape: RowShape, home: Path) -> dict[str, int]:
    """Write the same rows as arrays, tars and our shards into a folder; return the bytes of each form."""
    dice = np.random.default_rng(0)
    lengths = dice.integers(shape.min_tokens, shape.max_tokens + 1, shape.rows)
    names = [(key_of(f"row {row}"), f"caption {row:06d} of {length} tokens") for row, length in enumerate(lengths)]
    _write_arrays(shape, home, lengths, dice)
    np.save(home / "lengths.npy", lengths)
    (home / "names.json").write_text(json.dumps(names))
    moments, states = (np.load(home / name, mmap_mode="r") for name in ("moments.npy", "states.npy"))
    crop = {"preprocessing": {"crop": {"count": 1}}}
    identity = {"max_tokens": shape.max_tokens, "flip": False, "latent_kind": "kl_moments", **crop}
    claim_root(str(home / "ours"), "latents", identity)
    (home / "webdataset").mkdir()
    for number, start in enumerate(range(0, shape.rows, SHARD_ROWS)):
        rows = range(start, min(start + SHARD_ROWS, shape.rows))
        texts = {names[row][1]: np.array(states[row, : lengths[row]]) for row in rows}
        _write_shard(home / "ours", f"{number:06d}", [names[row] for row in rows], np.array(moments[rows]), texts)
        _write_tar(home / "webdataset" / f"{number:06d}.tar", [names[row] for row in rows], moments[rows], texts)
    publish_manifest(str(home / "ours"), identity, "latents", {"shapes": [{"image_size": 8 * shape.moments[1]}]})
    return {
        "ours": sum(path.stat().st_size for path in (home / "ours" / "train").iterdir()),
        "webdataset": sum(path.stat().st_size for path in (home / "webdataset").iterdir()),
        "gather": sum((home / name).stat().st_size for name in ("moments.npy", "states.npy", "lengths.npy")),
    }


def _write_arrays(shape: RowShape, home: Path, lengths: np.ndarray, dice: np.random.Generator) -> None:
    whole = (shape.rows, *shape.moments)
    moments = np.lib.format.open_memmap(home / "moments.npy", "w+", np.float16, whole)
    padded = (shape.rows, shape.max_tokens, shape.width)
    states = np.lib.format.open_memmap(home / "states.npy", "w+", np.float16, padded)
    for row, length in enumerate(lengths):
        moments[row] = dice.random(shape.moments, np.float32)
        states[row, :length] = dice.random((length, shape.width), np.float32)


def _write_shard(
    root: Path, name: str, names: list[tuple[str, str]], moments: np.ndarray, texts: dict[str, np.ndarray]
) -> None:
    captions = [(caption,) for _, caption in names]
    distinct = distinct_captions(captions)
    numbers = {caption: number for number, caption in enumerate(distinct)}
    null = np.zeros((2, next(iter(texts.values())).shape[1]), np.float16)
    embeddings = [TextEmbedding(states=texts.get(caption, null)) for caption in distinct]
    columns = ColumnsBuilder(ColumnsConfig())
    side = 8 * moments.shape[-1]
    for row, (key, _) in enumerate(names):
        columns.add(row, key, {"width": side, "height": side}, [(0.0, 0.0, float(side), float(side))])
    rows = (
        {"__key__": key, MOMENTS: npy_bytes(one), "txt": caption.encode(), "json": b"{}"}
        for (key, caption), one in zip(names, moments, strict=True)
    )
    files = write_shard(str(root), Split.TRAIN, name, rows)
    files["text.safetensors"] = write_table(
        shard_path(str(root), Split.TRAIN, name, "text.safetensors"),
        distinct,
        [[numbers[caption] for caption in row] for row in captions],
        [len(embedding.states) for embedding in embeddings],
        [(range(len(distinct)), embeddings)],
    )
    content = columns.to_bytes()
    Path(shard_path(str(root), Split.TRAIN, name, "columns.safetensors")).write_bytes(content)
    files["columns.safetensors"] = FileRecord(len(content), "")
    part = {"name": "", "image_size": side, "size": [side, side], "num_rows": len(names)}
    details = {"parts": [part | {"moment_shape": list(moments.shape[1:])}]}
    record = ShardRecord(name=name, split=Split.TRAIN, num_rows=len(names), files=files, details=details)
    commit_shard(str(root), record)


def _write_tar(path: Path, names: list[tuple[str, str]], moments: np.ndarray, texts: dict[str, np.ndarray]) -> None:
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for (key, caption), one in zip(names, moments, strict=True):
            row = {"moments.npy": _npy(one), "states.npy": _npy(texts[caption]), "txt": caption.encode()}
            tar.write({"__key__": key, **row})


def _npy(array: np.ndarray) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()
