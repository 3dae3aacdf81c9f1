"""Laws of fingerprints: equal content gives equal digests, alike pictures nearly equal hashes, others far ones."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from statistics import mean

import numpy as np
import pytest
import scipy.fft
from PIL import Image

from pipeline.ingest.fingerprints import (
    HASH_BITS,
    hamming,
    payload_sha256,
    perceptual_hash,
    perceptual_hashes,
    pixel_sha256,
)

NUM_PICTURES = 200
ALIKE_BITS = 4


def photograph(seed: int, side: int = 128) -> np.ndarray:
    """A picture with the statistics of a photograph: amplitudes fall as 1/f (Field 1987), and a few hard edges."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(draw.standard_normal((3, side, side))) / frequency
    tones = np.fft.ifft2(spectrum).real
    tones = 0.3 * tones + tones[0]
    for left, top, right, bottom in draw.integers(0, side, (4, 4)):
        tones[:, min(top, bottom) : max(top, bottom), min(left, right) : max(left, right)] += (
            tones.std() * draw.normal()
        )
    tones = (tones - tones.mean()) / tones.std() * 50 + 128
    return np.clip(tones, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream).convert("RGB"))


def resized(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    return [photograph(seed) for seed in range(NUM_PICTURES)]


# --- digests --------------------------------------------------------------------------------------------------------


def test_a_payload_has_the_sha256_of_its_bytes():
    assert payload_sha256(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_pixels_have_one_digest_however_they_lie_in_memory_and_another_for_another_shape():
    pixels = photograph(1)
    assert pixel_sha256(pixels) == pixel_sha256(np.asfortranarray(pixels)) == pixel_sha256(pixels[::-1][::-1])
    assert pixel_sha256(pixels) == hashlib.sha256(b"(128, 128, 3)" + pixels.tobytes()).hexdigest()
    others = [pixels.reshape(64, 256, 3), pixels.transpose(1, 0, 2), pixels ^ np.uint8(1)]
    assert len({pixel_sha256(each) for each in [pixels, *others]}) == 4


# --- the perceptual hash --------------------------------------------------------------------------------------------


def test_the_hash_is_zauners_formula_in_floating_point():
    """An independent derivation: scipy's DCT of 32 x 32 block means, coefficients 1..8 by 1..8, above their median."""
    for seed in range(20):
        pixels = photograph(seed)
        luminance = pixels @ np.array([0.299, 0.587, 0.114])
        means = luminance.reshape(32, 4, 32, 4).mean(axis=(1, 3))
        coefficients = scipy.fft.dctn(means, type=2)[1:9, 1:9].ravel()
        expected = "".join("01"[int(bit)] for bit in coefficients > np.median(coefficients))
        assert hamming(perceptual_hash(pixels), int(expected, 2)) <= 1, "a coefficient may lie at the median"


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "quality 50": lambda pixels: jpeg(pixels, 50),
    "quality 75": lambda pixels: jpeg(pixels, 75),
    "quality 95": lambda pixels: jpeg(pixels, 95),
    "half": lambda pixels: resized(pixels, 64, 64),
    "double": lambda pixels: resized(pixels, 256, 256),
    "odd size": lambda pixels: resized(pixels, 101, 101),
    "squeezed": lambda pixels: resized(pixels, 128, 96),
    "half, then quality 75": lambda pixels: jpeg(resized(pixels, 64, 64), 75),
    "brighter": lambda pixels: (pixels * 0.8 + 20).astype(np.uint8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_re_encoding_and_resizing_change_few_bits(photographs, change):
    apart = [hamming(perceptual_hash(each), perceptual_hash(CHANGES[change](each))) for each in photographs]
    assert sum(bits <= ALIKE_BITS for bits in apart) >= 0.99 * NUM_PICTURES, sorted(apart)[-5:]


def test_different_pictures_differ_in_about_half_of_the_bits(photographs):
    hashes = [perceptual_hash(each) for each in photographs]
    apart = [hamming(one, other) for one, other in combinations(hashes, 2)]
    assert min(apart) > 2 * ALIKE_BITS
    assert mean(apart) == pytest.approx(HASH_BITS / 2, abs=1)


def test_half_of_the_bits_are_set(photographs):
    assert {perceptual_hash(each).bit_count() for each in photographs} == {HASH_BITS // 2}


def test_a_batch_has_the_hashes_of_its_pictures(photographs):
    batch = np.stack([*photographs[:20], np.zeros_like(photographs[0])])
    assert perceptual_hashes(batch) == [perceptual_hash(each) for each in batch]
    assert perceptual_hashes(batch[:0]) == []


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (7, 3), (33, 31), (500, 1), (2000, 1500)])
def test_a_picture_of_any_size_has_a_hash_or_none(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    found = perceptual_hash(pixels)
    assert found is None or 0 <= found < 2**HASH_BITS


RAMP = np.linspace(0, 255, 128).astype(np.uint8)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.full((50, 70, 3), 255, np.uint8),
        np.broadcast_to(np.array([200, 30, 90], np.uint8), (64, 64, 3)),
        np.repeat(RAMP[:, None, None], 3, axis=2).repeat(128, axis=1),
        np.repeat(RAMP[None, :, None], 3, axis=2).repeat(128, axis=0),
        jpeg(np.full((128, 128, 3), 77, np.uint8), 50),
        np.full((128, 128, 3), 128, np.uint8) + np.random.default_rng(0).integers(0, 2, (128, 128, 3), np.uint8),
    ],
    ids=["black", "white", "red", "down", "across", "grey jpeg", "grey with noise"],
)
def test_a_picture_that_shows_next_to_nothing_has_no_hash(pixels):
    assert perceptual_hash(pixels) is None


def test_the_hash_is_the_same_in_another_process_with_other_threads():
    code = "from tests.test_fingerprints import perceptual_hash, photograph; print(perceptual_hash(photograph(5)))"
    environment = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "Prescott"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) == perceptual_hash(photograph(5))
