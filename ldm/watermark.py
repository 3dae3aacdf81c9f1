"""An invisible watermark that a key puts into pictures and the same key finds again, without the originals.

    J_b = D Y_b D'                          8 x 8 block b of luminance Y under the DCT of JPEG, on the grid of JPEG
    u_bf = J_bf / q_f                       twelve low frequencies f, in steps of JPEG's luminance table at quality 75
    w_jf = sum over b of clip(u_bf, -1, 1)  of the blocks whose place is j among the 8 x 8 of a tile of 64 px
    z = sum s_jf w_jf / sqrt(sum w_jf^2)    s the signs of the key, the first 768 bits of SHAKE-256

Under a key that has nothing to do with the picture, z is a sum of random signs with fixed weights: its mean is 0, its
variance 1, it is about normal, and for every picture

    P(z >= x) <= 3.18 P(N(0, 1) >= x)       (Bentkus and Dzindzalieta 2015, theorem 1.1)

which is the p-value; no model of pictures goes into it. It is spread spectrum (Cox et al. 1997) that is embedded with
the picture in view (Miller et al. 2004): what agrees with its sign already costs nothing, the rest is moved to
u = 1.1 s, which JPEG rounds to s, the cheapest and least visible first, until the budget is spent.

Order: coefficients by price → as many as the budget allows → moved, and again what clipping at 0 and 255 took of it →
rounded. Who compares many pictures of one key can find its signs and wash them out; turning, mirroring and another size
lose them.

Letters: n number of pictures, y pixel row, x pixel column, v block row, h block column, f frequency, j place in a tile,
k number of coefficients.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

Pixels = UInt8[np.ndarray, "n y x 3"]
Picture = UInt8[np.ndarray, "y x 3"]
Luma = Float[np.ndarray, "y x"]
Spectrum = Float[np.ndarray, "v h f"]
Chosen = Bool[np.ndarray, "v h f"]
Tile = Float[np.ndarray, "8 8 f"]

BLOCK = 8
TILE = 8
"""Blocks after which the signs come again, in rows and columns: 64 px hold them all."""
LEAST_SIDE = 64
"""Pixels of a side that can be marked: too few coefficients of less say anything after JPEG."""
BANDS = tuple((row, total - row) for total in (2, 3, 4) for row in range(total + 1))
"""Row and column of each frequency: low enough to last through JPEG and resizing; the lowest would show."""
STEPS = np.array([5, 6, 7, 8, 7, 7, 7, 12, 10, 8, 9, 9], np.float64)
"""Of these frequencies, in JPEG's table for luminance (ITU-T T.81, K.1) at quality 75 of the IJG's scale."""
GOAL = 1.1
"""Steps that a coefficient is moved to: above 1/2 JPEG keeps it at quality 75, above 1 at quality 50."""
LUMA = np.array([0.299, 0.587, 0.114])
PSNR_USUAL, PSNR_FLOOR = 44.0, 38.0
"""Decibels: what every picture is changed by, and by how much more where that would not last through JPEG."""
SCORE_WANTED, SCORE_NEEDED = 12.0, 7.0
"""Score after JPEG at quality 75 that more than the usual is spent for, and that even the floor gives way to."""
LIVELY, LIVELY_WHERE_HARD = 8.0, 64.0
"""Standard deviation of a block, in grey levels, that bears twice the price; the latter where the budget is short."""
NEARLY_FULL = 3
"""Grey levels from black or white at which half of what is added is lost."""
ROUNDS = 8
"""How often what clipping took is added again; in white, each halves what is missing."""
GIVES_WAY = 0.9
"""By what the number of moved coefficients shrinks or grows where its forecast was wrong."""
MARKED_BELOW = 1e-6
"""p-value of a picture that counts as marked."""
TAIL_FACTOR = 1 / (2 * math.erfc(1.0))
"""1 / (4 P(N(0, 1) >= sqrt 2)), which is 3.178: the least that the bound is true with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """What was found of a key in a picture.

    Attributes:
        score: z, about standard normal where the key has nothing to do with the picture.
        p_value: what the probability that such a key scores as much is at most.
    """

    score: float
    p_value: float

    @property
    def is_marked(self) -> bool:
        """Say whether the picture carries the key's watermark."""
        return self.p_value < MARKED_BELOW


def marked(pixels: Pixels, key: str) -> Pixels:
    """Return pictures that carry a key's watermark; each depends on itself and the key alone.

    The PSNR to what was given is about 44 dB, or down to 38 where a picture says too little after JPEG otherwise; the
    floor itself gives way only where the mark would not be found again.

    Raises:
        ValueError: for an empty key, or pictures that are too small.
    """
    check_size(pixels.shape[1], pixels.shape[2])
    signs = _signs(key)
    found = np.empty_like(pixels)
    for number, picture in enumerate(pixels):
        found[number] = _marked_one(picture, signs)
    return found


def detect(pixels: Picture, key: str) -> Detection:
    """Return what is found of a key in a picture that begins where the marked one did.

    Raises:
        ValueError: for an empty key, or a picture without a whole block.
    """
    signs = _signs(key)
    score = _score(_folded(_spectrum(_luma(pixels))), signs)
    return Detection(score=score, p_value=_tail(score))


def detect_crop(pixels: Picture, key: str) -> Detection:
    """Return what is found of a key in a part of a marked picture, at the best of all 4,096 places it may come from.

    Its p-value is of the best of so many, so that it takes a higher score than `detect`.

    Raises:
        ValueError: for an empty key, or a picture without a whole block wherever it comes from.
    """
    spectrum_of_signs = np.fft.fft2(_signs(key), axes=(0, 1)).conj()
    luma, best = _luma(pixels), -math.inf
    for row in range(BLOCK):
        for column in range(BLOCK):
            votes = _folded(_spectrum(luma[row:, column:]))
            norm = math.sqrt(float(np.square(votes).sum()))
            # The sums with the signs at all places of the tile at once.
            sums = np.fft.ifft2(np.fft.fft2(votes, axes=(0, 1)) * spectrum_of_signs, axes=(0, 1)).real.sum(2)
            best = max(best, float(sums.max()) / norm if norm else 0.0)
    return Detection(score=best, p_value=min(1.0, (BLOCK * TILE) ** 2 * _tail(best)))


def check_size(rows: int, columns: int) -> None:
    """Refuse pictures that are too small to be marked.

    Raises:
        ValueError: with both sizes.
    """
    if min(rows, columns) < LEAST_SIDE:
        raise ValueError(f"a watermark needs at least {LEAST_SIDE} x {LEAST_SIDE} px, got {rows} x {columns} px")


def _waves() -> Float[np.ndarray, "f 8 8"]:
    """Return the frequencies' waves in a block, orthonormal: products of cos(pi k (2 x + 1) / 16), scaled."""
    places = np.arange(BLOCK)
    basis = np.cos(np.pi * np.outer(places, 2 * places + 1) / (2 * BLOCK))
    basis *= np.sqrt(np.where(places == 0, 1, 2) / BLOCK)[:, None]
    return np.stack([np.outer(basis[row], basis[column]) for row, column in BANDS])


WAVES = _waves()


def _signs(key: str) -> Tile:
    if not key:
        raise ValueError("a watermark needs a key, and the one that came is empty")
    count = TILE * TILE * len(BANDS)
    # A hash and no generator of random numbers, whose stream another version may change.
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(key.encode()).digest(count // 8), np.uint8))
    return bits.reshape(TILE, TILE, len(BANDS)) * 2.0 - 1.0


def _luma(pixels: UInt8[np.ndarray, "y x 3"] | Float[np.ndarray, "y x 3"]) -> Luma:
    return pixels @ LUMA


def _blocks(plane: Luma) -> Float[np.ndarray, "v 8 h 8"]:
    """Return the whole blocks of a plane; what is left at its right and lower edge is in none."""
    rows, columns = (side // BLOCK for side in plane.shape)
    if not rows or not columns:
        raise ValueError(f"a picture of {plane.shape[0]} x {plane.shape[1]} px has no whole block of 8 x 8")
    return plane[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK)


def _spectrum(luma: Luma) -> Spectrum:
    # Rounded, for in a plain picture what the processor leaves of zeros would have a score.
    return np.round(np.einsum("vyhx,fyx->vhf", _blocks(luma), WAVES, optimize=True) / STEPS, 9)


def _plane(spectrum: Spectrum, shape: tuple[int, int]) -> Luma:
    """Return the luminance of a spectrum that is zero elsewhere."""
    plane = np.zeros(shape)
    inside = np.einsum("vhf,fyx->vyhx", spectrum * STEPS, WAVES, optimize=True)
    height, width = spectrum.shape[0] * BLOCK, spectrum.shape[1] * BLOCK
    plane[:height, :width] = inside.reshape(height, width)
    return plane


def _folded(spectrum: Spectrum) -> Tile:
    """Return w: what the blocks at each place of a tile say together, none of them more than one step."""
    votes = np.clip(spectrum, -1, 1)
    padded = np.pad(votes, ((0, -votes.shape[0] % TILE), (0, -votes.shape[1] % TILE), (0, 0)))
    return padded.reshape(padded.shape[0] // TILE, TILE, -1, TILE, len(BANDS)).sum((0, 2))


def _score(votes: Tile, signs: Tile) -> float:
    norm = math.sqrt(float(np.square(votes).sum()))
    return float((votes * signs).sum()) / norm if norm else 0.0


def _tail(score: float) -> float:
    return min(1.0, TAIL_FACTOR * 0.5 * math.erfc(score / math.sqrt(2)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What marking a picture may change, and in which order.

    Attributes:
        picture: what is marked.
        spectrum: its own.
        signs: of the key, for one tile.
        wanted: the signs at every block.
        order: numbers of the coefficients, those first that change little and say much.
        spent: squared error of the first k of them together.
    """

    picture: Picture
    spectrum: Spectrum
    signs: Tile
    wanted: Spectrum
    order: Int[np.ndarray, "k"]
    spent: Float[np.ndarray, "k"]

    def chosen(self, count: int) -> Chosen:
        """Return which are moved if so many are."""
        found = np.zeros(self.spectrum.size, bool)
        found[self.order[:count]] = True
        return found.reshape(self.spectrum.shape)

    def count_within(self, psnr_db: float) -> int:
        """Return how many a picture can bear."""
        return int(np.searchsorted(self.spent, _mean_error(psnr_db) * self.picture[..., 0].size))

    def score_after_jpeg(self, count: int) -> float:
        """Return the forecast of the score at quality 75, where JPEG rounds to whole steps."""
        moved = np.where(self.chosen(count), GOAL * self.wanted, self.spectrum)
        return _score(_folded(np.round(moved)), self.signs)

    def moved(self, count: int) -> Picture:
        """Return the picture with so many coefficients at their goal."""
        signs = self.wanted * self.chosen(count)
        canvas = self.picture.astype(np.float64)
        for _ in range(ROUNDS):
            missing = np.maximum(GOAL - _spectrum(_luma(canvas)) * signs, 0) * signs
            canvas = np.clip(canvas + _plane(missing, canvas.shape[:2])[..., None], 0, 255)
        return np.round(canvas).astype(np.uint8)


def _planned(picture: Picture, signs: Tile, lively: float) -> _Plan:
    luma = _luma(picture)
    spectrum = _spectrum(luma)
    rows, columns = spectrum.shape[:2]
    wanted = np.tile(signs, (-(-rows // TILE), -(-columns // TILE), 1))[:rows, :columns]
    agreeing = spectrum * wanted
    is_full = ((picture <= NEARLY_FULL) | (picture >= 255 - NEARLY_FULL)) @ LUMA
    error = np.square(np.maximum(GOAL - agreeing, 0) * STEPS) * (1 + _blocks(is_full).mean((1, 3)))[..., None]
    gain = 1 - np.clip(agreeing, -1, 1)
    hidden = 1 + _blocks(luma).std((1, 3)) / lively
    price = error / np.maximum(gain, 1e-9) / hidden[..., None]  # what has nothing to gain comes last
    # In a plain picture all prices are one: multiples of the golden ratio take them from everywhere.
    spread = np.arange(price.size, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    order = np.lexsort((spread, price.ravel()))
    return _Plan(
        picture=picture,
        spectrum=spectrum,
        signs=signs,
        wanted=wanted,
        order=order,
        spent=np.cumsum(error.ravel()[order]),
    )


def _marked_one(picture: Picture, signs: Tile) -> Picture:
    plan = _planned(picture, signs, LIVELY)
    count = plan.count_within(PSNR_USUAL)
    if plan.score_after_jpeg(count) < SCORE_WANTED:
        plan = _planned(picture, signs, LIVELY_WHERE_HARD)
        count = plan.count_within(PSNR_USUAL)
    most = plan.count_within(PSNR_FLOOR)
    while count < most and plan.score_after_jpeg(count) < SCORE_WANTED:
        count = min(most, _more(count))
    found = plan.moved(count)
    while count and np.square(found.astype(float) - picture).mean() > _mean_error(PSNR_FLOOR):
        count = int(count * GIVES_WAY)
        found = plan.moved(count)
    while count < len(plan.order) and _score(_folded(np.round(_spectrum(_luma(found)))), signs) < SCORE_NEEDED:
        count = min(len(plan.order), _more(count))
        found = plan.moved(count)
    return found


def _more(count: int) -> int:
    return int(count / GIVES_WAY) + 1


def _mean_error(psnr_db: float) -> float:
    return 255**2 / 10 ** (psnr_db / 10)
