"""From a batch of a latent cache to what a denoiser is told of its rows, each condition dropped where the draw says so.

What is dropped is a function of (seed, position of the row), as all draws of a training are. It is one draw for all
conditions, the one by which the loader drops captions: where their shares are equal they are dropped together, which is
what guidance compares with; where they differ, the rarer ones fall within the more frequent ones.

Letters: b batch, c latent channel, h latent row, w latent column, y pixel row, x pixel column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.conditioning.conditioner import ConditioningConfig, TextUse
from ldm.conditioning.layout import layout_tokens, null_layout, position_channels
from ldm.conditioning.noise_levels import with_noise
from ldm.latents import LatentSpace
from ldm.randomness import Draw, normal, uniform
from ldm.types import Condition, LatentBatch, SpatialCondition


@dataclass(frozen=True, kw_only=True, slots=True)
class RowConditions:
    """Makes conditions of batches.

    Attributes:
        config: what a denoiser is told.
        space: raw and scaled latents, for the latents of masked images.
        factor: pixels of a latent's side.
        seed: of the draws that drop a condition.
    """

    config: ConditioningConfig
    space: LatentSpace
    factor: int
    seed: int

    def drawn(self, batch: LatentBatch) -> Condition:
        """Return the conditions for a training step, some of them dropped."""
        config, samples = self.config, batch.samples.tolist()
        draws = uniform(self.seed, Draw.DROPOUT, samples)
        return self._condition(
            batch,
            level=(uniform(self.seed, Draw.LEVEL, samples) * config.noise_levels).long(),
            no_class=draws < config.class_dropout,
            no_layout=draws < config.layout_dropout,
            no_map=draws < config.map_dropout,
        )

    def whole(self, batch: LatentBatch, level: int = 0) -> Condition:
        """Return the conditions with nothing dropped, and all small pictures at one level of noise, if any."""
        never = torch.zeros(len(batch.keys), dtype=torch.bool)
        levels = torch.full((len(batch.keys),), level)
        return self._condition(batch, level=levels, no_class=never, no_layout=never, no_map=never)

    def _condition(
        self, batch: LatentBatch, *, level: Tensor, no_class: Tensor, no_layout: Tensor, no_map: Tensor
    ) -> Condition:
        config, text = self.config, batch.condition
        if config.text is TextUse.NONE:
            text = Condition()
        if text.tokens is not None:
            _check_numbers("token", text.tokens, config.text_transformer.vocab_size)
        return replace(
            text,
            spatial=self._spatial(batch, level),
            level=level if config.noise_levels else None,
            sizes=self._sizes(batch) if config.has_sizes else None,
            class_id=self._class_id(batch, no_class) if config.num_classes else None,
            layout=self._layout(batch, no_layout) if config.has_layout else None,
            semantic_map=self._map(batch, no_map) if config.map_classes else None,
        )

    def _class_id(self, batch: LatentBatch, dropped: Tensor) -> Tensor:
        found, null = column(batch.columns, "class_id"), self.config.num_classes
        _check_numbers("class", found, null)
        return torch.where((found < 0) | dropped, null, found)

    def _layout(self, batch: LatentBatch, dropped: Tensor) -> Tensor:
        config = self.config.layout_transformer
        names = ("boxes", "size", "crop")
        boxes, size, crop = (column(batch.columns, name) for name in names)
        _check_numbers("box's class", boxes[..., 0], self.config.box_numbers)
        tokens = layout_tokens(boxes, size, crop, config)
        return torch.where(dropped[:, None], null_layout(len(tokens), config), tokens)

    def _map(self, batch: LatentBatch, dropped: Tensor) -> Tensor:
        found = column(batch.columns, "semantic_map")
        _check_numbers("semantic map's class", found, self.config.map_classes)
        return found.masked_fill(dropped[:, None, None], -1)

    def _sizes(self, batch: LatentBatch) -> Tensor:
        size, crop = column(batch.columns, "size"), column(batch.columns, "crop")
        target = torch.tensor([side * self.factor for side in batch.moments.shape[-2:]], dtype=torch.float32)
        return torch.cat([size, crop[:, :2] / crop[:, 2:] * target, target.expand_as(size)], dim=1)

    def _spatial(self, batch: LatentBatch, level: Tensor) -> SpatialCondition | None:
        """Return mask and masked image's latent, the small image, then each latent's place, at the latent's size.

        Mask first is Stable Diffusion's order; the paper's inpainting_big was released with the mask last, so its
        weights must have their input channels turned before they are used with this.
        """
        parts: list[Tensor] = []
        if self.config.has_masked_image:
            masked = column(batch.columns, "masked_moments")
            parts += [column(batch.columns, "mask"), self.space.scaled_mode(masked)]
        if self.config.has_low_res:
            small = _resized(column(batch.columns, "low_res"), batch.moments.shape[-2:])
            if self.config.noise_levels:
                noise = normal(self.seed, Draw.SMALL_NOISE, batch.samples.tolist(), tuple(small.shape[1:]))
                small = with_noise(small, level, noise)
            parts.append(small)
        if self.config.has_positions:
            height, width = batch.moments.shape[-2:]
            parts.append(position_channels(len(batch.keys), (height, width)))
        return torch.cat(parts, dim=1) if parts else None


def null_condition(config: ConditioningConfig, condition: Condition, null_text: Condition) -> Condition:
    """Return what guidance compares a condition with: every part that training drops is null, the others stay.

    Args:
        config: what the denoiser is told.
        condition: of b rows.
        null_text: the condition of the empty caption, of b rows or of one for all.
    """
    nulls = {
        "class_id": (config.num_classes, config.class_dropout),
        "layout": (config.layout_transformer.vocab_size - 1, config.layout_dropout),
        "semantic_map": (-1, config.map_dropout),
    }
    parts = {name: getattr(condition, name) for name, (_, share) in nulls.items() if share}
    there = {name: part for name, part in parts.items() if part is not None}
    text = {name: getattr(null_text, name) for name in ("states", "mask", "pooled", "tokens")}
    return replace(condition, **text, **{name: torch.full_like(part, nulls[name][0]) for name, part in there.items()})


def column(columns: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a column of a batch.

    Raises:
        ValueError: if the cache has no such column, naming those it has.
    """
    if name not in columns:
        raise ValueError(f"the denoiser is told {name}, and the latents hold only {', '.join(sorted(columns))}")
    return columns[name]


def _check_numbers(what: str, numbers: Tensor, limit: int) -> None:
    if bool((numbers >= limit).any()):
        raise ValueError(f"numbers below {limit} are known to the denoiser, and a {what} has {int(numbers.max())}")


def _resized(images: Tensor, size: tuple[int, ...]) -> Tensor:
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, tuple(size), mode="bicubic", antialias=True)
