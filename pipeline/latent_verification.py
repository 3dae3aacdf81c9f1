"""A finished latent cache against its dataset: every byte by digest, and a sample of rows encoded once more.

The sample is chosen by the rows' keys, so it is the same wherever it is drawn. Rows are encoded in other batches than
when they were stored, which moves the last bits: moments may differ by a share of their channel's deviation.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16, Float64

from ldm.conditioning.text import TextEncoder
from ldm.conditioning.text_embedding import TextEmbedding
from ldm.precision import Precision
from pipeline.crops import Part, parts_of
from pipeline.encode import batch_rows, member, on_this_machine
from pipeline.encoder import Encoder
from pipeline.latent_config import LatentsConfig, TextStorage
from pipeline.latent_plan import plan_latents
from pipeline.latent_shard import TEXT_SUFFIX, part_file
from pipeline.plan import Plan, ShardTask, missing
from pipeline.store.manifest import Manifest, ShardRecord, claim_root, load_manifest, shard_path, verify
from pipeline.store.schema import Row
from pipeline.store.shards import ShardIndex, read_index, read_row
from pipeline.text_table import TextTable, open_text_table

TOLERANCES = {Precision.FP32: 0.01, Precision.BF16: 0.2, Precision.FP16: 0.05}
"""How far a moment may be from the one that is stored, in standard deviations of its channel."""
LOG_VARIANCE_FACTOR = 10
"""A log-variance may be off by so many times the number above: fp16 holds large ones less finely."""
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
    problems += _dataset_problems(manifest, plan, missing(plan))
    again = _Again(config, manifest) if share and not problems else None
    if again is not None:
        for shard in manifest.shards:
            source = source_of[shard.split, shard.name]
            rows = sampled(read_index(f"{source.removesuffix('.tar')}.index").keys, share)
            problems += again.compare(shard, source, set(rows))
    return LatentVerification(
        num_rows=sum(shard.num_rows for shard in manifest.shards),
        num_encoded=again.num_encoded if again else 0,
        furthest=again.furthest if again else 0.0,
        problems=tuple(problems),
    )


def _dataset_problems(manifest: Manifest, plan: Plan, lacking: Sequence[ShardTask]) -> Iterator[str]:
    """Yield where the cache and its dataset, as that is now, do not hold the same shards."""
    wanted = {(task.split, task.name) for task in plan.tasks}
    for shard in manifest.shards:
        if (shard.split, shard.name) not in wanted:
            yield f"{shard.split.value}/{shard.name}: the dataset has no such shard any more"
    for task in lacking:
        yield f"{task.split.value}/{task.name}: the dataset's shard is new, or another than was encoded"


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

    def compare(self, shard: ShardRecord, source: str, rows: Set[int]) -> Iterator[str]:
        """Yield what is wrong with some rows of one shard, given by their numbers in the dataset's."""
        source_index = read_index(f"{source.removesuffix('.tar')}.index")
        here = f"{shard.split.value}/{shard.name}"
        table_url = shard_path(self.config.root, shard.split, shard.name, TEXT_SUFFIX)
        with on_this_machine(table_url) as path:
            table = open_text_table(path)
            if not self._is_same(table, 0, ""):
                yield f"{here}: the {self._stored_text} of the empty caption is not the text encoder's"
            for part in self._parts(source, source_index):
                tar = shard_path(self.config.root, shard.split, shard.name, part_file(part.name, "tar"))
                index = read_index(f"{tar.removesuffix('tar')}index")
                if index.keys != tuple(source_index.keys[row] for row in part.rows):
                    yield f"{here}: its rows are not those of {source}"
                    return
                places = [place for place, row in enumerate(part.rows) if row in rows]
                for start in range(0, len(places), batch_rows(self.config, part)):
                    batch = places[start : start + batch_rows(self.config, part)]
                    stored = [read_row(tar, index, place) for place in batch]
                    sources = [read_row(source, source_index, part.rows[place]) for place in batch]
                    yield from self._array_problems(here, part, stored, sources)
                    self.num_encoded += len(batch)
                    yield from self._text_problems(here, table, [part.rows[place] for place in batch], stored, sources)

    @property
    def _stored_text(self) -> str:
        return "list of token ids" if self.config.text_storage is TextStorage.ONLINE else "embedding"

    def _parts(self, source: str, index: ShardIndex) -> list[Part]:
        """Return the parts that a dataset's shard comes to."""
        with on_this_machine(source) as path:
            facts = [json.loads(member(path, index, row, "json")) for row in range(len(index.keys))]
        return parts_of([(int(fact["width"]), int(fact["height"])) for fact in facts], self.config)

    def _array_problems(self, here: str, part: Part, stored: Sequence[Row], sources: Sequence[Row]) -> Iterator[str]:
        """Yield which arrays of some rows are not what their pictures give now."""
        prepared = self._encoder.prepare(sources, part)
        for name, moments in self._encoder.forms(prepared):
            made = moments.half().cpu().numpy()
            yield from self._moment_problems(f"{here}: {name} of row", name, stored, made)
        for name, arrays in prepared.stored.items():
            for row, array in zip(stored, arrays, strict=True):
                if not np.array_equal(np.load(io.BytesIO(row[name])), array):
                    yield f"{here}: {name} of row {row['__key__']} is not what its picture gives"

    def _moment_problems(
        self, what: str, name: str, stored: Sequence[Row], made: Float16[np.ndarray, "b m h w"]
    ) -> Iterator[str]:
        tolerance = TOLERANCES[self.config.precision]
        for row, moments in zip(stored, made, strict=True):
            there = np.load(io.BytesIO(row[name]))
            off = moments.astype(np.float64) - there
            means, log_variances = off[: len(self._std)], off[len(self._std) :]  # VQ has none of the latter
            apart = float((np.abs(means).max(axis=(1, 2)) / self._std).max())
            self.furthest = max(self.furthest, apart)
            if not apart <= tolerance:
                yield (
                    f"{what} {row['__key__']} is {apart:.3g} standard deviations from what the autoencoder gives for "
                    f"its picture; at most {tolerance:g} come from rounding"
                )
            elif not np.abs(log_variances).max(initial=0.0) <= LOG_VARIANCE_FACTOR * tolerance:
                yield f"{what} {row['__key__']} has other log-variances than the autoencoder gives for its picture"

    def _text_problems(
        self, here: str, table: TextTable, rows: Sequence[int], stored: Sequence[Row], sources: Sequence[Row]
    ) -> Iterator[str]:
        for number, row, source in zip(rows, stored, sources, strict=True):
            facts, captions = json.loads(row["json"]), list(json.loads(source["json"])["captions"]) or [""]
            choices = table.choices[table.choice_offsets[number] : table.choice_offsets[number + 1]].tolist()
            named = [table.text(choice) for choice in choices]
            if not facts["captions"] == captions == named or row["txt"].decode() != captions[0]:
                yield f"{here}: the captions of row {row['__key__']} are not those of the dataset"
                continue
            for caption, choice in zip(captions, choices, strict=True):
                if not self._is_same(table, choice, caption):
                    yield f"{here}: the {self._stored_text} of {caption!r} is not the text encoder's"

    def _is_same(self, table: TextTable, choice: int, caption: str) -> bool:
        """Say whether what is stored of a caption is what the text encoder gives."""
        if self.config.text_storage is TextStorage.ONLINE:
            return np.array_equal(table.ids(choice), self._text.token_ids([caption])[0])
        return _is_same(table.embedding(choice), self._text.encode([caption])[0])


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
