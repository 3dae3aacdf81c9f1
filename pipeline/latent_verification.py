"""A finished latent cache against its dataset: every byte by digest, and a sample of rows encoded once more.

The sample is chosen by the rows' keys, so it is the same wherever it is drawn. Rows are encoded in other batches than
when they were stored, which moves the last bits: moments may differ by a share of their channel's deviation.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16, Float64

from ldm.conditioning.text import TextEncoder
from ldm.conditioning.text_embedding import TextEmbedding
from pipeline.encode import TEXT_SUFFIX, Encoder, LatentsConfig, Precision, on_this_machine
from pipeline.latent_plan import plan_latents
from pipeline.latent_shard import MOMENTS
from pipeline.store.manifest import Manifest, ShardRecord, claim_root, load_manifest, shard_path, verify
from pipeline.store.schema import Row
from pipeline.store.shards import read_index, read_row
from pipeline.text_table import open_text_table

TOLERANCES = {Precision.FP32: 0.01, Precision.BF16: 0.2, Precision.FP16: 0.05}
"""How far a moment may be from the one that is stored, in standard deviations of its channel."""
TEXT_TOLERANCE = 0.01
"""How far a number of an embedding may be from the one that is stored, as a share of the largest one."""
_KEYS = 16**8


@dataclass(frozen=True, slots=True)
class LatentVerification:
    """What verifying a cache found.

    Attributes:
        num_rows: rows in the cache.
        num_encoded: rows that were encoded once more.
        furthest: largest difference of a moment, in standard deviations of its channel.
        problems: one sentence each; empty where all is well.
    """

    num_rows: int
    num_encoded: int
    furthest: float
    problems: tuple[str, ...]


def verify_latents(config: LatentsConfig, share: float) -> LatentVerification:
    """Compare a finished cache with its records, and a share of its rows with what the networks say now.

    Raises:
        ValueError: if there is no finished cache, or it was made of other networks or otherwise than `config` says.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"the share of rows to encode again must lie in [0, 1], got {share}")
    manifest = load_manifest(config.root)
    plan = plan_latents(config)
    claim_root(config.root, plan.kind, plan.identity)
    problems = verify(config.root)
    source_of = {(task.split, task.name): task.source_name for task in plan.tasks}
    again = _Again(config, manifest)
    for shard in manifest.shards if share and not problems else ():
        rows = sampled(read_index(shard_path(config.root, shard.split, shard.name, "index")).keys, share)
        if rows:
            problems += again.compare(shard, source_of[shard.split, shard.name], rows)
    return LatentVerification(
        num_rows=sum(shard.num_rows for shard in manifest.shards),
        num_encoded=again.num_encoded,
        furthest=again.furthest,
        problems=tuple(problems),
    )


def sampled(keys: Sequence[str], share: float) -> list[int]:
    """Return which rows of a shard are in the sample: those whose key says so, and at least the one with the least."""
    chosen = [row for row, key in enumerate(keys) if int(key[:8], 16) < share * _KEYS]
    return chosen or [min(range(len(keys)), key=keys.__getitem__)]


class _Again:
    """Encodes rows once more and counts what differs."""

    def __init__(self, config: LatentsConfig, manifest: Manifest) -> None:
        self.config = config
        self.num_encoded = 0
        self.furthest = 0.0
        self._std: Float64[np.ndarray, " c"] = np.array(manifest.summary["std"])
        self._encoder = Encoder(config)
        self._text = TextEncoder(config.text, self._encoder.device)

    def compare(self, shard: ShardRecord, source: str, rows: Sequence[int]) -> Iterator[str]:
        """Yield what is wrong with some rows of one shard."""
        source_index = read_index(f"{source.removesuffix('.tar')}.index")
        tar = shard_path(self.config.root, shard.split, shard.name, "tar")
        index = read_index(tar.removesuffix("tar") + "index")
        here = f"{shard.split.value}/{shard.name}"
        if index.keys != source_index.keys:
            yield f"{here}: its rows are not those of {source}"
            return
        for start in range(0, len(rows), self.config.batch_size):
            batch = rows[start : start + self.config.batch_size]
            stored = [read_row(tar, index, row) for row in batch]
            made = self._encoder.encode(self._encoder.images([read_row(source, source_index, row) for row in batch]))
            yield from self._moment_problems(here, stored, made.half().cpu().numpy())
            yield from self._text_problems(here, shard, stored)

    def _moment_problems(self, here: str, stored: Sequence[Row], made: Float16[np.ndarray, "b m h w"]) -> Iterator[str]:
        tolerance = TOLERANCES[self.config.precision]
        for row, moments in zip(stored, made, strict=True):
            there = np.load(io.BytesIO(row[MOMENTS]))
            means = np.split(moments.astype(np.float64) - there, 2)[0]
            apart = float((np.abs(means).max(axis=(1, 2)) / self._std).max())
            self.num_encoded += 1
            self.furthest = max(self.furthest, apart)
            if not apart <= tolerance:
                yield (
                    f"{here}: the moments of row {row['__key__']} are {apart:.3g} standard deviations from what the "
                    f"autoencoder gives for its picture; at most {tolerance:g} come from rounding"
                )

    def _text_problems(self, here: str, shard: ShardRecord, stored: Sequence[Row]) -> Iterator[str]:
        url = shard_path(self.config.root, shard.split, shard.name, TEXT_SUFFIX)
        with on_this_machine(url) as path:
            table = open_text_table(path)
            for row in stored:
                facts = json.loads(row["json"])
                made = self._text.encode(facts["captions"])
                for caption, number, embedding in zip(facts["captions"], facts["text_index"], made, strict=True):
                    if table.text(number) != caption:
                        yield f"{here}: caption {number} of row {row['__key__']} is not {caption!r} in the text table"
                    elif not _is_same(table.embedding(number), embedding):
                        yield f"{here}: the embedding of {caption!r} is not the text encoder's"


def _is_same(there: TextEmbedding, made: TextEmbedding) -> bool:
    """Say whether stored states and pooled output are those of the text encoder."""
    if there.pooled is None or made.pooled is None:
        return there.pooled is made.pooled and _is_near(there.states, made.states)
    return _is_near(there.states, made.states) and _is_near(there.pooled, made.pooled)


def _is_near(there: Float16[np.ndarray, "*_"], made: Float16[np.ndarray, "*_"]) -> bool:
    if there.shape != made.shape:
        return False
    apart = np.abs(there.astype(np.float64) - made).max()
    return bool(apart <= TEXT_TOLERANCE * np.abs(made.astype(np.float64)).max())
