"""The frozen autoencoder of one worker, and what turns rows' bytes into its input.

Order: rows of one part → on threads: decoded, cropped, scaled; small copies, maps and masks beside → every form of the
rows (each crop, plain and mirrored, whole and masked) → raw moments.

Letters: b batch, m moment channel, h latent row, w latent column, y pixel row, x pixel column.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image as PillowImage
from torch import Tensor

from ldm.autoencoder.regularizer import mode
from ldm.conditioning.degradation import degraded
from ldm.conditioning.masks import random_mask
from ldm.first_stage import load_autoencoder
from ldm.precision import autocast
from ldm.types import Image, Moments
from pipeline.crops import Part, crop_boxes, cut
from pipeline.images import Pixels, decode_pixels, image_of_pixels, image_suffix
from pipeline.latent_config import Degradation, Device, LatentsConfig
from pipeline.latent_shard import low_res_name, map_name, mask_name, masked_name, moments_name
from pipeline.store.schema import Row

MAX_CPU_PIXELS = 1 << 18
"""Pixels that go through a network at once on CPUs: activations there take a worker's own memory, hundreds of bytes a
pixel for each of several layers, and more pixels at once are slower."""
LAYOUT = torch.channels_last
"""How weights and images lie in memory: convolutions are 1.1 to 1.4 times as fast as in torch's own layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Rows of one part, decoded.

    Attributes:
        images: the rows' crops, a batch for each crop.
        masks: what is to be filled in, uint8 0 or 1, shape (b, y, x), for each mask; the same for all crops.
        stored: arrays that are stored as they are, by member, each of shape (b, ...), uint8.
    """

    images: list[Image]
    masks: list[UInt8[np.ndarray, "b y x"]]
    stored: dict[str, UInt8[np.ndarray, "b ..."]]


@dataclass(frozen=True, slots=True)
class _RowPixels:
    """One row: crops, and beside them small copies and maps of each, and masks."""

    crops: list[Pixels]
    low_res: list[Pixels]
    maps: list[UInt8[np.ndarray, "y x"]]
    masks: list[UInt8[np.ndarray, "y x"]]


class Encoder:
    """The frozen autoencoder and what turns rows' bytes into its input; one for each worker."""

    def __init__(self, config: LatentsConfig) -> None:
        """Load the autoencoder and take the worker's share of CPUs."""
        num_threads = max(1, int(config.num_cpus))
        torch.set_num_threads(num_threads)
        self.config = config
        self.device = torch_device(config.device)
        autoencoder = load_autoencoder(config.autoencoder).requires_grad_(False).eval()
        self.autoencoder = autoencoder.to(self.device).to(memory_format=LAYOUT)
        self.kind = self.autoencoder.config.latent_kind
        self._decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    @property
    def factor(self) -> int:
        """Pixels of a latent's side."""
        return self.autoencoder.config.factor

    def prepare(self, rows: Sequence[Row], part: Part) -> Prepared:
        """Return the rows' crops and what is stored beside them, made on the worker's threads."""
        made = list(self._decoders.map(lambda row: self._row_pixels(row, part), rows))
        crops, columns = range(self.config.crop.count), self.config.columns
        stored: dict[str, UInt8[np.ndarray, "b ..."]] = {}
        for crop in crops:
            if columns.low_res_factor:
                stored[low_res_name(crop)] = np.stack([row.low_res[crop].transpose(2, 0, 1) for row in made])
            if columns.map_member:
                stored[map_name(crop)] = np.stack([row.maps[crop] for row in made])
        masks = [np.stack([row.masks[mask] for row in made]) for mask in range(columns.num_masks)]
        for number, mask in enumerate(masks):
            middle = self.factor // 2  # the nearest pixel to the middle of each latent's
            stored[mask_name(number)] = mask[:, middle :: self.factor, middle :: self.factor]
        images = [image_of_pixels([row.crops[crop] for row in made]) for crop in crops]
        return Prepared(images=images, masks=masks, stored=stored)

    def forms(self, prepared: Prepared) -> Iterator[tuple[str, Moments]]:
        """Yield raw moments, float32 on the device, under the names of their members; the first crop's come first."""
        mirrored = (False, True) if self.config.flip else (False,)
        for crop, image in enumerate(prepared.images):
            for flipped in mirrored:
                yield moments_name(crop, flipped), self.encode(image.flip(-1) if flipped else image)
            for number, mask in enumerate(prepared.masks):
                seen = image * (1.0 - torch.from_numpy(mask)[:, None].float())
                for flipped in mirrored:
                    yield masked_name(number, crop, flipped), self.encode(seen.flip(-1) if flipped else seen)

    def encode(self, images: Image) -> Moments:
        """Return the images' raw moments, float32, on the device."""
        with torch.inference_mode(), autocast(self.config.precision, self.device):
            parts = images.split(self._num_together(len(images), images.shape[-2] * images.shape[-1]))
            return torch.cat([self.autoencoder.encode(self._laid(part)).float() for part in parts]).contiguous()

    def decode(self, moments: Moments) -> Image:
        """Return the images of the posteriors' means, or of VQ's latents, on the CPU."""
        with torch.inference_mode(), autocast(self.config.precision, self.device):
            pixels = moments.shape[-2] * moments.shape[-1] * self.factor**2
            latents = [
                mode(self._laid(part), self.kind) for part in moments.split(self._num_together(len(moments), pixels))
            ]
            return torch.cat([self.autoencoder.decode(latent).float().cpu() for latent in latents]).contiguous()

    def _laid(self, batch: Tensor) -> Tensor:
        return batch.to(self.device, memory_format=LAYOUT)

    def _num_together(self, num_images: int, pixels: int) -> int:
        """Return how many images of so many pixels go through a network at once."""
        return num_images if self.device.type == "cuda" else max(1, MAX_CPU_PIXELS // pixels)

    def _row_pixels(self, row: Row, part: Part) -> _RowPixels:
        columns = self.config.columns
        pixels = decode_pixels(row[image_suffix(tuple(row))])
        height, width = pixels.shape[:2]
        boxes = crop_boxes(row["__key__"], width, height, part.size, self.config.crop.count)
        crops = [cut(pixels, box, part.size) for box in boxes]
        low_res, maps, masks = [], [], []
        if columns.low_res_factor:
            low_res = [
                self._small(np.ascontiguousarray(crop), row["__key__"], number) for number, crop in enumerate(crops)
            ]
        if columns.map_member:
            classes = _decode_map(row, columns.map_member, (width, height))
            maps = [cut(classes, box, part.size, smooth=False) for box in boxes]
        if columns.num_masks:
            dice = np.random.default_rng([columns.mask_seed, int(row["__key__"], 16)])
            masks = [random_mask(dice, *part.size[::-1]).astype(np.uint8) for _ in range(columns.num_masks)]
        return _RowPixels(crops, low_res, maps, masks)

    def _small(self, crop: Pixels, key: str, number: int) -> Pixels:
        """Return the small copy of a row's crop."""
        columns, (height, width) = self.config.columns, crop.shape[:2]
        size = (height // columns.low_res_factor, width // columns.low_res_factor)  # rows, columns
        match columns.degradation:
            case Degradation.BICUBIC:
                return cut(crop, (0.0, 0.0, float(width), float(height)), size[::-1])
            case Degradation.BSR_LIGHT:
                return degraded(np.random.default_rng([columns.mask_seed, int(key, 16), number]), crop, size)


def has_gpu() -> bool:
    """Say whether this machine has a GPU that torch can use."""
    return torch.cuda.is_available()


def torch_device(device: Device) -> torch.device:
    """Return the device that is meant; raises ValueError if a GPU is asked for where there is none."""
    match device:
        case Device.CPU:
            return torch.device("cpu")
        case Device.CUDA if not has_gpu():
            raise ValueError("device is cuda, and this machine has no GPU that torch can use")
        case Device.CUDA:
            return torch.device("cuda")
        case Device.AUTO:
            return torch.device("cuda" if has_gpu() else "cpu")


def _decode_map(row: Row, member: str, size: tuple[int, int]) -> UInt8[np.ndarray, "y x"]:
    if member not in row:
        raise ValueError(f"row {row['__key__']} has no member {member!r}; columns.map_member names the semantic map")
    with PillowImage.open(io.BytesIO(row[member])) as image:
        if image.mode not in ("L", "P") or image.size != size:
            raise ValueError(
                f"row {row['__key__']}: its {member} must be 8 bits a pixel and {size[0]}x{size[1]} like its picture, "
                f"it is {image.mode} and {image.size[0]}x{image.size[1]}"
            )
        return np.asarray(image)
