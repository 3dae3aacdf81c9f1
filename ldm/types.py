"""The types that cross the floors: what a batch of latents is and what the shape letters mean.

Letters: b batch, c latent channel, m moment channel (2c for KL: mean then log-variance; c for VQ),
h latent row, w latent column, y pixel row, x pixel column, l token, d embedding width, p width of the pooled text,
k channels of a spatial condition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ldm.device import sent

Image = Float[Tensor, "b 3 y x"]
"""Pixels in [-1, 1], channels first, RGB."""
Latent = Float[Tensor, "b c h w"]
"""A scaled latent: what a diffusion network sees (zero mean, unit variance a channel)."""
Moments = Float[Tensor, "b m h w"]
"""Raw, unscaled output of an encoder: mean and log-variance for KL, pre-quantisation latent for VQ."""
TextStates = Float[Tensor, "b l d"]
"""Token embeddings of a frozen text encoder, padded with zeros to one length."""
TextMask = Bool[Tensor, "b l"]
"""True where a token is real; padding is False."""
PooledText = Float[Tensor, "b p"]
"""One vector of a frozen text encoder for each whole caption."""
SizeNumbers = Float[Tensor, "b 6"]
"""Pixels: height and width of the original, top and left of the crop once resized, height and width of the crop."""
SpatialCondition = Float[Tensor, "b k h w"]
"""Channels beside a noisy latent: masked image and mask, small image, semantic map."""
TokenNumbers = Int[Tensor, "b l"]
"""Numbers of tokens in a vocabulary."""
ClassNumbers = Int[Tensor, "b"]
"""Numbers of classes."""
NoiseLevels = Int[Tensor, "b"]
"""Levels of noise over what lies beside a latent, 0 the lowest."""
SemanticMap = Int[Tensor, "b y x"]
"""Number of each pixel's class, -1 for none."""
SampleIndex = Int[Tensor, "b"]
"""Position of each row in the endless sequence of training samples: the clock that seeds every draw."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What a network is told about a batch besides noise and time.

    Attributes:
        states: token embeddings for cross-attention, shape (b, l, d), or None.
        mask: which tokens are real, shape (b, l); None means all are.
        pooled: the whole captions' vectors, shape (b, p), or None where the text encoder has none.
        sizes: height and width of the original, top and left of the crop in the resized picture, height and width of
            the crop, in pixels, shape (b, 6), or None (Podell et al. 2023, section 2.2).
        spatial: what lies beside the noisy latent, channel by channel, shape (b, k, h, w), or None.
        tokens: numbers of a caption's tokens, shape (b, l), or None: a trained transformer makes states of them.
        class_id: each row's class, shape (b,), or None: a trained table makes a token of it.
        layout: numbers of a layout's tokens, shape (b, l), or None: a trained transformer makes states of them.
        semantic_map: class of each pixel, -1 for none, shape (b, y, x), or None: trained channels beside the latent.
        level: how much noise lies over what is beside the latent, shape (b,), or None.
    """

    states: TextStates | None = None
    mask: TextMask | None = None
    pooled: PooledText | None = None
    sizes: SizeNumbers | None = None
    spatial: SpatialCondition | None = None
    tokens: TokenNumbers | None = None
    class_id: ClassNumbers | None = None
    layout: TokenNumbers | None = None
    semantic_map: SemanticMap | None = None
    level: NoiseLevels | None = None

    @classmethod
    def joined(cls, parts: Sequence[Condition]) -> Condition:
        """Return the conditions of several batches, one after the other, which all have the same parts."""
        named = {name: [getattr(part, name) for part in parts] for name in _TENSORS}
        return cls(**{name: torch.cat(found) for name, found in named.items() if found and found[0] is not None})

    @property
    def num_rows(self) -> int | None:
        """Rows of the batch, or None where nothing is told."""
        return next((len(part) for name in _TENSORS if (part := getattr(self, name)) is not None), None)

    def to(self, device: torch.device, dtype: torch.dtype) -> Condition:
        """Return the same condition on `device`, its floats as `dtype` but for sizes: bfloat16 has no 1023."""
        moved = self._mapped(lambda tensor: _as(dtype, sent(tensor, device)))
        return moved if self.sizes is None else replace(moved, sizes=sent(self.sizes, device))

    def rows(self, start: int, stop: int) -> Condition:
        """Return rows [start, stop) of the batch."""
        return self._mapped(lambda tensor: tensor[start:stop])

    def rolled(self, rows: int) -> Condition:
        """Return the batch with every row told what belongs to the row `rows` places before it, round the end."""
        return self._mapped(lambda tensor: tensor.roll(rows, 0))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Condition:
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return Condition(**{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


_TENSORS = tuple(part.name for part in fields(Condition))


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentBatch:
    """Rows of a latent cache, in the order of training.

    Attributes:
        keys: the rows' keys, length b.
        samples: the rows' positions in the endless training sequence, shape (b,), int64.
        moments: raw moments, shape (b, m, h, w).
        condition: the caption chosen for each row, already dropped to the null one where the draw said so.
        columns: what else the cache holds of each row, by name, each of shape (b, ...).
    """

    keys: tuple[str, ...]
    samples: SampleIndex
    moments: Moments
    condition: Condition
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> LatentBatch:
        """Return rows [start, stop) of the batch."""
        return replace(
            self,
            keys=self.keys[start:stop],
            samples=self.samples[start:stop],
            moments=self.moments[start:stop],
            condition=self.condition.rows(start, stop),
            columns={name: column[start:stop] for name, column in self.columns.items()},
        )
