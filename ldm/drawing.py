"""How pictures are drawn beside their words: sampler, guidance's form, size, and pictures to begin with.

Letters: n number of pictures, y pixel row, x pixel column.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from ldm.config import Config, added_later
from ldm.samplers.guidance import PLAIN, GuidanceForm
from ldm.samplers.sample import SamplerConfig
from ldm.types import Image

Pixels = UInt8[np.ndarray, "n y x 3"]
PixelMasks = Bool[np.ndarray, "n y x"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing(Config):
    """How pictures are drawn."""

    sampler: SamplerConfig = SamplerConfig()
    """How latents are sampled."""
    form: GuidanceForm = added_later(PLAIN)
    """What is made of guidance."""
    height: int = added_later(0)
    """Pixel rows, a multiple of what the networks shrink; 0 is what the model was trained on, or those of a given
    picture. More than trained is sampled convolutionally (Rombach et al. 2022, section 4.3.2)."""
    width: int = added_later(0)
    """Pixel columns, as rows."""
    strength: float = added_later(1.0)
    """With a picture to begin with: share of the steps that are made, from the picture under noise on; 1 begins with
    noise alone, as inpainting does."""

    @property
    def num_steps(self) -> int:
        """Steps that are made."""
        return max(1, round(self.strength * self.sampler.num_steps))

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 0:
            raise ValueError(f"height and width can't be negative, got {self.height} and {self.width}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {self.strength}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """Pictures to begin with, one for each prompt.

    Attributes:
        pixels: the pictures, uint8.
        masks: True where a picture is drawn anew; what is False comes back untouched. None draws all of it anew.
    """

    pixels: Pixels
    masks: PixelMasks | None = None

    def __post_init__(self) -> None:
        if self.masks is not None and self.masks.shape != self.pixels.shape[:3]:
            raise ValueError(
                f"masks of shape {self.masks.shape} do not lie over pictures of shape {self.pixels.shape[:3]}: "
                "(number, rows, columns) must be equal"
            )
        if self.masks is not None and not self.masks.any(axis=(1, 2)).all():
            raise ValueError("a mask has no pixel that is to be drawn anew")

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def rows(self, start: int, stop: int) -> Draft:
        """Return pictures [start, stop)."""
        masks = None if self.masks is None else self.masks[start:stop]
        return Draft(pixels=self.pixels[start:stop], masks=masks)

    def kept_in(self, drawn: Pixels) -> Pixels:
        """Return drawn pictures with this draft's own pixels where they are kept."""
        if self.masks is None:
            return drawn
        return np.where(self.masks[..., None], drawn, self.pixels)


def checked_size(drawing: Drawing, draft: Draft | None, trained: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return the rows and columns that are drawn.

    Args:
        drawing: what is asked for.
        draft: pictures to begin with, which have their own.
        trained: those of the training.
        multiple: what they must be multiples of.

    Raises:
        ValueError: if they are none, naming the nearest that are, or not those of the pictures.
    """
    given = draft.size if draft else trained
    size = drawing.height or given[0], drawing.width or given[1]
    if draft and size != draft.size:
        raise ValueError(f"pictures of {_said(draft.size)} can't begin a drawing of {_said(size)}: resize them first")
    if any(side % multiple or side < multiple for side in size):
        nearest = [max(multiple, round(side / multiple) * multiple) for side in size]
        raise ValueError(
            f"rows and columns must be multiples of {multiple} px, got {_said(size)}; the nearest is "
            f"{_said((nearest[0], nearest[1]))}"
        )
    return size


def pixels_of(images: Image) -> Pixels:
    """Return uint8 pixels, channels last, of images in [-1, 1]."""
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels: Pixels = scaled.permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def images_of(pixels: Pixels, device: torch.device) -> Image:
    """Return images in [-1, 1], shape (n, 3, y, x), of uint8 pixels."""
    images: Tensor = torch.from_numpy(np.ascontiguousarray(pixels)).to(device).permute(0, 3, 1, 2).float()
    return images / 127.5 - 1


def _said(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} px"
