"""Laws of the watermark: what it is by other derivations, what its p-value promises, what it survives and costs."""

from __future__ import annotations

import hashlib
import io
import itertools
import math

import numpy as np
import pytest
import scipy.fft
import scipy.stats
from PIL import Image as PILImage

from ldm.watermark import BANDS, LUMA, STEPS, _signs, detect, detect_crop, marked
from tests.image_bytes import encoded, natural

KEY = "the key of these tests"


def photo(height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.array(natural(width, height, seed))


def plain(grey: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), grey, np.uint8)


def drawing(seed: int, side: int = 64) -> np.ndarray:
    """Discs of full colours with black lines on white, as drawings of objects are."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side]
    picture = plain(255, side, side)
    for _ in range(4):
        (row, column), radius = generator.uniform(0.25, 0.75, 2) * side, side * generator.uniform(0.1, 0.3)
        distance = np.hypot(y - row, x - column)
        picture[distance < radius] = generator.choice([0, 60, 200, 255], 3)
        picture[np.abs(distance - radius) < 1] = 0
    return picture


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.square(first.astype(float) - second).mean())


def through_jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    jpeg = encoded(PILImage.fromarray(picture), "JPEG", quality=quality)
    return np.asarray(PILImage.open(io.BytesIO(jpeg)))


def score_by_definition(picture: np.ndarray, signs: np.ndarray) -> float:
    """The docstring's formulas one block at a time, with scipy's transform."""
    rows, columns = picture.shape[0] // 8, picture.shape[1] // 8
    votes: dict[tuple[int, int, int], float] = {}
    for row, column in itertools.product(range(rows), range(columns)):
        block = picture[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] @ LUMA
        spectrum = scipy.fft.dctn(block, norm="ortho")
        for number, (band, step) in enumerate(zip(BANDS, STEPS, strict=True)):
            place = (row % 8, column % 8, number)
            votes[place] = votes.get(place, 0.0) + min(1.0, max(-1.0, spectrum[band] / step))
    return sum(signs[place] * vote for place, vote in votes.items()) / math.sqrt(sum(v * v for v in votes.values()))


@pytest.mark.parametrize("height, width", [(64, 64), (71, 203), (144, 64)])
def test_the_score_equals_its_definition_by_scipys_transform(height: int, width: int) -> None:
    picture = photo(height, width)
    assert detect(picture, KEY).score == pytest.approx(score_by_definition(picture, _signs(KEY)), abs=1e-9)


def test_the_steps_are_those_of_a_jpeg_of_quality_75() -> None:
    table = PILImage.open(io.BytesIO(encoded(PILImage.new("RGB", (8, 8)), "JPEG", quality=75))).quantization[0]
    assert STEPS.tolist() == [table[8 * row + column] for row, column in BANDS]


def test_a_key_has_the_same_signs_for_ever() -> None:
    """What was marked once must be found by every later version."""
    signs = _signs(KEY)
    assert set(signs.ravel()) == {-1.0, 1.0}
    assert "".join("+" if sign > 0 else "-" for sign in signs[0, 0]) == "--+--+---+-+"
    assert hashlib.sha256(np.packbits(signs > 0).tobytes()).hexdigest()[:16] == "6d0a3b2b91d8cfcc"


@pytest.mark.parametrize("is_marked", [False, True])
@pytest.mark.parametrize("picture", [photo(), drawing(1), photo(200, 136, seed=2)], ids=["photo", "drawing", "tiles"])
def test_the_score_of_a_key_that_has_nothing_to_do_with_a_picture_is_standard_normal(
    picture: np.ndarray, is_marked: bool
) -> None:
    if is_marked:
        (picture,) = marked(picture[None], KEY)
    found = [detect(picture, f"another key {number}") for number in range(1500)]
    scores = np.array([one.score for one in found])
    assert scipy.stats.kstest(scores, "norm").pvalue > 0.01
    for level in (0.5, 0.1, 0.01):
        # A bound: at most as often as it says, but for what chance does in 1,500 keys.
        assert np.mean([one.p_value <= level for one in found]) <= level + 3 * math.sqrt(level / 1500)
    assert not any(one.is_marked for one in found)


@pytest.mark.parametrize("num_waves, score, probability", [(1, 1.0, 1 / 2), (2, math.sqrt(2), 1 / 4)])
def test_the_p_value_holds_where_nothing_is_normal(num_waves: int, score: float, probability: float) -> None:
    """One or two signs decide all: the chance is a half or a quarter, and for two no smaller bound is true."""
    picture = plain(128, 64, 64)
    x = np.cos(np.pi * (2 * np.arange(8) + 1) * 2 / 16)
    for number in range(num_waves):
        picture[:8, 8 * number : 8 * number + 8] = np.round(128 + 40 * x)[None, :, None]
    found = [detect(picture, f"key {number}") for number in range(400)]
    best = max(found, key=lambda one: one.score)
    assert best.score == pytest.approx(score, abs=0.01)
    assert best.p_value == pytest.approx(probability, abs=0.01)
    assert np.mean([one.score > score - 0.01 for one in found]) == pytest.approx(probability, abs=0.07)


PICTURES = {
    "photo": photo(seed=3),
    "drawing": drawing(4),
    "white": plain(255),
    "black": plain(0),
    "grey": plain(128),
    "saturated": np.full((64, 64, 3), (255, 0, 0), np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8),
    "large": photo(256, 256, seed=5),
    "odd": photo(93, 71, seed=6),
}


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_a_marked_picture_is_found_as_it_is_and_after_jpeg_and_looks_the_same(name: str) -> None:
    picture = PICTURES[name]
    assert not detect(picture, KEY).is_marked
    (found,) = marked(picture[None], KEY)
    assert found.shape == picture.shape
    for seen in (found, through_jpeg(found, 75), through_jpeg(found, 50)):
        assert detect(seen, KEY).is_marked
    assert not detect(found, KEY + ".").is_marked
    assert psnr(found, picture) > (43.8 if name == "large" else 37.9)


def test_of_many_drawings_and_photos_all_are_found_after_jpeg_75() -> None:
    pictures = np.stack([*map(drawing, range(60)), *(photo(seed=seed) for seed in range(40))])
    found = marked(pictures, KEY)
    assert all(detect(through_jpeg(one, 75), KEY).is_marked for one in found)
    quality = [psnr(one, picture) for one, picture in zip(found, pictures, strict=True)]
    assert np.mean(quality) > 38.5
    assert min(quality) > 37


def test_a_picture_depends_on_itself_and_the_key_alone_and_each_time_on_the_same_bits() -> None:
    pictures = np.stack([photo(seed=seed) for seed in range(3)])
    kept = pictures.copy()
    together = marked(pictures, KEY)
    assert (pictures == kept).all(), "what was given stays as it was"
    for number in (2, 0, 1):
        assert (marked(pictures[number : number + 1], KEY)[0] == together[number]).all()
    assert (marked(pictures[:1], "another")[0] != together[0]).any()
    assert marked(pictures[:0], KEY).shape == (0, 64, 64, 3)


def test_what_is_in_no_whole_block_stays_untouched() -> None:
    picture = photo(70, 77)
    (found,) = marked(picture[None], KEY)
    assert (found[64:] == picture[64:]).all()
    assert (found[:, 72:] == picture[:, 72:]).all()
    assert (found[:64, :72] != picture[:64, :72]).any()


@pytest.mark.parametrize("top, left", [(0, 0), (3, 50), (41, 8), (127, 63)])
def test_a_part_of_a_picture_is_found_wherever_it_was_cut_out(top: int, left: int) -> None:
    (found,) = marked(photo(256, 256, seed=7)[None], KEY)
    part = through_jpeg(found[top : top + 120, left : left + 150], 90)
    assert detect(part, KEY).is_marked == ((top, left) == (0, 0))
    assert detect_crop(part, KEY).is_marked
    assert not detect_crop(part, "another").is_marked


def test_a_crop_at_no_offset_scores_at_least_as_much_and_its_p_value_is_of_the_best_of_all_places() -> None:
    (found,) = marked(photo()[None], KEY)
    straight, anywhere = detect(found, KEY), detect_crop(found, KEY)
    assert anywhere.score == pytest.approx(straight.score, abs=1e-9)
    assert anywhere.p_value == pytest.approx(4096 * straight.p_value, rel=1e-6)
    chances = np.array([detect_crop(drawing(2), f"key {number}").p_value for number in range(60)])
    assert (chances <= 0.1).sum() <= 6 + 3 * math.sqrt(6)


@pytest.mark.parametrize("height, width", [(63, 64), (64, 8), (0, 64)])
def test_pictures_too_small_to_be_marked_are_refused_with_both_sizes(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"needs at least 64 x 64 px, got {height} x {width} px"):
        marked(np.zeros((1, height, width, 3), np.uint8), KEY)


def test_no_key_and_no_block_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a key"):
        marked(photo()[None], "")
    for look in (detect, detect_crop):
        with pytest.raises(ValueError, match="needs a key"):
            look(photo(), "")
        with pytest.raises(ValueError, match=r"7 x 9 px has no whole block|1 px has no whole block"):
            look(plain(0, 7, 9), KEY)


def test_nothing_is_found_in_a_plain_picture() -> None:
    for look in (detect, detect_crop):
        found = look(plain(255), KEY)
        assert (found.score, found.p_value, found.is_marked) == (0.0, 1.0, False)
