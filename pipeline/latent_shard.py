"""One shard of a latent cache, opened: a batch of its moments is one gather from a memory map, with no row parsed.

All rows of a shard have one shape, hence equally long .npy members, each of which starts on a tar block: payloads lie
at a fixed offset modulo 512, so the tar is viewed as overlapping payloads, one a block, and rows are picked from that.

Letters: b batch, m moment channel, h latent row, w latent column.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float16, Int64

from pipeline.store.shards import BLOCK_BYTES, read_index
from pipeline.text_table import TextTable, open_text_table

MOMENTS = "moments.npy"
FLIPPED_MOMENTS = "moments_flipped.npy"
LATENT_FILES = ("tar", "index", "text.safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentShard:
    """Memory maps of one shard.

    Attributes:
        keys: the rows' keys.
        shape: shape (m, h, w) of every row's moments.
        payloads: fp16 payload that would start at each block of the tar, shape (block, m * h * w), overlapping.
        blocks: the block where a row's moments lie: plain, then flipped if there are any; shape (row, 1 or 2).
        text: the captions and their embeddings.
    """

    keys: tuple[str, ...]
    shape: tuple[int, int, int]
    payloads: Float16[np.ndarray, "block payload"]
    blocks: Int64[np.ndarray, "row forms"]
    text: TextTable

    @property
    def has_flips(self) -> bool:
        """Whether the moments of mirrored images are there too."""
        return int(self.blocks.shape[1]) == 2

    def moments(self, rows: Int64[np.ndarray, " b"], flipped: Bool[np.ndarray, " b"]) -> Float16[np.ndarray, "b m h w"]:
        """Return raw moments of `rows`, of the mirrored image where `flipped`."""
        picked: Float16[np.ndarray, "b payload"] = self.payloads[self.blocks[rows, flipped.astype(np.int64)]]
        return picked.reshape(len(rows), *self.shape)


def open_latent_shard(tar: Path, index: Path, text: Path) -> LatentShard:
    """Map one shard's files.

    Raises:
        ValueError: if its rows' moments are not fp16 arrays of one shape.
    """
    places = read_index(str(index))
    content = np.memmap(tar, np.uint8, mode="r")
    columns = [places.column(name) for name in (MOMENTS, FLIPPED_MOMENTS) if name in places.suffixes or name == MOMENTS]
    offsets, sizes = places.offsets[:, columns], places.sizes[:, columns]
    first, size = int(offsets[0, 0]), int(sizes[0, 0])
    shape, header_bytes = _npy_shape(tar, content[first : first + size].tobytes())
    if (sizes != size).any():
        raise ValueError(f"{tar}: moments take {sizes.min()} to {sizes.max()} bytes; a shard's rows have one shape")
    blocks = (offsets - first) // BLOCK_BYTES
    lowest = int(blocks.min())
    start = first + lowest * BLOCK_BYTES + header_bytes
    payloads = np.lib.stride_tricks.as_strided(
        content[start : start + 2].view("<f2"),
        shape=(int(blocks.max()) - lowest + 1, (size - header_bytes) // 2),
        strides=(BLOCK_BYTES, 2),
        writeable=False,
    )
    return LatentShard(
        keys=places.keys, shape=shape, payloads=payloads, blocks=blocks - lowest, text=open_text_table(text)
    )


def npy_bytes(moments: Float16[np.ndarray, "m h w"]) -> bytes:
    """Return the content of a `.npy` file."""
    file = BytesIO()
    np.save(file, np.ascontiguousarray(moments, np.dtype("<f2")), allow_pickle=False)
    return file.getvalue()


def _npy_shape(tar: Path, member: bytes) -> tuple[tuple[int, int, int], int]:
    """Return shape and header length of the first row's moments."""
    file = BytesIO(member)
    np.lib.format.read_magic(file)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if len(shape) != 3 or is_fortran or dtype != np.dtype("<f2"):
        raise ValueError(f"{tar}: moments are {dtype} of shape {shape}; expected float16 (channel, row, column)")
    return shape, file.tell()
