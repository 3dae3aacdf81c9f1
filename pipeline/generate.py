"""Rows of a file of prompts → one tar of pictures, each with its words and all that made it.

Order for each shard: rows of a range → checked against what was planned → requests, or the reason why not → batches of
one size, sampler and kind, in the order of the rows, filled up to a fixed number → drawn on one thread, encoded on
others → tar in the order of the rows → ledger with a line for every picture that was asked for. A batch's rows and
their number depend on the shard's own rows only, so a shard has the same bytes whoever makes it, as often as it takes.

Letters: y pixel row, x pixel column.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from ldm.config import digest_of
from ldm.drawing import Drawing
from ldm.model_card import find_model
from ldm.model_sizes import ModelSizes
from ldm.requests import Picture, Request, draw_together
from ldm.safety import Safety
from ldm.text_to_image import load_text_to_image
from pipeline.encoder import torch_device
from pipeline.generate_config import GenerateConfig
from pipeline.ingest.transforms import encode
from pipeline.plan import ShardTask
from pipeline.prefetch import prefetched
from pipeline.prompt_admission import (
    BAD_SIZE,
    NOT_DRAWABLE,
    REFUSED_PICTURE,
    REFUSED_PROMPT,
    Admission,
    prompt_table,
)
from pipeline.prompts import Piece, PromptRow, digest_of_rows
from pipeline.store.ledger import LEDGER_SUFFIX, MAX_CAPTION_CHARS, LedgerLine, write_ledger
from pipeline.store.manifest import ShardRecord, shard_path
from pipeline.store.schema import JSON, Reject, Row, json_text, key_of
from pipeline.store.shards import write_shard

NUM_BATCHES_AHEAD = 1
NUM_CUT = "num_cut_prompts"
SEED_DIGITS = 8
"""Hex digits of a seed that is drawn for a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRange:
    """Which rows a shard is made of.

    Attributes:
        first: number of its first row, over all files.
        pieces: where they lie.
        repeats: rows of it of which equal ones stand before them, and how many, by their place in the shard.
    """

    first: int
    pieces: tuple[Piece, ...]
    repeats: Mapping[int, int]

    def to_json(self) -> str:
        """Return the text that `from_json` reads."""
        pieces = [[piece.file, piece.digest, piece.start, piece.stop] for piece in self.pieces]
        return json.dumps({"first": self.first, "pieces": pieces, "repeats": self.repeats}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> RowRange:
        """Return the range that `to_json` described."""
        raw = json.loads(text)
        names = ("file", "digest", "start", "stop")
        pieces = tuple(Piece(**dict(zip(names, piece, strict=True))) for piece in raw["pieces"])
        repeats = {int(place): number for place, number in raw["repeats"].items()}
        return cls(first=raw["first"], pieces=pieces, repeats=repeats)


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One picture that a row asks for.

    Attributes:
        position: among all pictures of its shard.
        source_row: the row's place in the shard.
        row: the row.
        repeat: how many equal rows stand before it in the file.
        number: among the row's pictures.
        seed: of its noise.
        key: its name.
    """

    position: int
    source_row: int
    row: PromptRow
    repeat: int
    number: int
    seed: int
    key: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """What became of one picture that was asked for."""

    asked: Asked
    request: Request | None
    picture: Picture | Reject


@dataclass(frozen=True, slots=True)
class _Outcome:
    line: LedgerLine
    members: Row | None
    position: int


class GenerateStage:
    """Makes tars of pictures; built once in each worker."""

    def __init__(self, config: GenerateConfig) -> None:
        """Load the model.

        Raises:
            ValueError: if the model of the given digest is not there any more.
        """
        self.config = config
        folder = find_model(config.model, config.model_digest)
        self._model = load_text_to_image(folder, torch_device(config.bulk.device))
        self._sizes = ModelSizes(trained=self._model.trained_size, multiple=self._model.multiple)
        self._table = prompt_table(config, self._model.card.conditioning)
        self._settings = settings_digest(config)
        self._safety = Safety(config.safety)
        self._admission = Admission(
            conditioning=self._model.card.conditioning,
            sizes=self._sizes,
            drawing=config.drawing,
            negative_prompt=config.negative_prompt,
            guidance=config.guidance,
            max_pixels=config.bulk.max_pixels,
        )

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Publish a shard's tar, index and ledger and return their record.

        Raises:
            ValueError: if the file of prompts has changed since the work was planned.
        """
        planned = RowRange.from_json(task.payload)
        rows = list(self._table.rows(planned.pieces))
        repeats = [planned.repeats.get(place, 0) for place in range(len(rows))]
        found = digest_of_rows(b"".join(bytes.fromhex(row.digest) for row in rows), repeats)
        if found != task.source_digest:
            raise ValueError(f"the rows of {task.source_name} are not those that were planned: start the job again")
        lines: list[LedgerLine] = []
        with closing(self._outcomes(self._asked(rows, repeats))) as outcomes:
            files = write_shard(self.config.bulk.root, task.split, task.name, _kept(_in_order(outcomes), lines))
        ledger = shard_path(self.config.bulk.root, task.split, task.name, LEDGER_SUFFIX)
        files[LEDGER_SUFFIX] = write_ledger(ledger, lines)
        counts = Counter(line.status for line in lines)
        return ShardRecord(
            name=task.name,
            split=task.split,
            num_rows=counts["ok"],
            files=files,
            counts=dict(sorted(counts.items())),
            source=task.source_digest,
            details={"first_row": planned.first, "num_source_rows": len(rows), NUM_CUT: sum(map(self._is_cut, rows))},
        )

    def _is_cut(self, row: PromptRow) -> bool:
        """Say whether a row, drawn or not, has words beyond those that the model reads."""
        words = [row.cells.get(name, "") for name in ("prompt", "to_prompt")]
        words.append(row.cells.get("negative_prompt", self.config.negative_prompt))
        return row.reject is None and any(self._model.is_cut(text) for text in words if text)

    def _asked(self, rows: Sequence[PromptRow], repeats: Sequence[int]) -> Iterator[Asked]:
        """Yield every picture that rows ask for."""
        count = self.config.bulk.images_per_prompt
        for place, (row, repeat) in enumerate(zip(rows, repeats, strict=True)):
            first_seed = seed_of(self.config.seed, row, repeat)
            for number in range(count):
                yield Asked(
                    position=place * count + number,
                    source_row=place,
                    row=row,
                    repeat=repeat,
                    number=number,
                    seed=first_seed + number,
                    key=key_of(f"{self._settings}:{row.digest}:{repeat}:{number}"),
                )

    def _outcomes(self, asked: Iterable[Asked]) -> Generator[_Outcome, None, None]:
        """Yield what became of each picture as it becomes known: one batch is drawn while another is encoded."""
        num_threads = max(1, int(self.config.bulk.num_cpus))
        with (
            ThreadPoolExecutor(num_threads) as encoders,
            closing(prefetched(self._drawn, self._batches(asked), NUM_BATCHES_AHEAD, _ignore)) as batches,
        ):
            for batch in batches:
                yield from encoders.map(self._outcome, batch)

    def _batches(self, asked: Iterable[Asked]) -> Iterator[list[tuple[Asked, Request | Reject]]]:
        """Yield what is drawn together, and by itself what can't be drawn.

        Together are rows of one size, sampler and kind, and of those whose guidance is 1 none but such: the network
        then sees half as many rows.
        """
        waiting: dict[tuple[object, ...], list[tuple[Asked, Request | Reject]]] = {}
        for one in asked:
            request = self._admission.request(one.row, one.seed, one.number)
            request = self._let_through(request)
            if isinstance(request, Reject):
                yield [(one, request)]
                continue
            assert request.drawing is not None
            group = (request.drawing, request.kind(), request.guidance == 1)
            waiting.setdefault(group, []).append((one, request))
            if len(waiting[group]) == self.batch_rows(request.drawing):
                yield waiting.pop(group)
        yield from waiting.values()

    def batch_rows(self, drawing: Drawing) -> int:
        """Return how many pictures of a size are sampled together: of another as many as have about as many pixels."""
        rows, columns = self._sizes.trained
        return max(1, self.config.bulk.batch_size * rows * columns // (drawing.height * drawing.width))

    def _drawn(self, batch: Sequence[tuple[Asked, Request | Reject]]) -> list[Drawn]:
        """Return the pictures of one batch, or why there are none."""
        requests = [request for _, request in batch if isinstance(request, Request)]
        if not requests:
            return [Drawn(one, None, refused) for one, refused in batch if isinstance(refused, Reject)]
        pictures = self._pictures(requests)
        return [
            Drawn(one, request, picture) for (one, _), request, picture in zip(batch, requests, pictures, strict=True)
        ]

    def _pictures(self, requests: Sequence[Request]) -> list[Picture | Reject]:
        """Return the pictures of requests of one batch; one that only the networks refuse costs no other its picture.

        What is drawn passes here through the filter, and is watermarked.
        """
        assert requests[0].drawing is not None
        drawing, num_rows = requests[0].drawing, self.batch_rows(requests[0].drawing)
        try:
            drawn = draw_together(self._model, requests, drawing, num_rows)
        except ValueError as error:
            if len(requests) == 1:
                return [Reject(NOT_DRAWABLE, str(error))]
            return [self._pictures([request])[0] for request in requests]
        pictures, reasons = self._safety.finished(np.stack(drawn), [request.label for request in requests])
        return [
            Reject(REFUSED_PICTURE, reason) if reason else picture
            for picture, reason in zip(pictures, reasons, strict=True)
        ]

    def _let_through(self, request: Request | Reject) -> Request | Reject:
        """Return the request unless the filter refuses its prompt, or it is too small for the watermark."""
        if isinstance(request, Reject):
            return request
        assert request.drawing is not None
        words = [request.prompt] if request.to_prompt is None else [request.prompt, request.to_prompt]
        if reasons := [reason for reason in self._safety.refused(words) if reason]:
            return Reject(REFUSED_PROMPT, reasons[0])
        try:
            self._safety.check_size(request.drawing.height, request.drawing.width)
        except ValueError as error:
            return Reject(BAD_SIZE, str(error))
        return request

    def _outcome(self, drawn: Drawn) -> _Outcome:
        """Return a picture's ledger line, and its members of the tar if there is one."""
        asked, request, picture = drawn.asked, drawn.request, drawn.picture
        prompt = str(asked.row.cells.get("prompt", "")) if request is None else request.label
        facts: dict[str, Any] = {
            "key": asked.key,
            "source_row": asked.source_row,
            "caption": prompt[:MAX_CAPTION_CHARS],
            "caption_chars": len(prompt),
            "num_captions": 1,
            "attributes": json_text({"seed": asked.seed, "image": asked.number, "row": asked.row.digest}),
        }
        if isinstance(picture, Reject) or request is None:
            assert isinstance(picture, Reject)
            return _Outcome(LedgerLine(**facts, status=picture.reason, detail=picture.detail), None, asked.position)
        content = encode(PillowImage.fromarray(picture), self.config.bulk.picture_config())
        sha256 = hashlib.sha256(content).hexdigest()
        height, width = picture.shape[:2]
        line = LedgerLine(
            **facts, original_width=width, original_height=height, num_bytes=len(content), payload_sha256=sha256
        )
        members = {
            "__key__": asked.key,
            self.config.bulk.image_format.value: content,
            "txt": prompt.encode("utf-8", "replace"),
            "json": json_text({**self._settings_of(asked, request), "sha256": sha256}).encode(),
        }
        return _Outcome(line, members, asked.position)

    def _settings_of(self, asked: Asked, request: Request) -> dict[str, JSON]:
        """Return all that made a picture."""
        assert request.drawing is not None
        drawing, cells = request.drawing, asked.row.cells
        arrays = {
            "init_image": request.picture,
            "mask": request.mask,
            "semantic_map": request.semantic_map,
            "small": request.small,
        }
        pictures = {
            name: {
                "address": _address(cells.get(name)),
                "pixel_sha256": hashlib.sha256(array.tobytes()).hexdigest(),
            }
            for name, array in arrays.items()
            if array is not None
        }
        way = {name: getattr(request, name) for name in ("to_prompt", "to_seed", "share")}
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "seed": request.seed,
            "guidance": request.guidance,
            "steps": drawing.sampler.num_steps,
            "drawing": drawing.to_dict(),
            "width": drawing.width,
            "height": drawing.height,
            "class_id": request.class_id,
            "layout": request.layout,
            **{name: said for name, said in way.items() if said is not None},
            **{name: cells[name] for name in ("margins",) if name in cells},
            "pictures": pictures,
            "model": self.config.model_digest,
            "safety": self.config.safety.without_key().to_dict(),
            "batch_rows": self.batch_rows(drawing),
            "row": asked.row.digest,
            "repeat": asked.repeat,
            "image": asked.number,
            "carried": dict(asked.row.carried),
        }


def _address(cell: Any) -> str:
    return cell if isinstance(cell, str) and not cell.startswith("data:") else ""


def settings_digest(config: GenerateConfig) -> str:
    """Return the digest of what decides a row's picture beside the row."""
    return digest_of(deciding(config))


def deciding(config: GenerateConfig) -> dict[str, JSON]:
    """Return what decides a row's picture beside the row."""
    return {
        "model": config.model_digest,
        "drawing": config.drawing.to_dict(),
        "guidance": config.guidance,
        "negative_prompt": config.negative_prompt,
        "seed": config.seed,
        "safety": config.safety.without_key().to_dict(),
    }


def seed_of(seed: int, row: PromptRow, repeat: int) -> int:
    """Return the seed of a row's first picture: its own, or a function of what it says and how often that was said."""
    if "seed" in row.cells and row.reject is None:
        return int(row.cells["seed"])
    said = hashlib.sha256(f"{seed}:{row.digest}:{repeat}".encode()).hexdigest()
    return int(said[:SEED_DIGITS], 16)


def _in_order(outcomes: Iterable[_Outcome]) -> Iterator[_Outcome]:
    """Yield outcomes in the order of the rows; those that come before their turn wait, encoded."""
    waiting: dict[int, _Outcome] = {}
    position = 0
    for outcome in outcomes:
        waiting[outcome.position] = outcome
        while position in waiting:
            yield waiting.pop(position)
            position += 1
    assert not waiting


def _kept(outcomes: Iterable[_Outcome], lines: list[LedgerLine]) -> Iterator[Row]:
    """Yield the members of pictures that there are, and write down all."""
    for outcome in outcomes:
        lines.append(outcome.line)
        if outcome.members is not None:
            yield outcome.members


def _ignore(seconds: float) -> None:
    """Nobody asks how long the tar waited for its pictures."""
