"""What is cached of the rows of one latent tar beside their moments: small facts, read without parsing a row.

The file is a safetensors of
    text_rows (r) int32, the row of the shard's text table;
    sizes (r, 2) int32, height and width of the upright original;
    crops (r, k, 4) float32, top, left, height and width of each crop in pixels of that original;
    class_ids (r) int32, -1 for none, where the cache has classes;
    boxes (n, 5) float32, class, left, top, right, bottom in shares of the crop, all rows' end to end, and
    box_offsets (r * k + 1) int64, where those of a row's crop begin, where the cache has layouts.

Letters: b batch, r row, k crop, n box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Float32, Int32, Int64

from pipeline.buckets import Box
from pipeline.latent_config import ColumnsConfig
from pipeline.tensor_file import mapped_arrays

NO_CLASS = -1
MIN_BOX_SHARE = 0.1
"""A box of which a crop keeps less than this share of its area is not in the crop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """The columns of one tar, usually as views of a memory map; fields as in the file."""

    text_rows: Int32[np.ndarray, " r"]
    sizes: Int32[np.ndarray, "r 2"]
    crops: Float32[np.ndarray, "r k 4"]
    class_ids: Int32[np.ndarray, " r"] | None = None
    boxes: Float32[np.ndarray, "n 5"] | None = None
    box_offsets: Int64[np.ndarray, " offsets"] | None = None

    @property
    def num_crops(self) -> int:
        """Crops of each row."""
        return int(self.crops.shape[1])

    def boxes_of(self, row: int, crop: int) -> Float32[np.ndarray, "n 5"]:
        """Return the layout of one crop of a row."""
        if self.boxes is None or self.box_offsets is None:
            raise ValueError("this cache holds no layouts: columns.boxes_attribute names them when it is made")
        place = row * self.num_crops + crop
        return self.boxes[self.box_offsets[place] : self.box_offsets[place + 1]]


class ColumnsBuilder:
    """Collects the columns of one tar, row after row."""

    def __init__(self, config: ColumnsConfig) -> None:
        """Begin with no row."""
        self.config = config
        self._class_number = {name: number for number, name in enumerate(config.classes)}
        self._box_number = {name: number for number, name in enumerate(config.box_classes)}
        self._text_rows: list[int] = []
        self._sizes: list[tuple[int, int]] = []
        self._crops: list[list[list[float]]] = []
        self._class_ids: list[int] = []
        self._boxes: list[list[list[float]]] = []

    def check(self, keys: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> None:
        """Refuse rows whose classes or layouts are not what the config says, before any of them is encoded.

        Raises:
            ValueError: naming the attribute that no row has, or the first row that is wrong.
        """
        told = [fact.get("attributes") or {} for fact in facts]
        for name in filter(None, (self.config.class_attribute, self.config.boxes_attribute)):
            if not any(name in attributes for attributes in told):
                there = ", ".join(sorted({attribute for attributes in told for attribute in attributes})) or "none"
                raise ValueError(f"no row has an attribute {name!r}; their attributes: {there}")
        for key, attributes in zip(keys, told, strict=True):
            self._class_of(key, attributes)
            self._layout_of(key, attributes)

    def add(self, text_row: int, key: str, facts: Mapping[str, Any], crops: Sequence[Box]) -> dict[str, Any]:
        """Take a row whose crops are these boxes of its original; return what a plain reader finds in its JSON.

        Raises:
            ValueError: if a class or a box is not what the config says, naming the row.
        """
        size = int(facts.get("original_height") or facts["height"]), int(facts.get("original_width") or facts["width"])
        rounded = [[round(value, 3) for value in _from_top_left(crop)] for crop in crops]
        self._text_rows.append(text_row)
        self._sizes.append(size)
        self._crops.append(rounded)
        told: dict[str, Any] = {"size": list(size), "crops": rounded}
        attributes = facts.get("attributes") or {}
        if self.config.class_attribute:
            number = self._class_of(key, attributes)
            self._class_ids.append(number)
            told["class"] = number
        if self.config.boxes_attribute:
            seen = [_seen(self._layout_of(key, attributes), crop) for crop in crops]
            self._boxes += seen
            told["boxes"] = seen
        return told

    def _class_of(self, key: str, attributes: Mapping[str, Any]) -> int:
        found = attributes.get(self.config.class_attribute)
        return NO_CLASS if found is None else _number(key, found, self._class_number)

    def _layout_of(self, key: str, attributes: Mapping[str, Any]) -> list[tuple[int, Box]]:
        return [_box(key, box, self._box_number) for box in attributes.get(self.config.boxes_attribute) or ()]

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        tensors: dict[str, np.ndarray[Any, Any]] = {
            "text_rows": np.array(self._text_rows, np.int32),
            "sizes": np.array(self._sizes, np.int32),
            "crops": np.array(self._crops, np.float32),
        }
        if self.config.class_attribute:
            tensors["class_ids"] = np.array(self._class_ids, np.int32)
        if self.config.boxes_attribute:
            tensors["boxes"] = np.array([box for crop in self._boxes for box in crop], np.float32).reshape(-1, 5)
            lengths = [len(crop) for crop in self._boxes]
            tensors["box_offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return safetensors.numpy.save(tensors)


def open_columns(path: Path) -> Columns:
    """Return the columns in a local file."""
    return Columns(**mapped_arrays(path))


def _from_top_left(box: Box) -> tuple[float, float, float, float]:
    left, top, right, bottom = box
    return top, left, bottom - top, right - left


def _number(key: str, found: Any, numbers: Mapping[str, int]) -> int:
    """Return the number of a class: its place among the names, or, where there are none, itself."""
    if numbers and str(found) in numbers:
        return numbers[str(found)]
    if not numbers and isinstance(found, int | str) and str(found).isdecimal():
        return int(found)
    wanted = f"one of {', '.join(sorted(numbers)[:8])}" if numbers else "a number, or give the classes' names"
    raise ValueError(f"row {key}: class {found!r} is not {wanted}")


def _box(key: str, box: Any, numbers: Mapping[str, int]) -> tuple[int, Box]:
    is_box = isinstance(box, list) and len(box) == 5 and all(isinstance(side, int | float) for side in box[:4])
    if not is_box or not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"row {key}: a box is [left, top, right, bottom, class] with ascending sides, got {box!r}")
    return _number(key, box[4], numbers), (float(box[0]), float(box[1]), float(box[2]), float(box[3]))


def _seen(layout: Sequence[tuple[int, Box]], crop: Box) -> list[list[float]]:
    """Return the boxes that a crop shows enough of, clipped to it, in shares of its sides."""
    left, top, right, bottom = crop
    shown = []
    for number, box in layout:
        inner = max(box[0], left), max(box[1], top), min(box[2], right), min(box[3], bottom)
        across, down = max(0.0, inner[2] - inner[0]), max(0.0, inner[3] - inner[1])
        if across * down >= MIN_BOX_SHARE * (box[2] - box[0]) * (box[3] - box[1]):
            sides = [(inner[0] - left) / (right - left), (inner[1] - top) / (bottom - top)]
            sides += [(inner[2] - left) / (right - left), (inner[3] - top) / (bottom - top)]
            shown.append([float(number), *[round(side, 6) for side in sides]])
    return shown
