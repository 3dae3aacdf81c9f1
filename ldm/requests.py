"""Pictures that are asked for one by one, each with its own size, steps and picture to begin with.

Order: requests → groups that can share a batch → drawn group by group → handed back in the order they were asked for.

Letters: y pixel row, x pixel column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image as PILImage
from PIL import ImageOps

from ldm import storage
from ldm.drawing import Box, Drawing, Given
from ldm.samplers.tasks import Between, Prompt, Seed
from ldm.text_to_image import TextToImage

Picture = UInt8[np.ndarray, "y x 3"]
Mask = Bool[np.ndarray, "y x"]
SemanticMap = Int[np.ndarray, "y x"]
NO_CLASS_PIXEL = 255
"""Of a picture of classes, as in a dataset."""
LISTED = ("classes", "layouts")
"""Parts of `Given` that are no arrays."""
MASKED_FROM = 128
"""A mask's pixel of this grey or lighter is drawn anew."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Request:
    """One picture.

    Attributes:
        prompt: what it shows.
        negative_prompt: what guidance leads away from.
        seed: of its noise.
        guidance: scale; None is the model's own.
        drawing: sampler, guidance's form, size and strength; None is the model's own.
        picture: what it begins with; None for noise alone.
        mask: where the picture is drawn anew; None for everywhere.
        class_id: number of its class, for a model that is told one.
        layout: its boxes, (class, left, top, right, bottom), sides in shares of the picture.
        semantic_map: class of each pixel, negative for none, at the size that is drawn.
        small: the picture of which a larger one is drawn.
        to_prompt: what the picture lies between `prompt` and; None for the prompt alone.
        to_seed: the same of `seed`.
        share: how far along that way it lies, from 0 to 1; None where there is none.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    guidance: float | None = None
    drawing: Drawing | None = None
    picture: Picture | None = None
    mask: Mask | None = None
    class_id: int | None = None
    layout: tuple[Box, ...] | None = None
    semantic_map: SemanticMap | None = None
    small: Picture | None = None
    to_prompt: str | None = None
    to_seed: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        check_way(self.to_prompt, self.to_seed, self.share)
        if self.mask is not None and self.picture is None:
            raise ValueError(f"the mask of {self.prompt!r} needs a picture that it lies over")
        if self.mask is not None and self.picture is not None and self.mask.shape != self.picture.shape[:2]:
            raise ValueError(
                f"the mask of {self.prompt!r} has {_sides(self.mask)}, its picture {_sides(self.picture)}: "
                "they must be equal"
            )

    @property
    def label(self) -> str:
        """What it shows, in words."""
        if self.to_prompt is None or self.share is None:
            return self.prompt
        return f"{self.share:.0%} from {self.prompt} to {self.to_prompt}"

    @property
    def words(self) -> Prompt:
        """The prompt, or the place between two."""
        if self.to_prompt is None or self.share is None:
            return self.prompt
        return Between(self.prompt, self.to_prompt, self.share)

    @property
    def noise(self) -> Seed:
        """The seed, or the place between two."""
        if self.to_seed is None or self.share is None:
            return self.seed
        return Between(self.seed, self.to_seed, self.share)

    def drawing_of(self, model: TextToImage) -> Drawing:
        """Return how a model draws it, its size included."""
        drawing = self.drawing or Drawing(sampler=model.card.sampler)
        whole = self.picture if self.picture is not None else self.semantic_map
        own = model.trained_size if whole is None else (whole.shape[0], whole.shape[1])
        return replace(drawing, height=drawing.height or own[0], width=drawing.width or own[1])

    def given(self) -> dict[str, Any]:
        """Return what is given beside words, by its part of `Given`."""
        parts = {
            "pixels": self.picture,
            "masks": self.mask,
            "classes": self.class_id,
            "layouts": self.layout,
            "maps": self.semantic_map,
            "small": self.small,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def kind(self) -> tuple[object, ...]:
        """Return what requests of one batch have in common, beside how they are drawn."""
        ways = (self.to_prompt is None, self.to_seed is None)
        return (*sorted(self.given()), None if self.small is None else self.small.shape, *ways)


def check_way(to_prompt: str | None, to_seed: int | None, share: float | None) -> None:
    """Refuse a place on a way that leads nowhere, and a way without a place on it.

    Raises:
        ValueError: saying what is there of both.
    """
    if (share is None) != (to_prompt is None and to_seed is None):
        raise ValueError(
            "a picture lies on a way if it is said where that leads, to a prompt or a seed, and which share of it: "
            f"got to_prompt {to_prompt!r}, to_seed {to_seed}, share {share}"
        )
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"a share of the way lies in [0, 1], got {share:g}")


def draw(
    model: TextToImage,
    requests: Sequence[Request],
    *,
    batch_size: int = 16,
    on_done: Callable[[int], None] | None = None,
) -> list[Picture]:
    """Return one picture for each request, in their order.

    Args:
        model: what draws.
        requests: what is drawn; those of one size, sampler and kind share batches.
        batch_size: pictures that are sampled together at most.
        on_done: called with the number of pictures that are done.

    Raises:
        ValueError: for no requests, or one that the model can't draw.
    """
    if not requests:
        raise ValueError("there is nothing to draw")
    groups: dict[tuple[Drawing, tuple[object, ...]], list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault((request.drawing_of(model), request.kind()), []).append(number)
    drawn: dict[int, Picture] = {}
    for (drawing, _), numbers in groups.items():
        for start in range(0, len(numbers), batch_size):
            part = numbers[start : start + batch_size]
            pictures = draw_together(model, [requests[number] for number in part], drawing)
            drawn.update(zip(part, pictures, strict=True))
            if on_done is not None:
                on_done(len(drawn))
    return [drawn[number] for number in range(len(requests))]


def draw_together(
    model: TextToImage, requests: Sequence[Request], drawing: Drawing, num_rows: int = 0
) -> list[Picture]:
    """Return the pictures of requests of one kind that are drawn alike, as one batch.

    Args:
        model: what draws.
        requests: what is drawn.
        drawing: how, their size included.
        num_rows: rows of the batch: the last request fills it up, and its further pictures are dropped. With as many
            rows a picture is the same to the bit, whatever is drawn beside it. 0 is as many as there are requests.

    Raises:
        ValueError: for one that the model can't draw.
    """
    filled = [*requests, *[requests[-1]] * (num_rows - len(requests))]
    own = model.card.guidance
    pictures = model.generate(
        [request.words for request in filled],
        seeds=[request.noise for request in filled],
        guidance=[own if request.guidance is None else request.guidance for request in filled],
        negative_prompts=[request.negative_prompt for request in filled],
        drawing=drawing,
        given=given_together(filled),
        batch_size=len(filled),
    )
    return list(pictures[: len(requests)])


def given_together(requests: Sequence[Request]) -> Given:
    """Return what is given of requests of one kind beside their words.

    Raises:
        ValueError: if it can't be given.
    """
    parts = [request.given() for request in requests]
    lists = {name: [part[name] for part in parts] for name in parts[0]}
    together: dict[str, Any] = {name: tuple(part) if name in LISTED else np.stack(part) for name, part in lists.items()}
    return Given(**together)


def picture_from(given: Any) -> Picture:
    """Return a picture of what names or holds one: an address, a file's bytes, a PIL image, an array.

    Transparent pixels become white, as in a dataset.

    Raises:
        ValueError: if it is none of these, or no picture.
    """
    if isinstance(given, np.ndarray):
        if given.dtype != np.uint8 or given.ndim != 3 or given.shape[-1] != 3:
            raise ValueError(f"an array is a picture if it is uint8 of (rows, columns, 3), got {_described(given)}")
        return given
    image = _opened(given)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def mask_from(given: Any) -> Mask:
    """Return a mask of what names or holds one: a picture whose light pixels are drawn anew, or a bool array.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(given, np.ndarray):
        if given.dtype != np.bool_ or given.ndim != 2:
            raise ValueError(f"an array is a mask if it is bool of (rows, columns), got {_described(given)}")
        return given
    return np.asarray(_opened(given).convert("L")) >= MASKED_FROM


def map_from(given: Any) -> SemanticMap:
    """Return a semantic map of what names or holds one: an integer array, or a picture of classes, 255 for none.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(given, np.ndarray):
        if not np.issubdtype(given.dtype, np.integer) or given.ndim != 2:
            raise ValueError(f"an array is a map if it is integer of (rows, columns), got {_described(given)}")
        return given.astype(np.int64)
    image = _opened(given)
    # The numbers of a picture with a palette are its classes, whatever colours they are shown in.
    numbers = np.asarray(image if image.mode in ("L", "P") else image.convert("L")).astype(np.int64)
    return np.where(numbers == NO_CLASS_PIXEL, -1, numbers)


def layout_from(given: Any) -> tuple[Box, ...]:
    """Return the boxes of a layout: (class, left, top, right, bottom) each, sides in shares of the picture.

    Raises:
        ValueError: if a box is none.
    """
    try:
        boxes = [[float(number) for number in box] for box in given]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"a layout is boxes of five numbers each, got {str(given)[:80]}") from error
    for number, box in enumerate(boxes, start=1):
        if wrong := _why_no_box(box):
            said = " ".join(f"{part:g}" for part in box)
            raise ValueError(f"a box is class, left, top, right, bottom; box {number}, {said}, {wrong}")
    return tuple((int(number), left, top, right, low) for number, left, top, right, low in boxes)


def _why_no_box(box: list[float]) -> str:
    if len(box) != 5:
        return f"has {len(box)} numbers"
    if not all(map(math.isfinite, box)) or box[0] != int(box[0]) or box[0] < 0:
        return "has no class that is a whole number, from 0"
    if min(box[1:]) < 0 or max(box[1:]) > 1:
        return "has sides that are no shares of the picture, from 0 to 1"
    return "" if box[1] < box[3] and box[2] < box[4] else "has no room between left and right, or top and bottom"


def outpainted(picture: Picture, margins: tuple[int, int, int, int]) -> tuple[Picture, Mask]:
    """Return a picture with room around it, and the mask of that room: what is drawn there goes on from the picture.

    Args:
        picture: what stays.
        margins: pixels at its left, top, right and bottom; together with the picture they are the size that is drawn.

    Raises:
        ValueError: if a margin is negative, or all are nothing.
    """
    left, top, right, bottom = margins
    if min(margins) < 0 or not any(margins):
        raise ValueError(f"margins are pixels at left, top, right and bottom, one at least above 0: got {margins}")
    room = ((top, bottom), (left, right))
    # Its edge goes on there, for an autoencoder makes something of a hard border that is not in the picture.
    canvas = np.pad(picture, (*room, (0, 0)), mode="edge")
    return canvas, ~np.pad(np.ones(picture.shape[:2], bool), room)


def fitted(picture: Picture, size: tuple[int, int]) -> Picture:
    """Return the centre of a picture at a number of rows and columns: resized until it covers them, then cut."""
    height, width = size
    return np.asarray(ImageOps.fit(PILImage.fromarray(picture), (width, height), PILImage.Resampling.LANCZOS))


def fitted_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    """Return the mask that lies over `fitted` pictures as this one lies over the whole ones."""
    return fitted_map(mask.astype(np.int64), size) > 0


def fitted_map(numbers: SemanticMap, size: tuple[int, int]) -> SemanticMap:
    """Return the map that lies over `fitted` pictures as this one lies over the whole ones; the nearest's classes."""
    height, width = size
    grey = PILImage.fromarray(numbers.astype(np.int32))
    return np.asarray(ImageOps.fit(grey, (width, height), PILImage.Resampling.NEAREST)).astype(np.int64)


def _opened(given: Any) -> PILImage.Image:
    if isinstance(given, PILImage.Image):
        return ImageOps.exif_transpose(given)
    if isinstance(given, str):
        try:
            given = storage.read_bytes(given)
        except storage.PLACE_ERRORS as error:
            raise ValueError(f"{given} can't be read: {type(error).__name__} {error}") from error
    if not isinstance(given, bytes):
        raise ValueError(f"a picture is an address, bytes, a PIL image or an array, got {type(given).__name__}")
    try:
        image = PILImage.open(BytesIO(given))
        image.load()
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, PILImage.DecompressionBombError) as error:  # Pillow's SyntaxError: a broken PNG
        raise ValueError(f"this is no picture that can be read: {error}") from error


def _sides(array: np.ndarray[Any, Any]) -> str:
    return f"{array.shape[0]} x {array.shape[1]} px"


def _described(array: np.ndarray[Any, Any]) -> str:
    return f"{array.dtype} of {array.shape}"
