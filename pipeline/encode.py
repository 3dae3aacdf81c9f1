"""Dataset shards → latent shards: raw posterior moments and text, checked before they are published.

Order for each shard: facts of all rows → a part for each shape → for each part, batches of rows: read and decoded on
threads → crops → encoder → fp16 moments, each on a thread of its own, ahead of what needs it → tar, while the gate
counts and keeps a few rows → gate judges at the end → columns → distinct captions embedded, batch by batch → text
table → record. Dropout, flips and the choice of crop and caption are no part of this: they are drawn when rows are
loaded. What is in memory are some batches, and the captions of one shard with their tokens; never all of its pictures,
moments or embeddings.

Letters: b batch, m moment channel, h latent row, w latent column.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import numpy as np
import yaml

from ldm.conditioning.text import TextEncoder
from ldm.conditioning.text_embedding import TextEmbedding
from ldm.interop.diffusers import weights_digest
from ldm.storage import copy_file, is_local, join, read_text, remove_file, write_bytes
from ldm.types import Image, Moments
from pipeline.crops import Part, crop_boxes, original_box, parts_of
from pipeline.effort import StageTimers
from pipeline.encoder import Encoder, Prepared
from pipeline.images import image_suffix
from pipeline.ingest.picture import PictureConfig
from pipeline.latent_columns import ColumnsBuilder
from pipeline.latent_config import LatentsConfig, TextStorage
from pipeline.latent_gate import EncodedBatch, Gate, evaluated_psnr, stored_form
from pipeline.latent_shard import PART_SUFFIXES, TEXT_SUFFIX, moments_name, npy_bytes, part_file
from pipeline.plan import ShardTask
from pipeline.prefetch import prefetched
from pipeline.store.manifest import IDENTITY_NAME, FileRecord, ShardRecord, shard_path
from pipeline.store.schema import JSON, Row
from pipeline.store.shards import ShardIndex, read_index, write_shard
from pipeline.text_table import TokenIds, distinct_captions, token_table_bytes, write_table

NUM_BATCHES_AHEAD = 2


@dataclass(frozen=True, slots=True)
class _Source:
    """A dataset's tar on this machine, read by its index, and what its rows' JSON says."""

    path: Path
    index: ShardIndex
    facts: Sequence[Mapping[str, Any]]
    captions: Sequence[Sequence[str]]
    choices: Sequence[Sequence[int]]

    def row(self, number: int, suffixes: Sequence[str]) -> Row:
        """Return some members of a row."""
        return {"__key__": self.index.keys[number], **{name: self.member(number, name) for name in suffixes}}

    def member(self, row: int, suffix: str) -> bytes:
        """Return one member of a row."""
        return member(self.path, self.index, row, suffix)


class EncodeStage:
    """Makes the shards of one latent cache; built once in each worker, called from any number of threads.

    The networks take one batch at a time, so that memory and bytes are those of one shard at a time.
    """

    def __init__(self, config: LatentsConfig, autoencoder_digest: str = "") -> None:
        """Load both networks, and what the autoencoder's evaluation says that a shard must reach.

        Raises:
            ValueError: if the autoencoder at its address is not the one of the given digest any more.
        """
        self.config = config
        self._picture = picture_config(config.dataset)
        self._encoder = Encoder(config)
        model = self._encoder.autoencoder
        if autoencoder_digest and (found := weights_digest(model.state_dict(), model.config)) != autoencoder_digest:
            raise ValueError(
                f"{config.autoencoder} has digest {found}, it had {autoencoder_digest} when the job began: what lies "
                "there has changed"
            )
        self._floor = config.gate.floor(evaluated_psnr(config.autoencoder, self._encoder.autoencoder))
        self._text = TextEncoder(config.text, self._encoder.device)
        # Alone in its batch, so that every shard holds the same bytes for the null condition.
        self._null_embedding = self._text.encode([""])[0]
        self._network = Lock()
        self._timers: dict[ShardTask, StageTimers] = {}

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Publish a shard's tars, indexes, columns and text table and return their record.

        Raises:
            ValueError: if the shard fails its gate, naming rows and figures; nothing is published then.
        """
        index = read_index(f"{task.source_name.removesuffix('.tar')}.index")
        num_rows = len(index.keys)
        if not num_rows or num_rows != task.num_rows:
            raise ValueError(f"{task.source_name} has {num_rows} rows, its manifest says {task.num_rows}")
        with on_this_machine(task.source_name) as path:
            facts = [json.loads(member(path, index, row, "json")) for row in range(num_rows)]
            ColumnsBuilder(self.config.columns).check(index.keys, facts)
            captions = [tuple(fact["captions"]) or ("",) for fact in facts]
            distinct = distinct_captions(captions)
            number_of_caption = {caption: number for number, caption in enumerate(distinct)}
            choices = [[number_of_caption[caption] for caption in row] for row in captions]
            self._timers[task] = StageTimers()
            source = _Source(path, index, facts, captions, choices)
            parts = parts_of([(int(fact["width"]), int(fact["height"])) for fact in facts], self.config)
            plain = [moments_name(crop) for crop in range(self.config.crop.count)]
            sizes = [len(part.rows) for part in parts]
            gate = Gate(self.config.gate, self._floor, task, sizes, plain, self._encoder.kind)
            files = self._write_parts(task, source, parts, gate)
        files[TEXT_SUFFIX] = self._write_text(task, distinct, choices)
        return ShardRecord(
            name=task.name,
            split=task.split,
            num_rows=num_rows,
            files=files,
            counts={"ok": num_rows},
            source=task.source_digest,
            details={
                "parts": [
                    {
                        "name": part.name,
                        "image_size": part.image_size,
                        "size": list(part.size),
                        "num_rows": len(part.rows),
                        "moment_shape": list(shape),
                        "statistics": statistics.to_dict(),
                    }
                    for part, shape, statistics in zip(parts, gate.moment_shapes, gate.statistics, strict=True)
                ],
                "gate": {"rows": [list(row) for row in gate.chosen], "psnr": gate.figures, "floor": self._floor},
                **self._text_widths(),
                "num_captions": len(distinct),
                "num_truncated": self._num_truncated(distinct),
            },
        )

    def take_timers(self, task: ShardTask) -> StageTimers:
        """Return what a shard took that was just made, and forget it."""
        return self._timers.pop(task)

    def _write_parts(
        self, task: ShardTask, source: _Source, parts: Sequence[Part], gate: Gate
    ) -> dict[str, FileRecord]:
        """Write the tars of all parts and what lies beside them; none of them is left if the gate refuses."""
        files: dict[str, FileRecord] = {}
        try:
            for number, part in enumerate(parts):
                columns = ColumnsBuilder(self.config.columns)
                # The gate stands at the end of the last one's rows: if it refuses, that tar is not published either.
                members = self._members(source, parts, number, columns, gate)
                made = write_shard(self.config.root, task.split, f"{task.name}{_dotted(part)}", members)
                files |= {part_file(part.name, suffix): record for suffix, record in made.items()}
                suffix = part_file(part.name, PART_SUFFIXES[2])
                files[suffix] = self._write(task, suffix, columns.to_bytes())
        except ValueError:
            for suffix in files:
                remove_file(shard_path(self.config.root, task.split, task.name, suffix))
            raise
        return files

    def _members(
        self, source: _Source, parts: Sequence[Part], number: int, columns: ColumnsBuilder, gate: Gate
    ) -> Iterator[Row]:
        """Yield the rows of one part's tar as they are encoded, and let the gate judge behind the last part's."""
        part = parts[number]
        for batch in self._batches(source, part, number, gate):
            rows = part.rows[batch.first : batch.first + len(batch.is_bad)]
            gate.take(batch, [source.index.keys[row] for row in rows])
            for place, row in enumerate(rows):
                arrays = {name: form[place] for name, form in (batch.forms | batch.stored).items()}
                yield self._member(source, row, part, columns, arrays)
        if number + 1 == len(parts):
            gate.judge(self._decoded)

    def _decoded(self, moments: Moments) -> Image:
        with self._network:
            return self._encoder.decode(moments)

    def _batches(self, source: _Source, part: Part, number: int, gate: Gate) -> Iterator[EncodedBatch]:
        """Yield a part's batches: rows are read and decoded on one thread, encoded on the next."""
        step = batch_rows(self.config, part)
        starts = iter(range(0, len(part.rows), step))
        timers = self._timers[gate.task]
        suffixes = [image_suffix(source.index.suffixes)]
        suffixes += [self.config.columns.map_member] if self.config.columns.map_member else []

        def read(start: int) -> tuple[int, Prepared]:
            rows = [source.row(row, suffixes) for row in part.rows[start : start + step]]
            return start, self._encoder.prepare(rows, part)

        def encode(piece: tuple[int, Prepared]) -> EncodedBatch:
            first, prepared = piece
            images = prepared.images[0]
            with self._network, timers.busy():  # `stored_form` awaits a GPU
                made = {name: stored_form(moments) for name, moments in self._encoder.forms(prepared)}
            return EncodedBatch(
                part=number,
                first=first,
                forms={name: stored for name, (stored, _, _) in made.items()},
                stored=prepared.stored,
                faults=sum((faults for _, faults, _ in made.values()), Counter()),
                is_bad=np.logical_or.reduce([is_bad for _, _, is_bad in made.values()]),
                crops=images[gate.chosen_of(number, first, len(images))],
            )

        with (
            closing(prefetched(read, starts, NUM_BATCHES_AHEAD, timers.waited)) as prepared,
            closing(prefetched(encode, prepared, 1, _ignore)) as batches,
        ):
            yield from batches

    def _member(self, source: _Source, row: int, part: Part, columns: ColumnsBuilder, arrays: Mapping[str, Any]) -> Row:
        """Return one row of a part's tar."""
        key, fact = source.index.keys[row], source.facts[row]
        stored = crop_boxes(key, int(fact["width"]), int(fact["height"]), part.size, self.config.crop.count)
        told = columns.add(row, key, fact, [original_box(box, fact, self._picture) for box in stored])
        facts = {"captions": list(source.captions[row]), "text_index": list(source.choices[row]), **told}
        content = {name: npy_bytes(array) for name, array in arrays.items()}
        text = {"txt": source.captions[row][0].encode(), "json": _json_bytes(facts)}
        return {"__key__": key, **content, **text}

    def _text_widths(self) -> dict[str, JSON]:
        if self._text.pooled_width is None:
            return {"text_width": self._text.width}
        return {"text_width": self._text.width, "pooled_width": self._text.pooled_width}

    def _write(self, task: ShardTask, suffix: str, content: bytes) -> FileRecord:
        write_bytes(shard_path(self.config.root, task.split, task.name, suffix), content)
        return FileRecord(len(content), hashlib.sha256(content).hexdigest())

    def _num_truncated(self, captions: Sequence[str]) -> int:
        with self._network:  # a tokenizer serves one thread
            return self._text.count_truncated(captions)

    def _write_text(self, task: ShardTask, distinct: Sequence[str], choices: Sequence[Sequence[int]]) -> FileRecord:
        """Publish the shard's text table; embeddings go to disk as they are made."""
        is_online = self.config.text_storage is TextStorage.ONLINE
        with self._network:
            tokens = self._text.token_ids(distinct if is_online else distinct[1:])
        if is_online:
            return self._write(task, TEXT_SUFFIX, token_table_bytes(distinct, tokens, choices))
        lengths = [len(self._null_embedding.states), *map(len, tokens)]
        path = shard_path(self.config.root, task.split, task.name, TEXT_SUFFIX)
        return write_table(path, distinct, choices, lengths, self._embedded(tokens))

    def _embedded(self, tokens: Sequence[TokenIds]) -> Iterator[tuple[list[int], list[TextEmbedding]]]:
        """Yield numbers of captions and their embeddings, the empty one first; other shards may come in between."""
        yield [0], [self._null_embedding]
        parts = self._text.parts_of_tokens(tokens)
        while True:
            with self._network:
                part = next(parts, None)
            if part is None:
                return
            yield [1 + row for row in part[0]], part[1]


def batch_rows(config: LatentsConfig, part: Part) -> int:
    """Return how many rows of a part are encoded at once: of another size as many as have about as many pixels."""
    return max(1, config.batch_size * config.image_size**2 // part.image_size**2)


def picture_config(dataset: str) -> PictureConfig | None:
    """Return how a dataset placed its pictures, as its identity says; None where it does not."""
    said = json.loads(read_text(join(dataset, IDENTITY_NAME)))["identity"].get("picture")
    return PictureConfig.from_yaml(yaml.safe_dump(said)) if said else None


@contextmanager
def on_this_machine(url: str) -> Iterator[Path]:
    """Yield a local path of a file: itself, or a copy for as long as the block lasts."""
    if is_local(url) and "://" not in url:
        yield Path(url)
        return
    with TemporaryDirectory(prefix="ldm-encode-") as folder:
        copy_file(url, f"{folder}/shard.tar")
        yield Path(folder, "shard.tar")


def member(tar: Path, index: ShardIndex, row: int, suffix: str) -> bytes:
    """Return one member of a row of a tar on this machine."""
    column = index.column(suffix)
    with tar.open("rb") as file:
        return os.pread(file.fileno(), int(index.sizes[row, column]), int(index.offsets[row, column]))


def _dotted(part: Part) -> str:
    return f".{part.name}" if part.name else ""


def _json_bytes(facts: Mapping[str, JSON]) -> bytes:
    return json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()


def _ignore(seconds: float) -> None:
    """Nobody asks how long the tar waited for its moments."""
