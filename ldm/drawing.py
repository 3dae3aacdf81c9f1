"""How pictures are drawn beside their words: sampler, guidance's form, size, and pictures to begin with.

Letters: n number of pictures, y pixel row, x pixel column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from ldm.conditioning.conditioner import ConditioningConfig
from ldm.conditioning.layout import num_objects
from ldm.config import Config, added_later
from ldm.precision import Precision
from ldm.samplers.guidance import PLAIN, GuidanceForm
from ldm.samplers.sample import SamplerConfig
from ldm.samplers.tasks import num_steps_of
from ldm.types import Image

Pixels = UInt8[np.ndarray, "n y x 3"]
PixelMasks = Bool[np.ndarray, "n y x"]
SemanticMaps = Int[np.ndarray, "n y x"]
Box = tuple[int, float, float, float, float]
OPTIONS = {
    "classes": "--classes",
    "layouts": "--layouts",
    "maps": "--semantic-map",
    "small": "--small",
    "masks": "inpaint ... --picture --mask",
}
"""How each part is given to the job."""
NO_BOX = (-1.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing(Config):
    """How pictures are drawn."""

    sampler: SamplerConfig = SamplerConfig()
    """How latents are sampled."""
    form: GuidanceForm = added_later(PLAIN)
    """What is made of guidance."""
    height: int = added_later(0)
    """Pixel rows, a multiple of what the networks shrink; 0 is what the model was trained on, and in Python those of a
    given picture. More than trained is sampled convolutionally (Rombach et al. 2022, section 4.3.2)."""
    width: int = added_later(0)
    """Pixel columns, as rows."""
    strength: float = added_later(1.0)
    """With a picture to begin with: share of the steps that are made, from the picture under noise on; 1 begins with
    noise alone, as inpainting does."""
    noise_level: int = added_later(0)
    """With a small picture: level of the noise that is laid over it, for models that were trained with noise_levels:
    the higher, the more the model invents."""
    tile: int = added_later(0)
    """Side in pixels of overlapping square tiles that networks see one at a time, so that memory is a tile's whatever
    the size; 0 is all at once."""
    precision: Precision = added_later(Precision.FP32)
    """Number format that the denoiser computes in: bf16 or fp16 where the hardware has it (GPUs), in a copy beside its
    float32 weights. Its steps, and the decoding, stay in float32."""
    is_compiled: bool = added_later(False)
    """Whether the denoiser is compiled first (torch.compile), once for each shape: minutes, for many pictures."""

    @property
    def num_steps(self) -> int:
        """Steps that are made."""
        return num_steps_of(self.sampler.num_steps, self.strength)

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 0:
            raise ValueError(f"height and width can't be negative, got {self.height} and {self.width}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], got {self.strength}")
        if self.noise_level < 0:
            raise ValueError(f"noise_level can't be negative, got {self.noise_level}")
        if self.tile < 0:
            raise ValueError(f"tile can't be negative, got {self.tile}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Given:
    """What is given of n pictures beside their words; None is nothing.

    Attributes:
        pixels: pictures to begin with, or to draw anew in part.
        masks: True where a picture is drawn anew; what is False comes back untouched. Needs pixels.
        classes: number of each picture's class; negative for none.
        layouts: boxes of each picture, (class, left, top, right, bottom), sides in shares of its own.
        maps: class of each pixel, negative for none, at the size that is drawn.
        small: pictures of which larger ones are drawn.
    """

    pixels: Pixels | None = None
    masks: PixelMasks | None = None
    classes: tuple[int, ...] | None = None
    layouts: tuple[tuple[Box, ...], ...] | None = None
    maps: SemanticMaps | None = None
    small: Pixels | None = None

    def __post_init__(self) -> None:
        if len(set(self.counts().values())) > 1:
            raise ValueError(f"as many are needed of each: got {_listed(self.counts())}")
        if self.masks is None:
            return
        if self.pixels is None:
            raise ValueError("masks need the pictures that they lie over")
        if self.masks.shape != self.pixels.shape[:3]:
            raise ValueError(
                f"masks of shape {self.masks.shape} do not lie over pictures of shape {self.pixels.shape[:3]}: "
                "(number, rows, columns) must be equal"
            )
        if not self.masks.any(axis=(1, 2)).all():
            raise ValueError("a mask has no pixel that is to be drawn anew")

    def counts(self) -> dict[str, int]:
        """Return how many there are of what is given."""
        there = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: len(found) for name, found in there.items() if found is not None}

    @property
    def size(self) -> tuple[int, int] | None:
        """Rows and columns of what is given at the size that is drawn, if anything is."""
        whole = self.pixels if self.pixels is not None else self.maps
        return None if whole is None else (whole.shape[1], whole.shape[2])

    def rows(self, start: int, stop: int) -> Given:
        """Return what is given of pictures [start, stop)."""
        there = {name: getattr(self, name)[start:stop] for name in self.counts()}
        return Given(**there)

    def kept_in(self, drawn: Pixels) -> Pixels:
        """Return drawn pictures with their own pixels where they are kept."""
        if self.masks is None or self.pixels is None:
            return drawn
        return np.where(self.masks[..., None], drawn, self.pixels)

    def columns(self, count: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return it as columns of a latent cache, of so many pictures of (rows, columns), each its own original."""
        height, width = (float(side) for side in size)
        found = {
            "size": torch.tensor([[height, width]] * count),
            "crop": torch.tensor([[0.0, 0.0, height, width]] * count),
        }
        if self.classes is not None:
            found["class_id"] = torch.tensor(self.classes)
        if self.layouts is not None:
            longest = max(1, max(map(len, self.layouts)))
            filled = [[*layout, *[NO_BOX] * (longest - len(layout))] for layout in self.layouts]
            found["boxes"] = torch.tensor(filled, dtype=torch.float32)
        if self.maps is not None:
            found["semantic_map"] = torch.from_numpy(self.maps).long()
        if self.small is not None:
            found["low_res"] = images_of(self.small, torch.device("cpu"))
        return found


def check_strength(strength: float, *, has_picture: bool, has_mask: bool) -> None:
    """Refuse a strength without a picture, and one at which nothing of a picture would be looked at.

    Raises:
        ValueError: saying which of both.
    """
    if strength < 1 and not has_picture:
        raise ValueError(f"strength {strength:g} is of a picture to begin with, and none is given")
    if strength == 1 and has_picture and not has_mask:
        raise ValueError(
            "at strength 1 nothing of the picture is looked at: give a strength below, such as 0.7, or a mask"
        )


def check_told(config: ConditioningConfig, given: Given, noise_level: int = 0) -> None:
    """Refuse what a model can't be told, and what it must be told and is not.

    Raises:
        ValueError: naming the parts of `Given`.
    """
    needed = {
        "classes": config.num_classes > 0,
        "layouts": config.has_layout,
        "maps": config.map_classes > 0,
        "small": config.has_low_res,
        "masks": config.has_masked_image,
    }
    there = given.counts()
    if lacking := [name for name, is_needed in needed.items() if is_needed and name not in there]:
        options = " ".join(OPTIONS[name] for name in lacking)
        raise ValueError(
            f"this model is told {' and '.join(lacking)}, which must be given with every picture: jobs.sample {options}"
        )
    if idle := [name for name in ("classes", "layouts", "maps", "small") if name in there and not needed[name]]:
        raise ValueError(f"this model is not told {' or '.join(idle)}: it was trained without")
    most = num_objects(config.layout_transformer) if config.has_layout else 0
    if given.layouts is not None and (longest := max(map(len, given.layouts), default=0)) > most:
        raise ValueError(f"this model reads {most} boxes a layout at most, got {longest}")
    if noise_level >= max(1, config.noise_levels):
        raise ValueError(f"noise_level {noise_level} is not among the {config.noise_levels} that this model was told")


def check_tile(tile: int, multiple: int) -> None:
    """Refuse a side of tiles that networks can't take.

    Raises:
        ValueError: naming the least.
    """
    if tile % multiple or tile == multiple:
        raise ValueError(f"tiles have a side of {2 * multiple} px at least, in steps of {multiple}, got {tile}")


def checked_size(drawing: Drawing, given: Given, trained: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return the rows and columns that are drawn.

    Args:
        drawing: what is asked for.
        given: pictures or maps, which have their own.
        trained: those of the training.
        multiple: what they must be multiples of.

    Raises:
        ValueError: if they are none, naming the nearest that are, or not those of the pictures.
    """
    own = given.size or trained
    size = drawing.height or own[0], drawing.width or own[1]
    if given.size and size != given.size:
        raise ValueError(
            f"pictures or maps of {_said(given.size)} do not go with a drawing of {_said(size)}: resize them"
        )
    if given.maps is not None and given.maps.shape[1:] != size:
        shape = (given.maps.shape[1], given.maps.shape[2])
        raise ValueError(f"maps of {_said(shape)} do not lie over a drawing of {_said(size)}: resize them")
    if given.small is not None and given.small.shape[1] * size[1] != given.small.shape[2] * size[0]:
        shape = (given.small.shape[1], given.small.shape[2])
        raise ValueError(
            f"a small picture of {_said(shape)} has another shape than a drawing of {_said(size)}: say height and width"
        )
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


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
