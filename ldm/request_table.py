"""Rows of tables as requests of pictures: which columns there are, what their cells may hold, what empty ones mean.

Order: a row → its cells that are not empty → numbers, texts and boxes as they are meant → the pictures that it names →
a request. A table that is served holds pictures as bytes or base64; what else names one is its reader's to say.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ldm.drawing import Box, Drawing
from ldm.requests import (
    Request,
    check_way,
    fitted,
    fitted_map,
    fitted_mask,
    layout_from,
    map_from,
    mask_from,
    outpainted,
    picture_from,
)

PROMPT = "prompt"
WHOLE_NUMBERS = ("seed", "steps", "height", "width", "class_id", "noise_level", "tile", "to_seed")
NUMBERS = ("guidance", "strength", "share")
TEXTS = ("negative_prompt", "to_prompt")
SEEDS = ("seed", "to_seed")
PICTURES: dict[str, Callable[[Any], Any]] = {
    "init_image": picture_from,
    "mask": mask_from,
    "semantic_map": map_from,
    "small": picture_from,
}
"""Columns of pictures, and what makes arrays of them."""
COLUMNS = (
    PROMPT,
    "negative_prompt",
    "seed",
    "guidance",
    "steps",
    "height",
    "width",
    "init_image",
    "mask",
    "strength",
    "class_id",
    "layout",
    "semantic_map",
    "small",
    "noise_level",
    "tile",
    "margins",
    "to_prompt",
    "to_seed",
    "share",
)
MAX_SEED = 1 << 63
MAX_MARGIN = 1 << 14
"""Pixels; a table from anyone could ask for more than the memory holds."""


def is_empty(cell: Any) -> bool:
    """Say whether a cell says nothing: None, NaN, no letters, no bytes."""
    return (
        cell is None or (isinstance(cell, str | bytes) and not cell) or (isinstance(cell, float) and math.isnan(cell))
    )


def typed_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's cells as they are meant, the empty ones left out but for the prompt; pictures stay as they came.

    Raises:
        ValueError: if a number is none, the prompt no text, a layout no boxes, or margins are not four.
    """
    cells = {name: cell for name, cell in row.items() if name == PROMPT or not is_empty(cell)}
    if not isinstance(cells[PROMPT], str):
        raise ValueError(f"a prompt is text, got {cells[PROMPT]!r}")
    for name in [name for name in WHOLE_NUMBERS if name in cells]:
        cells[name] = _whole_number(name, cells[name])
    for name in [name for name in NUMBERS if name in cells]:
        cells[name] = _number(name, cells[name])
    for name in SEEDS:
        if not 0 <= cells.get(name, 0) < MAX_SEED:
            raise ValueError(f"a seed lies in [0, 2^63), got {cells[name]}")
    for name in [name for name in TEXTS if name in cells]:
        cells[name] = str(cells[name])
    if "margins" in cells:
        cells["margins"] = _margins_in(cells["margins"])
    check_way(cells.get("to_prompt"), cells.get("to_seed"), cells.get("share"))
    if "layout" in cells:
        cells["layout"] = layout_in(cells["layout"])
    return cells


def drawing_in(cells: Mapping[str, Any], own: Drawing) -> Drawing:
    """Return how a row is drawn: as it says, else as `own` does; a strength is of rows with a picture only.

    Raises:
        ValueError: if it can't be drawn so.
    """
    return replace(
        own,
        sampler=replace(own.sampler, num_steps=cells.get("steps", own.sampler.num_steps)),
        height=cells.get("height", own.height),
        width=cells.get("width", own.width),
        strength=cells.get("strength", own.strength if "init_image" in cells else 1.0),
        noise_level=cells.get("noise_level", own.noise_level),
        tile=cells.get("tile", own.tile),
    )


def pictures_in(cells: Mapping[str, Any], opened: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the arrays of the pictures that a row names.

    Args:
        cells: as `typed_cells` gave them.
        opened: a cell to what `ldm.requests.picture_from` takes.

    Raises:
        ValueError: if one can't be read, naming its column.
    """
    found = {}
    for name in [name for name in PICTURES if name in cells]:
        try:
            found[name] = PICTURES[name](opened(cells[name]))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return found


def fitted_pictures(pictures: Mapping[str, Any], size: tuple[int, int], whole: tuple[int, int]) -> dict[str, Any]:
    """Return pictures at their rows and columns, cut as `jobs/sample.py` cuts them; small ones stay.

    Args:
        pictures: by their columns.
        size: of the picture to begin with and its mask, margins left out.
        whole: of all that is drawn, which a map lies over.

    Raises:
        ValueError: if a mask is not of its picture's size.
    """
    picture, mask = pictures.get("init_image"), pictures.get("mask")
    if picture is not None and mask is not None and picture.shape[:2] != mask.shape:
        raise ValueError(
            f"the mask has {mask.shape[1]} x {mask.shape[0]} px, the picture {picture.shape[1]} x {picture.shape[0]} px"
        )
    fitting: dict[str, Callable[[Any], np.ndarray[Any, Any]]] = {
        "init_image": lambda array: fitted(array, size),
        "mask": lambda array: fitted_mask(array, size),
        "semantic_map": lambda array: fitted_map(array, whole),
    }
    return {name: fitting[name](array) if name in fitting else array for name, array in pictures.items()}


def with_margins(drawing: Drawing, cells: Mapping[str, Any]) -> Drawing:
    """Return how the whole is drawn of a picture that gets margins: where the drawing names sides, they grow by them.

    Raises:
        ValueError: if a row has margins and no picture, or a mask as well.
    """
    if "margins" not in cells:
        return drawing
    if "init_image" not in cells or "mask" in cells:
        raise ValueError("margins are drawn around an init_image, all of them anew: without it, or with a mask, none")
    left, top, right, bottom = cells["margins"]
    height, width = drawing.height, drawing.width
    return replace(drawing, height=height and height + top + bottom, width=width and width + left + right)


def request_of(cells: Mapping[str, Any], drawing: Drawing, pictures: Mapping[str, Any]) -> Request:
    """Return the request of a row that names its seed.

    Args:
        cells: as `typed_cells` gave them.
        drawing: how the whole is drawn, margins included.
        pictures: as `pictures_in` gave them, without the margins.

    Raises:
        ValueError: if its parts don't go together.
    """
    picture, mask = pictures.get("init_image"), pictures.get("mask")
    if picture is not None and "margins" in cells:
        picture, mask = outpainted(picture, cells["margins"])
    return Request(
        prompt=cells[PROMPT],
        negative_prompt=cells.get("negative_prompt", ""),
        seed=cells["seed"],
        guidance=cells.get("guidance"),
        drawing=drawing,
        picture=picture,
        mask=mask,
        class_id=cells.get("class_id"),
        layout=cells.get("layout"),
        semantic_map=pictures.get("semantic_map"),
        small=pictures.get("small"),
        to_prompt=cells.get("to_prompt"),
        to_seed=cells.get("to_seed"),
        share=cells.get("share"),
    )


def encoded_picture(cell: Any) -> Any:
    """Return what a served cell holds: of text the bytes that it encodes; an address would be opened with our rights.

    Raises:
        ValueError: if it is text of another kind.
    """
    if not isinstance(cell, str):
        return cell
    try:
        return base64.b64decode(cell.rpartition("base64,")[2], validate=True)
    except ValueError as error:
        raise ValueError(
            f"a picture in a table is base64 of a PNG's or JPEG's bytes, no address: got {cell[:40]!r}"
        ) from error


def layout_in(cell: Any) -> tuple[Box, ...]:
    """Return the boxes of a cell: a list of them, its JSON, or "CLASS LEFT TOP RIGHT BOTTOM; ...".

    Raises:
        ValueError: if it is none of these.
    """
    return layout_from(boxes_in(cell) if isinstance(cell, str) else cell)


def boxes_in(text: str) -> list[list[float]]:
    """Return the numbers of a layout's boxes in words.

    Raises:
        ValueError: saying how a layout is written.
    """
    try:
        if text.lstrip().startswith("["):
            found = json.loads(text)
            return found if isinstance(found, list) else [found]
        return [[float(number) for number in box.split()] for box in text.split(";") if box.strip()]
    except ValueError as error:
        raise ValueError(
            f"a layout is 'CLASS LEFT TOP RIGHT BOTTOM; ...', all numbers, got {text!r}: a class's is its place in the "
            "list that the data were made with"
        ) from error


def _margins_in(cell: Any) -> tuple[int, int, int, int]:
    """Return the four margins of a cell: a list of them, its JSON, or "LEFT TOP RIGHT BOTTOM"."""
    parts = cell.strip("[]() ").replace(",", " ").split() if isinstance(cell, str) else cell
    if not isinstance(parts, list | tuple | np.ndarray) or len(parts) != 4:
        raise ValueError(f"margins are pixels at left, top, right and bottom, got {str(cell)[:40]!r}")
    left, top, right, bottom = (_whole_number("a margin", part) for part in parts)
    if min(left, top, right, bottom) < 0 or not 0 < max(left, top, right, bottom) <= MAX_MARGIN:
        raise ValueError(f"margins are not negative, one at least above 0, none above {MAX_MARGIN:,}: got {parts}")
    return left, top, right, bottom


def _whole_number(name: str, cell: Any) -> int:
    if isinstance(cell, str) and cell.strip().isdecimal():
        return int(cell)  # a float would round large ones
    number = cell if isinstance(cell, int | np.integer) else _number(name, cell)
    if int(number) != number:
        raise ValueError(f"{name} is a whole number, got {cell!r}")
    return int(number)


def _number(name: str, cell: Any) -> float:
    try:
        number = float(cell)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is a number, got {str(cell)[:40]}") from error
    if not math.isfinite(number):
        raise ValueError(f"{name} is a finite number, got {cell!r}")
    return number
