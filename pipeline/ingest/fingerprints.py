"""What a picture is known by: digests of its bytes and of its pixels, and 64 bits that alike pictures share.

The perceptual hash (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2):
luminance → 32 x 32 means → DCT-II → the coefficients (1..8, 1..8) → one bit each: above their median or not.
Re-encoding, resizing and small changes of tone leave nearly all bits as they are; two different pictures differ in
about half. It is computed in whole numbers (held exactly by float64), so every machine finds the same bits.

Shapes: b picture of a batch, y row, x column, 3 red, green and blue.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

HASH_BITS = 64
LOW_INFORMATION = 32.0
"""Median size of a coefficient below which a picture has no hash: a wave of an eighth of a grey level.

Flat colours, plain gradients and empty skies lie below. Their bits would be rounding noise, which re-encoding changes
at will (of 266 crops of photographs, all that lost more than 8 bits at quality 50 lie below), so such pictures are
compared by bytes and by pixels alone.
"""

_SIDE = 32
_FREQUENCIES = slice(1, 9)
_LUMA = np.array([299.0, 587.0, 114.0])
"""Thousandths of red, green and blue in luminance (ITU-R BT.601)."""
_MEAN_STEPS = 64
"""Steps of one grey level that a mean is rounded to."""
_COSINE_STEPS = 2**14
"""Steps of one that a cosine is rounded to; with the means' 255 * 64 all sums stay below 2^53."""
_WAVES = np.rint(_COSINE_STEPS * np.cos(np.pi * np.outer(np.arange(1, 9), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE)))
_COEFFICIENT_STEPS = _MEAN_STEPS * _COSINE_STEPS**2
_BIT_VALUES = np.uint64(1) << np.arange(HASH_BITS - 1, -1, -1, dtype=np.uint64)


def payload_sha256(content: bytes) -> str:
    """Return the digest of a picture's bytes as they came."""
    return hashlib.sha256(content).hexdigest()


def pixel_sha256(pixels: NDArray[np.uint8]) -> str:
    """Return the digest of a picture's shape and pixels: equal however the picture was encoded without loss."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def perceptual_hash(pixels: NDArray[np.uint8]) -> int | None:
    """Return the 64 bits of a picture (y, x, 3), or None where it shows too little to tell it from others."""
    return perceptual_hashes(pixels[None])[0]


def perceptual_hashes(batch: NDArray[np.uint8]) -> list[int | None]:
    """Return the hash of each picture of a batch (b, y, x, 3), as `perceptual_hash` has it."""
    coefficients = (_WAVES @ _means(batch) @ _WAVES.T).reshape(len(batch), HASH_BITS)
    bits = coefficients > np.median(coefficients, axis=1, keepdims=True)
    values = (bits * _BIT_VALUES).sum(axis=1, dtype=np.uint64)
    says_enough = np.median(np.abs(coefficients), axis=1) >= LOW_INFORMATION * _COEFFICIENT_STEPS
    return [int(value) if enough else None for value, enough in zip(values, says_enough, strict=True)]


def hamming(one: int, other: int) -> int:
    """Return how many bits two hashes differ in."""
    return (one ^ other).bit_count()


def _means(batch: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the mean luminance of 32 x 32 equal cells of each picture, in whole steps: b 32 32."""
    count, height, width, _ = batch.shape
    if height % _SIDE == 0 and width % _SIDE == 0:
        # Whole cells need no matrices, and no threads that a matrix product would start; the sums are the same.
        rows = batch.reshape(count, _SIDE, height // _SIDE, width * 3).sum(axis=2, dtype=np.uint32)
        # A quarter of the time of a sum over an axis so short.
        cells = np.einsum("brcwk->brck", rows.reshape(count, _SIDE, _SIDE, width // _SIDE, 3))
        sums = cells @ _LUMA * _SIDE**2
    else:
        sums = _cover(height) @ (batch @ _LUMA) @ _cover(width).T
    return np.floor_divide(sums * _MEAN_STEPS, height * width * _LUMA.sum())


@lru_cache(maxsize=256)
def _cover(num_pixels: int) -> NDArray[np.float64]:
    """Return how much of each pixel lies in each of 32 equal cells, in 32nds: 32 num_pixels; rows sum to num_pixels."""
    cell = np.arange(_SIDE)[:, None] * num_pixels
    pixel = np.arange(num_pixels)[None] * _SIDE
    overlap = np.minimum(cell + num_pixels, pixel + _SIDE) - np.maximum(cell, pixel)
    return np.clip(overlap, 0, None).astype(np.float64)
