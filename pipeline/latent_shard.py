"""One tar of a latent cache, opened: a batch of its moments is one gather from a memory map, with no row parsed.

All rows of a tar have one shape, hence equally long .npy members, each of which starts on a tar block: payloads lie
at a fixed offset modulo 512, so the tar is viewed as overlapping payloads, one a block, and rows are picked from that.

Letters: b batch, m moment channel, h latent row, w latent column, r row, f form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16, Int64, Shaped, UInt8

from pipeline.latent_columns import Columns, open_columns
from pipeline.store.shards import BLOCK_BYTES, ShardIndex, read_index
from pipeline.text_table import TextTable, open_text_table

TEXT_SUFFIX = "text.safetensors"
PART_SUFFIXES = ("tar", "index", "columns.safetensors")
STORED_DTYPES = ("<f2", "|u1")

RowNumbers = Int64[np.ndarray, " b"]


def part_file(part: str, suffix: str) -> str:
    """Return the suffix of a file of one of a shard's parts; the part's name is empty where there is only one."""
    return f"{part}.{suffix}" if part else suffix


def moments_name(crop: int = 0, flipped: bool = False) -> str:
    """Return the member that holds the moments of a crop, or of its mirror image."""
    return f"moments{crop or ''}{'_flipped' if flipped else ''}.npy"


def masked_name(mask: int, crop: int, flipped: bool) -> str:
    """Return the member that holds the moments of a crop of which a mask hides a part."""
    return f"masked{mask or ''}_{moments_name(crop, flipped)}"


def mask_name(mask: int) -> str:
    """Return the member that holds a mask: uint8, 1 where it hides, a number for each place of the latent."""
    return f"mask{mask or ''}.npy"


def low_res_name(crop: int) -> str:
    """Return the member that holds the small copy of a crop: uint8, channels first."""
    return f"low_res{crop or ''}.npy"


def map_name(crop: int) -> str:
    """Return the member that holds the semantic map of a crop: uint8, a class a pixel."""
    return f"map{crop or ''}.npy"


MOMENTS = moments_name()
FLIPPED_MOMENTS = moments_name(flipped=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Members:
    """Members of one kind, all of one shape, viewed in a memory map of their tar.

    Attributes:
        shape: shape of every row's array.
        payloads: content that would start at each block of the tar, shape (block, numbers), overlapping.
        blocks: the block where a row's content lies, shape (r, f), a column for each form.
    """

    shape: tuple[int, ...]
    payloads: Shaped[np.ndarray, "block payload"]
    blocks: Int64[np.ndarray, "r f"]

    @property
    def num_forms(self) -> int:
        """Forms of each row, such as its crops."""
        return int(self.blocks.shape[1])

    def pick(self, rows: RowNumbers, forms: RowNumbers) -> Shaped[np.ndarray, "b ..."]:
        """Return one form of each of some rows."""
        return self.payloads[self.blocks[rows, forms]].reshape(len(rows), *self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentShard:
    """Memory maps of one tar and what lies beside it.

    Attributes:
        keys: the rows' keys.
        has_flips: whether the moments of mirrored images are there too.
        num_masks: masks of each row.
        moments: raw moments, fp16 (m, h, w); forms are crops, each plain, then mirrored if there are flips.
        masked: raw moments of masked images; forms are masks, inside them as for `moments`.
        masks: what is masked, uint8 (h, w); forms are masks.
        low_res: small copies, uint8 (3, y, x); forms are crops.
        maps: semantic maps, uint8 (y, x); forms are crops.
        columns: small facts of the rows.
        text: the captions of the whole shard, and what is stored of them.
    """

    keys: tuple[str, ...]
    has_flips: bool
    num_masks: int
    moments: Members
    masked: Members | None
    masks: Members | None
    low_res: Members | None
    maps: Members | None
    columns: Columns
    text: TextTable

    def moment_forms(self, crops: RowNumbers, flipped: Shaped[np.ndarray, " b"]) -> RowNumbers:
        """Return which form of `moments` a crop, mirrored or not, is."""
        return crops * (1 + self.has_flips) + flipped.astype(np.int64)

    def masked_forms(self, masks: RowNumbers, crops: RowNumbers, flipped: Shaped[np.ndarray, " b"]) -> RowNumbers:
        """Return which form of `masked` a mask of a crop, mirrored or not, is."""
        return masks * self.moments.num_forms + self.moment_forms(crops, flipped)


def open_latent_shard(tar: Path, index: Path, columns: Path, text: Path) -> LatentShard:
    """Map one tar and the files beside it.

    Raises:
        ValueError: if members of one kind are not arrays of one shape and of a dtype that caches hold.
    """
    places = read_index(str(index))
    content = np.memmap(tar, np.uint8, mode="r")
    flips = (False, True) if FLIPPED_MOMENTS in places.suffixes else (False,)
    crops = range(_count(r"moments(\d*)\.npy", places.suffixes))
    masks = range(_count(r"mask(\d*)\.npy", places.suffixes))
    forms = [(crop, flipped) for crop in crops for flipped in flips]

    def members(names: Sequence[str]) -> Members | None:
        return _members(tar, content, places, names) if names and names[0] in places.suffixes else None

    moments = members([moments_name(*form) for form in forms])
    if moments is None:
        raise ValueError(f"{tar} has no member {MOMENTS!r}; it has {', '.join(places.suffixes)}")
    return LatentShard(
        keys=places.keys,
        has_flips=len(flips) > 1,
        num_masks=len(masks),
        moments=moments,
        masked=members([masked_name(mask, *form) for mask in masks for form in forms]),
        masks=members([mask_name(mask) for mask in masks]),
        low_res=members([low_res_name(crop) for crop in crops]),
        maps=members([map_name(crop) for crop in crops]),
        columns=open_columns(columns),
        text=open_text_table(text),
    )


def npy_bytes(array: Float16[np.ndarray, "..."] | UInt8[np.ndarray, "..."]) -> bytes:
    """Return the content of a `.npy` file."""
    file = BytesIO()
    np.save(file, np.ascontiguousarray(array, array.dtype.newbyteorder("<")), allow_pickle=False)
    return file.getvalue()


def _count(pattern: str, suffixes: Sequence[str]) -> int:
    return sum(re.fullmatch(pattern, suffix) is not None for suffix in suffixes)


def _members(tar: Path, content: Any, places: ShardIndex, names: Sequence[str]) -> Members:
    columns = [places.column(name) for name in names]
    offsets, sizes = places.offsets[:, columns], places.sizes[:, columns]
    first, size = int(offsets[0, 0]), int(sizes[0, 0])
    shape, dtype, header_bytes = _npy_header(tar, names[0], content[first : first + size].tobytes())
    if (sizes != size).any():
        raise ValueError(f"{tar}: {names[0]} takes {sizes.min()} to {sizes.max()} bytes; a tar's rows have one shape")
    blocks = (offsets - first) // BLOCK_BYTES
    lowest = int(blocks.min())
    start = first + lowest * BLOCK_BYTES + header_bytes
    payloads = np.lib.stride_tricks.as_strided(
        content[start : start + dtype.itemsize].view(dtype),
        shape=(int(blocks.max()) - lowest + 1, (size - header_bytes) // dtype.itemsize),
        strides=(BLOCK_BYTES, dtype.itemsize),
        writeable=False,
    )
    return Members(shape=shape, payloads=payloads, blocks=blocks - lowest)


def _npy_header(tar: Path, name: str, member: bytes) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Return shape, dtype and header length of the first row's array."""
    file = BytesIO(member)
    np.lib.format.read_magic(file)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if is_fortran or dtype.str not in STORED_DTYPES or (name == MOMENTS and len(shape) != 3):
        raise ValueError(f"{tar}: {name} is {dtype} of shape {shape}; expected float16 (channel, row, column) or uint8")
    return shape, dtype, file.tell()
