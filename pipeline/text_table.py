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

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Float16, Float64, Int32, Int64, UInt8
from numpy.typing import NDArray

from ldm.conditioning.text_embedding import TextEmbedding, stacked_pooled
from pipeline.tensor_file import mapped_arrays

NULL_CAPTION = ""
TokenIds = Int32[np.ndarray, "l towers"]


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


def table_bytes(
    distinct: Sequence[str], embeddings: Sequence[TextEmbedding], choices: Sequence[Sequence[int]]
) -> bytes:
    """Return the file's content: `embeddings` of the `distinct` captions, and each row's caption numbers."""
    tensors = {
        "tokens": np.concatenate([embedding.states for embedding in embeddings]),
        "offsets": _offsets([len(embedding.states) for embedding in embeddings]),
        **_captions(distinct, choices),
    }
    pooled = stacked_pooled(embeddings)
    return safetensors.numpy.save(tensors if pooled is None else tensors | {"pooled": pooled})


def token_table_bytes(distinct: Sequence[str], ids: Sequence[TokenIds], choices: Sequence[Sequence[int]]) -> bytes:
    """Return the file's content where only token `ids` of the `distinct` captions are stored."""
    tensors = {
        "token_ids": np.concatenate(ids),
        "offsets": _offsets([len(row) for row in ids]),
        **_captions(distinct, choices),
    }
    return safetensors.numpy.save(tensors)


def open_text_table(path: Path) -> TextTable:
    """Return the table in a local file as views of a memory map."""
    return TextTable(**mapped_arrays(path))


def _captions(distinct: Sequence[str], choices: Sequence[Sequence[int]]) -> dict[str, NDArray[Any]]:
    letters = [caption.encode() for caption in distinct]
    return {
        "letters": np.frombuffer(b"".join(letters), np.uint8),
        "letter_offsets": _offsets([len(row) for row in letters]),
        "choices": np.array([number for row in choices for number in row], np.int32),
        "choice_offsets": _offsets([len(row) for row in choices]),
    }


def _offsets(lengths: Sequence[int]) -> Int64[np.ndarray, " n_plus_1"]:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)
