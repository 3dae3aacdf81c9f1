"""Files of prompts: parquet, CSV, TSV, JSONL or plain text, surveyed in one pass and then read range by range.

Order: address → files → one pass over all rows (a digest of each row's meaning, its place in its file) → ranges of
rows, which any process reads by itself. What a row means does not depend on the file's format: numbers are numbers,
empty cells are no cells. In memory are 24 bytes a row, never the rows.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm import storage
from ldm.config import digest_of
from ldm.request_table import COLUMNS, PICTURES, PROMPT, is_empty, typed_cells
from pipeline.sources.files import Place, names_of_files
from pipeline.sources.parquet_file import PARQUET_SUFFIXES, ParquetFile
from pipeline.sources.records import Broken
from pipeline.sources.slices import Slice
from pipeline.sources.text_file import PLAIN_SUFFIXES, TEXT_SUFFIXES, TextFile
from pipeline.sources.values import json_of, text_of
from pipeline.store.schema import JSON, Reject, Split

SUFFIXES = (*PARQUET_SUFFIXES, *TEXT_SUFFIXES, *PLAIN_SUFFIXES)
DIGEST_BYTES = 16
WILDCARDS = "*?["
BROKEN_ROW, NO_PROMPT, BAD_CELL = "broken_row", "no_prompt", "bad_cell"

Digests = NDArray[np.void]
"""Digests of rows, 16 bytes each, shape (row,)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    """One row of a file of prompts.

    Attributes:
        cells: what it says, by the names of `ldm.request_table.COLUMNS`; empty cells are left out.
        carried: cells of columns that are only passed on.
        folder: of its file, from which addresses of pictures count.
        digest: 32 hex digits of all that it says.
        reject: why it can't be drawn, where that is known already.
    """

    cells: Mapping[str, Any]
    carried: Mapping[str, JSON]
    folder: str
    digest: str
    reject: Reject | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Rows of one file: places [start, stop), row numbers or byte offsets as its format has them."""

    file: str
    digest: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Survey:
    """What one pass over all rows found.

    Attributes:
        files: each file whole.
        firsts: number of each file's first row, and the number of all rows.
        places: of each row in its file, int64, shape (row,).
        digests: of each row.
        repeats: how many equal rows stand before each row, int64, shape (row,).
        filled: rows that can be drawn as far as their cells tell and have a cell, by column.
        rejects: the others, by reason.
    """

    files: Sequence[Piece]
    firsts: Sequence[int]
    places: NDArray[np.int64]
    digests: Digests
    repeats: NDArray[np.int64]
    filled: Mapping[str, int]
    rejects: Mapping[str, int]

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return len(self.places)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Return where rows [start, stop) lie."""
        found = []
        for file, first, end in zip(self.files, self.firsts, self.firsts[1:], strict=False):
            low, high = max(start, first), min(stop, end)
            if low < high:
                behind = int(self.places[high]) if high < end else file.stop
                found.append(replace(file, start=int(self.places[low]), stop=behind))
        return found

    def digest(self, start: int, stop: int) -> str:
        """Return the digest of what rows [start, stop) say, and of which of them came before."""
        return digest_of_rows(self.digests[start:stop].tobytes(), self.repeats[start:stop].tolist())


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTable:
    """How rows are read.

    Attributes:
        prompt_column: the column of prompts.
        carry: further columns, which are passed on.
        needs_prompts: whether a row without a prompt can't be drawn.
    """

    prompt_column: str = PROMPT
    carry: tuple[str, ...] = ()
    needs_prompts: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read."""
        own = tuple(self.prompt_column if name == PROMPT else name for name in COLUMNS)
        return tuple(dict.fromkeys((*own, *self.carry)))

    def survey(self, address: str) -> Survey:
        """Return where all rows lie and what they say, in digests.

        Args:
            address: a file, a folder, several files by wildcards, or the URL of one of these.

        Raises:
            ValueError: if there are none, no prompts, or columns that nobody knows.
        """
        surveying = _Surveying(self)
        for name in prompt_files(address):
            surveying.add(name)
        return surveying.result(address)

    def rows(self, pieces: Sequence[Piece]) -> Iterator[PromptRow]:
        """Yield the rows of some pieces.

        Raises:
            ValueError: if a file is not the one that was surveyed any more.
        """
        for piece in pieces:
            part = Slice(split=Split.TRAIN, file=piece.file, digest=piece.digest, start=piece.start, stop=piece.stop)
            file = self.open(piece.file)
            records = file.rows(part, self.columns) if isinstance(file, ParquetFile) else file.rows(part)
            for record in records:
                yield self.row(piece.file, record)

    def open(self, name: str) -> ParquetFile | TextFile:
        """Return one file."""
        place, stem = Place(folder="", name=name), name.lower().partition("?")[0]
        if stem.endswith(PARQUET_SUFFIXES):
            return ParquetFile(place=place)
        return TextFile(place=place, line_column=self.prompt_column if stem.endswith(PLAIN_SUFFIXES) else "")

    def row(self, file: str, record: Mapping[str, Any] | Broken) -> PromptRow:
        """Return a record as what it means."""
        folder = file.rpartition("/")[0]
        if isinstance(record, Broken):
            said = [BROKEN_ROW, record.reason, hashlib.sha256(record.content).hexdigest()]
            return PromptRow(
                cells={}, carried={}, folder=folder, digest=_digest(said), reject=Reject(BROKEN_ROW, record.reason)
            )
        if not file.lower().partition("?")[0].endswith(PARQUET_SUFFIXES):
            record = {name: text_of(cell) if isinstance(cell, bytes) else cell for name, cell in record.items()}
        # By the column's own name: another one that is called `prompt` is never what is drawn.
        source = {name: self.prompt_column if name == PROMPT else name for name in COLUMNS}
        named = {name: _value(name, record[column]) for name, column in source.items() if column in record}
        cells = {name: cell for name, cell in named.items() if not is_empty(cell)}
        carried = {name: json_of(record.get(name)) for name in self.carry}
        reject: Reject | None = None
        if not text_of(cells.setdefault(PROMPT, "")).strip() and self.needs_prompts:
            reject = Reject(NO_PROMPT)
        else:
            try:
                cells = typed_cells(cells)
            except ValueError as error:
                reject = Reject(BAD_CELL, str(error))
        return PromptRow(cells=cells, carried=carried, folder=folder, digest=_digest([cells, carried]), reject=reject)


class _Surveying:
    """Adds up one pass over the files."""

    def __init__(self, table: PromptTable) -> None:
        self._table = table
        self._files: list[Piece] = []
        self._firsts = [0]
        self._places = array("q")
        self._digests = bytearray()
        self._columns: dict[str, None] = {}
        self._filled = Counter[str]()
        self._rejects = Counter[str]()

    def add(self, name: str) -> None:
        file = self._table.open(name)
        cut, columns = file.survey(1 << 62)
        self._check(name, columns)
        stop = cut.bounds[-1] if cut.bounds else 0
        whole = Piece(file=name, digest=cut.digest, start=cut.bounds[0] if cut.bounds else 0, stop=stop)
        if isinstance(file, TextFile):
            for place, record in file.placed_rows(None):
                self._check(name, () if isinstance(record, Broken) else tuple(record))
                self._count(place, self._table.row(name, record))
        else:
            for place, row in enumerate(self._table.rows([whole])):
                self._count(place, row)
        self._files.append(whole)
        self._firsts.append(len(self._places))

    def result(self, address: str) -> Survey:
        table, there = self._table, list(self._columns)
        if table.needs_prompts and there and table.prompt_column not in there:
            raise ValueError(
                f"{address} has no column {table.prompt_column!r}, it has {there}: --bulk.prompt-column names another"
            )
        if lacking := [name for name in table.carry if name not in there]:
            raise ValueError(f"{address} has no columns {lacking} to carry, it has {there}")
        if not self._places:
            raise ValueError(f"there are no prompts in {address}")
        digests = np.frombuffer(bytes(self._digests), f"V{DIGEST_BYTES}")
        return Survey(
            files=self._files,
            firsts=self._firsts,
            places=np.frombuffer(self._places, np.int64),
            digests=digests,
            repeats=repeats_of(digests),
            filled=dict(self._filled),
            rejects=dict(sorted(self._rejects.items())),
        )

    def _check(self, name: str, columns: Sequence[str]) -> None:
        new = [column for column in columns if column not in self._columns]
        self._columns |= dict.fromkeys(new)
        if unknown := [column for column in new if column not in self._table.columns]:
            raise ValueError(
                f"{name} has the unknown columns {unknown}; known are {', '.join(self._table.columns)}: "
                f"--bulk.carry {' '.join(unknown)} passes them on into each picture's JSON"
            )

    def _count(self, place: int, row: PromptRow) -> None:
        self._places.append(place)
        self._digests += bytes.fromhex(row.digest)
        if row.reject is not None:
            self._rejects[row.reject.reason] += 1
        else:
            self._filled.update(row.cells.keys())


def prompt_files(address: str) -> list[str]:
    """Return the whole addresses of the files that are meant, sorted: rows are counted in this order.

    Raises:
        ValueError: if there is none.
    """
    is_pattern = not address.startswith(storage.WEB) and any(letter in address for letter in WILDCARDS)
    if is_pattern and not storage.exists(address):
        system, inner = storage.located(address)
        paths = sorted(path for path in system.glob(inner) if path.lower().endswith(SUFFIXES))
        found = paths if storage.is_local(address) else [system.unstrip_protocol(path) for path in paths]
    elif address.lower().partition("?")[0].endswith(SUFFIXES):
        found = [address] if storage.exists(address) else []
    else:
        found = [storage.join(address, name) for name in names_of_files(address, (), SUFFIXES)]
    if not found:
        raise ValueError(f"there is no file of prompts at {address}; such end in {', '.join(SUFFIXES)}")
    return found


def repeats_of(digests: Digests) -> NDArray[np.int64]:
    """Return how many equal digests stand before each one."""
    _, groups, counts = np.unique(digests, return_inverse=True, return_counts=True)
    order = np.argsort(groups, kind="stable")  # equal ones side by side, in their own order
    repeats = np.empty(len(digests), np.int64)
    repeats[order] = np.arange(len(digests)) - np.repeat(np.cumsum(counts) - counts, counts)
    return repeats


def digest_of_rows(digests: bytes, repeats: Sequence[int]) -> str:
    """Return the digest of a range of rows: of what each says, and how often that was said before."""
    counted = {str(place): number for place, number in enumerate(repeats) if number}
    return digest_of([hashlib.sha256(digests).hexdigest(), counted])


def _value(name: str, cell: Any) -> Any:
    """Return a cell as its column means it: bytes are a picture in a picture's column, and text elsewhere."""
    if name in PICTURES:
        # Pictures in tables of Hugging Face's datasets.
        return cell["bytes"] or cell.get("path") if isinstance(cell, Mapping) and "bytes" in cell else cell
    return text_of(cell) if isinstance(cell, bytes | str) else cell  # without half characters, which nothing encodes


def _digest(said: Any) -> str:
    return digest_of(_plain(said))[: 2 * DIGEST_BYTES]


def _plain(value: Any) -> JSON:
    match value:
        case bytes():
            return {"sha256": hashlib.sha256(value).hexdigest()}
        case Mapping():
            return {str(name): _plain(item) for name, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return json_of(value)
