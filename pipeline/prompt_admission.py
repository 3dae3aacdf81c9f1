"""Rows of a file of prompts → requests that a model can draw, or the named reason why not.

Order: cells → pictures read and cut to the size that is drawn → the size → classes → all that the model is told.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ldm.conditioning.conditioner import ConditioningConfig, TextUse
from ldm.drawing import Drawing, Given, check_strength, check_tile, check_told, checked_size
from ldm.model_sizes import ModelSizes
from ldm.request_table import drawing_in, fitted_pictures, pictures_in, request_of, with_margins
from ldm.requests import Request, given_together
from ldm.storage import join
from pipeline.generate_config import GenerateConfig
from pipeline.prompts import BAD_CELL, BROKEN_ROW, NO_PROMPT, PromptRow, PromptTable
from pipeline.store.schema import Reject

BAD_PICTURE, BAD_SIZE, UNKNOWN_CLASS, NOT_DRAWABLE = "bad_picture", "bad_size", "unknown_class", "not_drawable"
REFUSED_PROMPT, REFUSED_PICTURE = "refused_prompt", "refused_picture"
GENERATE_REASONS: dict[str, str] = {
    BROKEN_ROW: "the file can't be read there",
    NO_PROMPT: "there is no text to draw",
    BAD_CELL: "a number is none or out of its range, a layout no boxes, margins not four, or a share of no way",
    BAD_PICTURE: "a picture can't be read, or does not lie beside the file",
    BAD_SIZE: "rows or columns are no multiples of what the networks shrink, too many, or too few for a watermark",
    UNKNOWN_CLASS: "a class that the model was not trained with",
    NOT_DRAWABLE: "the model is not told that, needs more, or its encoder refuses the prompt",
    REFUSED_PROMPT: "the prompt filter says so",
    REFUSED_PICTURE: "the picture filter says so",
}
"""Every reason of a row that is not drawn, with what it means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """What a row must be.

    Attributes:
        conditioning: what the model is told.
        sizes: what it draws.
        drawing: of rows that say nothing.
        negative_prompt: of rows that say nothing.
        guidance: of rows that say nothing.
        max_pixels: of one picture.
    """

    conditioning: ConditioningConfig
    sizes: ModelSizes
    drawing: Drawing
    negative_prompt: str
    guidance: float
    max_pixels: int

    def request(self, row: PromptRow, seed: int, number: int = 0) -> Request | Reject:
        """Return what is drawn for a row; its drawing has whole sides, its pictures have them too.

        Args:
            row: what it says.
            seed: of this picture.
            number: of the row's pictures before this one, by which the seed at the end of a way counts on too.
        """
        if row.reject is not None:
            return row.reject
        cells = {"negative_prompt": self.negative_prompt, "guidance": self.guidance, **row.cells, "seed": seed}
        if "to_seed" in cells:
            cells["to_seed"] += number
        inner = _kept(BAD_CELL, lambda: self._sized(drawing_in(cells, self.drawing)))
        if isinstance(inner, Reject):
            return inner
        drawing = _kept(NOT_DRAWABLE, lambda: with_margins(inner, cells))
        if isinstance(drawing, Reject):
            return drawing
        if drawing.height * drawing.width > self.max_pixels:
            return Reject(BAD_SIZE, f"at most {self.max_pixels:,} pixels are drawn, see bulk.max_pixels")
        refused = _kept(BAD_SIZE, lambda: checked_size(drawing, Given(), self.sizes.trained, self.sizes.multiple))
        if isinstance(refused, Reject):
            return refused
        pictures = _kept(
            BAD_PICTURE,
            lambda: fitted_pictures(
                pictures_in(cells, lambda cell: picture_beside(cell, row.folder)),
                (inner.height, inner.width),
                (drawing.height, drawing.width),
            ),
        )
        if isinstance(pictures, Reject):
            return pictures
        request = _kept(NOT_DRAWABLE, lambda: request_of(cells, drawing, pictures))
        return request if isinstance(request, Reject) else self._checked(request, drawing)

    def _checked(self, request: Request, drawing: Drawing) -> Request | Reject:
        """Return the request, or why the model can't draw it."""
        if unknown := self._unknown_class(request):
            return Reject(UNKNOWN_CLASS, unknown)

        def check() -> None:
            if request.to_prompt is not None and self.conditioning.text is not TextUse.FROZEN:
                raise ValueError("between two prompts lies something only where a frozen encoder reads them")
            given = given_together([request])
            check_told(self.conditioning, given, drawing.noise_level)
            check_tile(drawing.tile, self.sizes.multiple)
            has_picture, has_mask = given.pixels is not None, given.masks is not None
            check_strength(drawing.strength, has_picture=has_picture, has_mask=has_mask)

        refused = _kept(NOT_DRAWABLE, check)
        return refused if isinstance(refused, Reject) else request

    def _unknown_class(self, request: Request) -> str:
        """Return in words which class the model has no number for; empty where all are known."""
        config = self.conditioning
        found = {
            "class_id": (() if request.class_id is None else (request.class_id,), config.num_classes),
            "layout": ([box[0] for box in request.layout or ()], config.box_numbers if config.has_layout else 0),
            "semantic_map": ((), config.map_classes),
        }
        if request.semantic_map is not None:
            found["semantic_map"] = ((int(np.max(request.semantic_map)),), config.map_classes)
        for name, (numbers, limit) in found.items():
            if limit and any(number >= limit for number in numbers):
                return f"{name} has {max(numbers)}, the model knows numbers below {limit}"
        return ""

    def _sized(self, drawing: Drawing) -> Drawing:
        rows, columns = self.sizes.trained
        return replace(drawing, height=drawing.height or rows, width=drawing.width or columns)


def prompt_table(config: GenerateConfig, conditioning: ConditioningConfig) -> PromptTable:
    """Return how the rows of a file are read for a model."""
    return PromptTable(
        prompt_column=config.bulk.prompt_column,
        carry=config.bulk.carry,
        needs_prompts=conditioning.text is not TextUse.NONE,
    )


def picture_beside(cell: Any, folder: str) -> Any:
    """Return what a cell names: bytes, a data URL's bytes, or the address of a file beside or below the table.

    Raises:
        ValueError: for an address elsewhere, which a table from anyone could name, or bytes that are no base64.
    """
    if not isinstance(cell, str):
        return cell
    if cell.startswith("data:"):
        return base64.b64decode(cell.rpartition("base64,")[2], validate=True)
    path = PurePosixPath(cell)
    if path.is_absolute() or "://" in cell or ".." in path.parts:
        raise ValueError(f"addresses of pictures count from the table's folder and stay below it, got {cell[:80]!r}")
    return join(folder, cell)


def _kept(reason: str, make: Callable[[], Any]) -> Any:
    """Return what is made, or its refusal under a reason."""
    try:
        return make()
    except ValueError as error:
        return Reject(reason, str(error))
