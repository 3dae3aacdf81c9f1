"""Text embeddings of one latents shard: each distinct caption once, and which of them every row may draw.

The file is a safetensors of
    tokens (t, d) float16, all embeddings end to end, unpadded;   offsets (n + 1) int64, where each embedding stops,
    letters (u) uint8, all captions in UTF-8 end to end;          letter_offsets (n + 1) int64,
    choices (k) int32, the captions of all rows end to end;       choice_offsets (rows + 1) int64,
    pooled (n, p) float16, one row a caption, only where the text encoder has a pooled output,
    or, where embeddings are made while training, in place of tokens and pooled
    token_ids (t, towers) int32, what each of the encoder's tokenizers makes of the captions.
Caption 0 is the empty one, the null condition; the others are sorted.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Float16, Float64, Int32, Int64, UInt8

from ldm.conditioning.text_embedding import TextEmbedding
from ldm.storage import open_atomic, sha256_of
from pipeline.store.manifest import FileRecord
from pipeline.store.schema import JSON
from pipeline.tensor_file import DTYPES, mapped_arrays

NULL_CAPTION = ""
TokenIds = Int32[np.ndarray, "l towers"]
_STORED = {
    "choice_offsets": "I64",
    "letter_offsets": "I64",
    "offsets": "I64",
    "choices": "I32",
    "pooled": "F16",
    "tokens": "F16",
    "letters": "U8",
}
"""Tensors in the order in which safetensors lays them: the widest types first, then by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """The embeddings of a shard, usually as views of a memory map; fields as in the file."""

    tokens: Float16[np.ndarray, "t d"] | None = None
    token_ids: Int32[np.ndarray, "t towers"] | None = None
    offsets: Int64[np.ndarray, " n_plus_1"]
    letters: UInt8[np.ndarray, " u"]
    letter_offsets: Int64[np.ndarray, " n_plus_1"]
    choices: Int32[np.ndarray, " k"]
    choice_offsets: Int64[np.ndarray, " rows_plus_1"]
    pooled: Float16[np.ndarray, "n p"] | None = None

    def embedding(self, caption: int) -> TextEmbedding:
        """Return the embedding of a caption by its number."""
        pooled = None if self.pooled is None else self.pooled[caption]
        return TextEmbedding(states=self.states(caption), pooled=pooled)

    def states(self, caption: int) -> Float16[np.ndarray, "l d"]:
        """Return the token states of a caption by its number."""
        if self.tokens is None:
            raise ValueError("this cache holds token ids, not states: the loader needs the text encoder to embed them")
        return self.tokens[self.offsets[caption] : self.offsets[caption + 1]]

    def ids(self, caption: int) -> TokenIds:
        """Return the token ids of a caption by its number."""
        if self.token_ids is None:
            raise ValueError("this cache holds embeddings, not token ids")
        return self.token_ids[self.offsets[caption] : self.offsets[caption + 1]]

    def text(self, caption: int) -> str:
        """Return a caption by its number."""
        letters = self.letters[self.letter_offsets[caption] : self.letter_offsets[caption + 1]]
        return letters.tobytes().decode()

    def chosen(self, rows: Int64[np.ndarray, " b"], quantiles: Float64[np.ndarray, " b"]) -> Int64[np.ndarray, " b"]:
        """Return one caption a row: the one at the given quantile, in [0, 1), of the row's captions."""
        starts = self.choice_offsets[rows]
        counts = self.choice_offsets[rows + 1] - starts
        numbers: Int32[np.ndarray, " b"] = self.choices[starts + (quantiles * counts).astype(np.int64)]
        return numbers.astype(np.int64)


def distinct_captions(captions: Sequence[Sequence[str]]) -> list[str]:
    """Return the captions of all rows, each once: the empty one first, the others sorted."""
    return [NULL_CAPTION, *sorted({caption for row in captions for caption in row} - {NULL_CAPTION})]


def write_table(
    path: str,
    distinct: Sequence[str],
    choices: Sequence[Sequence[int]],
    lengths: Sequence[int],
    parts: Iterable[tuple[Sequence[int], Sequence[TextEmbedding]]],
) -> FileRecord:
    """Publish a shard's table, of whose embeddings one part is in memory at a time, and return its record.

    Args:
        path: the file.
        distinct: the captions, as `distinct_captions` gives them.
        choices: each row's caption numbers.
        lengths: how many rows the embedding of each caption has.
        parts: numbers of captions and their embeddings, in any order, each caption once, at least one part.
    """
    small = _small_tensors(distinct, lengths, choices)
    pieces = iter(parts)
    first = next(pieces)
    width, pooled = first[1][0].states.shape[1], first[1][0].pooled
    shapes = {name: tensor.shape for name, tensor in small.items()}
    shapes["tokens"] = (sum(lengths), width)
    if pooled is not None:
        shapes["pooled"] = (len(distinct), len(pooled))
    header, starts = _layout(shapes)
    with open_atomic(path) as file:
        file.write(header)
        for name, tensor in small.items():
            file.seek(starts[name])
            file.write(tensor.tobytes())
        for numbers, embeddings in itertools.chain([first], pieces):
            for number, embedding in zip(numbers, embeddings, strict=True):
                assert len(embedding.states) == lengths[number]
                file.seek(starts["tokens"] + 2 * width * int(small["offsets"][number]))
                file.write(embedding.states.tobytes())
                if embedding.pooled is not None:
                    file.seek(starts["pooled"] + 2 * len(embedding.pooled) * number)
                    file.write(embedding.pooled.tobytes())
        file.seek(0, os.SEEK_END)
        num_bytes = file.tell()
        file.flush()
        return FileRecord(num_bytes, sha256_of(str(file.name)))


def token_table_bytes(distinct: Sequence[str], ids: Sequence[TokenIds], choices: Sequence[Sequence[int]]) -> bytes:
    """Return the file's content where only token `ids` of the `distinct` captions are stored."""
    tensors = {
        "token_ids": np.concatenate(ids),
        **_small_tensors(distinct, [len(row) for row in ids], choices),
    }
    return safetensors.numpy.save(tensors)


def open_text_table(path: Path) -> TextTable:
    """Return the table in a local file as views of a memory map."""
    return TextTable(**mapped_arrays(path))


def _small_tensors(
    distinct: Sequence[str], lengths: Sequence[int], choices: Sequence[Sequence[int]]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return all tensors but those that the text encoder makes."""
    letters = [caption.encode() for caption in distinct]
    return {
        "offsets": _offsets(lengths),
        "letters": np.frombuffer(b"".join(letters), np.uint8),
        "letter_offsets": _offsets([len(row) for row in letters]),
        "choices": np.array([number for row in choices for number in row], np.int32),
        "choice_offsets": _offsets([len(row) for row in choices]),
    }


def _layout(shapes: Mapping[str, tuple[int, ...]]) -> tuple[bytes, dict[str, int]]:
    """Return the header that safetensors would write for tensors of these shapes, and where each of them starts."""
    entries: dict[str, dict[str, JSON]] = {}
    starts, place = {}, 0
    for name, dtype in _STORED.items():
        if name in shapes:
            stop = place + DTYPES[dtype].itemsize * math.prod(shapes[name])
            entries[name] = {"dtype": dtype, "shape": list(shapes[name]), "data_offsets": [place, stop]}
            starts[name], place = place, stop
    content = json.dumps(entries, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    header = len(content).to_bytes(8, "little") + content
    return header, {name: len(header) + start for name, start in starts.items()}


def _offsets(lengths: Sequence[int]) -> Int64[np.ndarray, " n_plus_1"]:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)
