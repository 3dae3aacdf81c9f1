"""Laws of pixels: what colours a picture has, and what bytes are kept, whatever form it came in."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from pipeline.ingest.transforms import (
    ImageFormat,
    PictureConfig,
    ResizeFilter,
    ResizeMode,
    measure,
    thumbnail,
)
from tests.bad_images import ARITHMETIC
from tests.image_bytes import (
    ADOBE_RGB,
    DISPLAY_P3,
    cmyk_profile,
    encoded,
    grey_profile,
    natural,
    png,
    rgb_profile,
    with_segment,
    ycck,
)
from tests.rendering import PHOTO, SMALL, made, pixels, plain, psnr, refused

# --- colours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 200], ids=["as it is", "shrunk in strips"])
@pytest.mark.parametrize(
    "colour, mode, expected",
    [
        ((10, 20, 30), "RGB", (10, 20, 30)),
        (77, "L", (77, 77, 77)),
        (1, "1", (255, 255, 255)),
        ((90, 255), "LA", (90, 90, 90)),
        ((90, 0), "LA", (0, 0, 255)),
        ((255, 0, 0, 0), "RGBA", (0, 0, 255)),
        ((255, 0, 0, 255), "RGBA", (255, 0, 0)),
        ((200, 100, 0, 51), "RGBA", (40, 20, 204)),  # a fifth of the colour, four fifths of blue
    ],
)
def test_picture_of_any_png_mode_is_rgb_over_the_background(colour, mode, expected, side):
    content = encoded(plain(colour, (side, side), mode), "PNG")
    assert (pixels(content, replace(SMALL, background="#0000ff")) == expected).all()


@pytest.mark.parametrize("side", [8, 200])
def test_picture_of_a_palette_has_its_colours_and_its_holes(side):
    image = plain((10, 20, 30), (side, side)).quantize(4)
    assert (pixels(encoded(image, "PNG")) == (10, 20, 30)).all()
    hole = encoded(image, "PNG", transparency=image.getpixel((0, 0)))
    assert (pixels(hole, replace(SMALL, background="#00ff00")) == (0, 255, 0)).all()


def test_picture_of_hidden_colours_does_not_let_them_shine_through():
    """A colour under full transparency must not colour the rim of what is seen."""
    image = np.zeros((64, 64, 4), np.uint8)
    image[:, :, 1] = 255  # transparent green
    image[:, 32:] = (255, 0, 0, 255)
    found = pixels(encoded(Image.fromarray(image), "PNG"))
    assert (found[..., 1] == found[..., 2]).all()  # red over white: as much green as blue


@pytest.mark.parametrize("repeats", [4, 64])
def test_picture_of_sixteen_bits_keeps_the_upper_eight(repeats):
    levels = np.array([[0, 257 * 128], [257 * 200, 65535]], np.uint16).repeat(repeats, 0).repeat(repeats, 1)
    found = pixels(encoded(Image.fromarray(levels), "PNG"))
    assert found[[0, 0, -1, -1], [0, -1, 0, -1], 0].tolist() == [0, 128, 200, 255]
    dark = encoded(Image.fromarray(np.full((8, 8), 255, np.uint16)), "PNG")
    assert pixels(dark).max() == 0  # nearly black, not white


def test_picture_of_sixteen_bit_colour_keeps_the_upper_eight():
    row = b"\0" + b"\x80\xff\x20\x00\xff\xff" * 8
    assert (pixels(png(8, 8, depth=16, rows=row * 8)) == (128, 32, 255)).all()


@pytest.mark.parametrize("encode_cmyk", [lambda image: encoded(image, "JPEG", quality=100), ycck], ids=["cmyk", "ycck"])
@pytest.mark.parametrize(
    "inks, expected",
    [
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0,) * 4, (255,) * 3),
    ],
)
def test_picture_of_inks_is_their_colour_on_paper(encode_cmyk, inks, expected):
    assert np.abs(pixels(encode_cmyk(plain(inks, mode="CMYK"))) - expected).max() <= 3


# --- profiles -------------------------------------------------------------------------------------------------------


def in_srgb(colour, primaries, gamma) -> np.ndarray:
    """IEC 61966-2-1 after the profile's matrix, both under D50; out of gamut is cut off."""
    srgb = np.array(((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)))
    light = (np.array(colour) / 255) ** gamma @ np.array(primaries) @ np.linalg.inv(srgb)
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("primaries", [ADOBE_RGB, DISPLAY_P3], ids=["adobe", "p3"])
@pytest.mark.parametrize("colour", [(200, 120, 60), (30, 160, 90), (0, 255, 0), (128, 128, 128)])
def test_picture_with_a_wide_profile_has_the_colour_that_was_meant(primaries, colour):
    content = encoded(plain(colour), "PNG", icc_profile=rgb_profile(primaries, 2.2))
    assert np.abs(pixels(content) - in_srgb(colour, primaries, 563 / 256)).max() <= 2


def test_picture_with_a_wide_profile_and_transparency_lies_over_a_background_in_srgb():
    profile = rgb_profile(ADOBE_RGB, 2.2)
    content = encoded(plain((30, 160, 90, 128), mode="RGBA"), "PNG", icc_profile=profile)
    expected = in_srgb((30, 160, 90), ADOBE_RGB, 563 / 256) * 128 / 255 + np.array((255, 0, 0)) * 127 / 255
    assert np.abs(pixels(content, replace(SMALL, background="#ff0000")) - expected).max() <= 3


@pytest.mark.parametrize("image", [plain(128, mode="L"), plain((128, 255), mode="LA")], ids=["grey", "grey and alpha"])
def test_picture_with_a_grey_profile_is_as_light_as_was_meant(image):
    found = pixels(encoded(image, "PNG", icc_profile=grey_profile(1.0)))
    assert (
        np.abs(
            found
            - in_srgb(
                (128,) * 3, ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)), 1
            )
        ).max()
        <= 2
    )


def test_picture_with_a_press_profile_shows_what_the_press_prints():
    profile = cmyk_profile(lightness_of_cyan=50)
    content = encoded(plain((255, 0, 0, 0), mode="CMYK"), "JPEG", quality=100, icc_profile=profile)
    assert np.abs(pixels(content) - 119).max() <= 3  # L* 50 is sRGB 119; without the profile it would be cyan


@pytest.mark.parametrize(
    "profile",
    [b"no profile", rgb_profile(ADOBE_RGB, 2.2)[:200], cmyk_profile(50), grey_profile(1.0), bytes(5_000_000)],
    ids=["noise", "cut", "of inks", "of greys", "endless"],
)
def test_picture_with_a_profile_that_does_not_fit_is_as_without(profile):
    content = with_profile = encoded(plain((200, 120, 60)), "TIFF", icc_profile=profile)
    assert content == with_profile
    assert (pixels(content) == (200, 120, 60)).all()


# --- bytes ----------------------------------------------------------------------------------------------------------


def configured(image_format: ImageFormat, **fields) -> PictureConfig:
    return PictureConfig(image_size=64, image_format=image_format, **fields)


@pytest.mark.parametrize("mode", list(ResizeMode))
@pytest.mark.parametrize("image_format", list(ImageFormat))
def test_a_finished_picture_is_kept_as_it_is(image_format, mode):
    config = configured(image_format, resize=mode)
    first = made(encoded(PHOTO, "PNG"), config)
    assert not first.is_untouched
    again = made(first.content, config)
    assert again.is_untouched
    assert again.content == first.content
    assert again.suffix == image_format.value
    assert (again.pixels == np.asarray(Image.open(io.BytesIO(first.content)).convert("RGB"))).all()
    assert not made(first.content, replace(config, keeps_bytes=False)).is_untouched


SQUARE = natural(64, 64, seed=5)
WIDE = rgb_profile(ADOBE_RGB, 2.2)
TURNED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
CHANGES = {
    "tail": (ImageFormat.JPG, encoded(SQUARE, "JPEG") + b"PK"),
    "png tail": (ImageFormat.PNG, encoded(SQUARE, "PNG") + b"x"),
    "webp tail": (ImageFormat.WEBP, encoded(SQUARE, "WEBP") + b"x"),
    "other format": (ImageFormat.JPG, encoded(SQUARE, "PNG")),
    "turned": (ImageFormat.JPG, with_segment(encoded(SQUARE, "JPEG"), 0xE1, TURNED)),
    "wide profile": (ImageFormat.JPG, encoded(SQUARE, "JPEG", icc_profile=WIDE)),
    "grey": (ImageFormat.JPG, encoded(SQUARE.convert("L"), "JPEG")),
    "inks": (ImageFormat.JPG, encoded(SQUARE.convert("CMYK"), "JPEG")),
    "other coding": (ImageFormat.JPG, ARITHMETIC),
    "alpha": (ImageFormat.PNG, encoded(SQUARE.convert("RGBA"), "PNG")),
    "palette": (ImageFormat.PNG, encoded(SQUARE.quantize(8), "PNG")),
    "sixteen bits": (ImageFormat.PNG, png(64, 64, depth=16)),
    "animated": (ImageFormat.WEBP, encoded(SQUARE, "WEBP", save_all=True, append_images=[PHOTO.resize((64, 64))])),
    "larger": (ImageFormat.JPG, encoded(SQUARE.resize((65, 64)), "JPEG")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_picture_that_lacks_anything_is_made_anew_and_then_kept(name):
    image_format, content = CHANGES[name]
    config = PictureConfig(image_size=64, image_format=image_format)
    picture = made(content, config)
    assert not picture.is_untouched
    assert made(picture.content, config).is_untouched


def test_a_picture_with_an_srgb_profile_is_kept():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = encoded(SQUARE, "JPEG", icc_profile=profile)
    assert made(content, configured(ImageFormat.JPG)).content == content


@pytest.mark.parametrize("image_format", list(ImageFormat))
def test_content_is_the_encoded_pixels(image_format):
    picture = made(encoded(PHOTO, "PNG"), configured(image_format))
    again = np.asarray(Image.open(io.BytesIO(picture.content)).convert("RGB"))
    assert psnr(again, picture.pixels) > (90 if image_format is ImageFormat.PNG else 30)


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (20, 10)])
def test_thumbnail_is_small_and_never_enlarged(size):
    small = Image.open(io.BytesIO(thumbnail(np.asarray(natural(*size)))))
    assert max(small.size) == min(96, max(size))
    assert small.format == "JPEG"


# --- drawings -------------------------------------------------------------------------------------------------------


def svg(inside: str, attributes: str = 'viewBox="0 0 2 2"') -> bytes:
    return f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>{inside}</svg>'.encode()


def test_drawing_lies_with_its_transparency_over_the_background():
    found = pixels(svg('<rect width="1" height="2" fill="#ff0000"/>'), replace(SMALL, background="#00ff00"))
    assert (found[:, :4] == (255, 0, 0)).all()
    assert (found[:, 4:] == (0, 255, 0)).all()


@pytest.mark.parametrize(
    "attributes",
    [
        'viewBox="0 0 40 20"',
        'width="40" height="20"',
        'width="4in" height="50.8mm"',
        'width="100%" viewBox="0,0,40,20"',
    ],
)
@pytest.mark.parametrize("mode, expected", [(ResizeMode.CENTRE_CROP, (16, 16)), (ResizeMode.SHORT_SIDE, (32, 16))])
def test_drawing_of_any_shape_is_drawn_at_full_size(attributes, mode, expected):
    content = svg('<rect width="4000" height="4000" fill="blue"/>', attributes)
    config = PictureConfig(image_size=16, image_format=ImageFormat.PNG, resize=mode)
    measured = measure(content, config)
    assert (measured.width, measured.height, measured.format) == (32, 16, "SVG")
    found = pixels(content, config)
    assert found.shape[1::-1] == expected
    assert (found == (0, 0, 255)).all()


@pytest.mark.parametrize("parts", [1, 400])
def test_drawing_apart_is_the_drawing_here(parts):
    """What multiplies is drawn in another process; the same squares said plainly are drawn in this one."""
    plainly = "".join(f'<rect x="{x % 20}" y="{x // 20}" width=".7" height=".5"/>' for x in range(parts))
    reused = '<defs><rect id="a" width=".7" height=".5"/></defs>'
    reused += "".join(f'<use href="#a" x="{x % 20}" y="{x // 20}"/>' for x in range(parts))
    box = 'viewBox="0 0 20 20"'
    assert (pixels(svg(plainly, box)) == pixels(svg(reused, box))).all()
    assert pixels(svg(plainly, box)).min() < 250


def test_drawing_is_refused_where_none_is_wanted():
    assert refused(svg("<g/>"), replace(SMALL, has_svg=False)) == "svg_not_wanted"


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, wrong",
    [
        ("image_size", 0),
        ("quality", 0),
        ("quality", 101),
        ("max_pixels", 0),
        ("max_pixels", 10**9),
        ("min_side", 0),
        ("background", "#ff000080"),
        ("background", "no colour"),
        ("bucket_step", 0),
        ("bucket_max_aspect", 0.5),
    ],
)
def test_configuration_refuses_what_makes_no_picture(field, wrong):
    with pytest.raises(ValueError, match=field if wrong != "no colour" else "color"):
        PictureConfig(**{field: wrong})


def test_configuration_refuses_a_square_that_is_no_bucket():
    with pytest.raises(ValueError, match="multiple of bucket_step, got 200 and 64"):
        PictureConfig(image_size=200, resize=ResizeMode.BUCKETS)


def test_configuration_survives_yaml():
    config = PictureConfig(resize=ResizeMode.PAD, resize_filter=ResizeFilter.LANCZOS)
    assert PictureConfig.from_yaml(config.to_yaml()) == config


def test_this_pillow_has_all_decoders():
    assert all(features.check(name) for name in ("webp", "avif", "libjpeg_turbo", "littlecms2", "libtiff"))
