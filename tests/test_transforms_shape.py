"""Laws of a picture's shape: upright, cropped, padded or in buckets, and at reduced scale what it is at full scale."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.ingest import transforms
from pipeline.ingest.geometry import landscape_buckets, place
from pipeline.ingest.transforms import (
    ImageFormat,
    PictureConfig,
    ResizeFilter,
    ResizeMode,
    bucket_of,
)
from tests.image_bytes import (
    encoded,
    natural,
    png,
)
from tests.rendering import made, pixels, plain, psnr, refused

# --- shape ----------------------------------------------------------------------------------------------------------

STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.rot90(np.fliplr(a), 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(np.fliplr(a), -1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("mode", list(ResizeMode))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_is_upright_by_exif_in_every_mode(orientation, mode):
    config = PictureConfig(image_size=64, image_format=ImageFormat.PNG, resize=mode)
    upright = np.asarray(natural(300, 171, seed=2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    found = made(encoded(lying, "PNG", exif=exif), config)
    expected = made(encoded(Image.fromarray(upright), "PNG"), config)
    assert (found.original_width, found.original_height) == (300, 171)
    assert found.pixels.shape == expected.pixels.shape
    assert psnr(found.pixels, expected.pixels) > 45  # blocks are counted from another corner


@pytest.mark.parametrize("form", ["JPEG", "TIFF", "WEBP", "PNG", "AVIF"])
def test_orientation_of_every_format_is_followed_once(form):
    image = Image.new("RGB", (32, 16), "red")
    image.paste("blue", (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored left is the upright top
    found = made(encoded(image, form, exif=exif))
    assert (found.original_width, found.original_height) == (16, 32)
    assert (found.pixels[0].argmax(-1) == 0).all()
    assert (found.pixels[-1].argmax(-1) == 2).all()


def test_orientation_behind_a_png_s_pixels_is_found():
    exif = Image.Exif()
    exif[0x0112] = 8
    content = encoded(plain("red", (4, 12)), "PNG", exif=exif)
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    moved = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    assert (made(moved).original_width, made(content).original_width) == (12, 12)


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (33, 32), (1000, 1000), (30, 50), (700, 97)])
def test_centre_crop_keeps_the_centre_square(size):
    image = Image.new("RGB", size, "red")
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    image.paste((0, 0, 255), (left, top, left + side, top + side))
    found = pixels(encoded(image, "PNG"), PictureConfig(image_size=16, image_format=ImageFormat.PNG))
    assert found.shape == (16, 16, 3)
    assert (found[2:-2, 2:-2] == (0, 0, 255)).all()


@pytest.mark.parametrize(
    "size, expected", [((96, 64), (48, 32)), ((64, 96), (32, 48)), ((7, 7), (32, 32)), ((1000, 3), (10667, 32))]
)
def test_short_side_keeps_the_shape(size, expected):
    config = PictureConfig(image_size=32, resize=ResizeMode.SHORT_SIDE)
    assert made(encoded(plain("red", size), "PNG"), config).pixels.shape[1::-1] == expected


def test_short_side_refuses_what_no_jpeg_can_hold():
    config = PictureConfig(image_size=256, resize=ResizeMode.SHORT_SIDE)
    assert refused(png(2000, 2), config) == "too_long"
    assert refused(png(2, 2000), config) == "too_long"


def test_pad_shows_the_whole_picture_in_the_middle():
    config = PictureConfig(image_size=16, image_format=ImageFormat.PNG, resize=ResizeMode.PAD, background="#00ff00")
    found = pixels(encoded(plain("red", (64, 32)), "PNG"), config)
    assert (found[4:12] == (255, 0, 0)).all()
    assert (found[:4] == (0, 255, 0)).all()
    assert (found[12:] == (0, 255, 0)).all()


sides = st.integers(2, 5000)
bucketing = st.builds(
    lambda step, times, aspect: PictureConfig(
        image_size=step * times, bucket_step=step, bucket_max_aspect=aspect, resize=ResizeMode.BUCKETS
    ),
    st.sampled_from([8, 32, 64]),
    st.integers(1, 9),
    st.floats(1, 5),
)


@settings(max_examples=60, deadline=None)
@given(sides, sides, bucketing)
def test_bucket_is_the_nearest_in_log_aspect_of_all_that_are_allowed(width, height, config):
    found = bucket_of(width, height, config)
    assert bucket_of(height, width, config) == (found if width == height else found[::-1])
    assert found[0] * found[1] <= config.image_size**2
    assert all(side % config.bucket_step == 0 for side in found)
    assert max(found) <= min(found) * config.bucket_max_aspect
    step, most = config.bucket_step, config.image_size**2
    pairs = [(w, h) for w in range(step, most // step + 1, step) for h in range(step, most // w + 1, step)]
    allowed = [
        (w, h)
        for w, h in pairs
        if max(w, h) <= min(w, h) * config.bucket_max_aspect and max(w, h) * (min(w, h) + step) > most
    ]

    def off(size):
        return abs(math.log(size[0] / size[1] / (width / height)))

    assert off(found) <= min(off(size) for size in allowed) + 1e-6


def test_buckets_fill_the_picture_without_a_border():
    config = PictureConfig(image_size=128, bucket_step=32, resize=ResizeMode.BUCKETS, image_format=ImageFormat.PNG)
    assert landscape_buckets(config)[0] == (128, 128)
    assert (pixels(encoded(plain("red", (300, 200)), "PNG"), config) == (255, 0, 0)).all()
    assert made(encoded(plain("red", (300, 180)), "PNG"), config).pixels.shape == (96, 160, 3)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.sampled_from(list(ResizeMode)), st.integers(1, 8))
def test_placement_lies_within_the_picture_and_keeps_its_aspect(width, height, mode, times):
    placement = place(width, height, PictureConfig(image_size=64 * times, resize=mode))
    left, top, right, bottom = placement.box
    assert 0 <= left < right <= width + 1e-6
    assert 0 <= top < bottom <= height + 1e-6
    assert abs(left - (width - right)) <= 1  # in the middle
    assert abs(top - (height - bottom)) <= 1
    by_x, by_y = placement.size[0] / (right - left), placement.size[1] / (bottom - top)
    assert min(placement.size) <= 1 or by_x == pytest.approx(by_y, rel=1 / min(placement.size))
    assert all(size <= canvas for size, canvas in zip(placement.size, placement.canvas, strict=True))


@pytest.mark.parametrize(
    "mode, fits, lacks",
    [
        (ResizeMode.CENTRE_CROP, (90, 64), (90, 63)),
        (ResizeMode.SHORT_SIDE, (90, 64), (90, 63)),
        (ResizeMode.PAD, (64, 9), (63, 63)),
        (ResizeMode.BUCKETS, (64, 64), (64, 63)),
    ],
)
def test_a_picture_is_not_enlarged_where_that_is_not_wanted(mode, fits, lacks):
    config = PictureConfig(image_size=64, bucket_step=32, resize=mode, upscales=False)
    assert made(png(*fits), config).original_width == fits[0]
    assert refused(png(*lacks), config) == "too_small"
    assert made(png(*lacks), replace(config, upscales=True)).original_width == lacks[0]


# --- scaled decoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize_filter", list(ResizeFilter))
@pytest.mark.parametrize("size", [(257, 300), (511, 640), (512, 600), (577, 866), (1100, 1024)])
def test_picture_of_a_jpeg_at_reduced_scale_is_the_full_decode_resized(size, resize_filter):
    content = encoded(natural(*size, seed=3), "JPEG", quality=90)
    side = min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    full = Image.open(io.BytesIO(content)).convert("RGB")
    full = full.resize((256, 256), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    found = made(content, PictureConfig(resize_filter=resize_filter))
    assert (found.original_width, found.original_height) == size
    assert psnr(found.pixels, np.asarray(full)) > 35


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_picture_averaged_in_strips_is_the_whole_one_resized(mode, monkeypatch):
    monkeypatch.setattr(transforms, "STRIP_PIXELS", 1 << 15)
    image = natural(700, 500, seed=4)
    image = image.quantize(64) if mode == "P" else image.convert(mode)
    direct = image.convert("CMYK" if mode == "CMYK" else "RGB")
    direct = direct.resize((32, 32), Image.Resampling.BICUBIC, box=(100, 0, 600, 500)).convert("RGB")
    content = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert psnr(made(content, PictureConfig(image_size=32)).pixels, np.asarray(direct)) > 42
