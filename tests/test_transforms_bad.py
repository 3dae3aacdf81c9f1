"""Laws of bad bytes: any bytes give a picture or a named reason, the same ones everywhere, within their limits."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.ingest.transforms import (
    PICTURE_REASONS,
    ImageFormat,
    Measured,
    PictureConfig,
    ResizeMode,
    measure,
    render,
)
from pipeline.store.schema import Reject
from tests.bad_images import BAD_IMAGES, OK
from tests.fuzzing import FUZZ_SECONDS, damage, damaged, fuzz
from tests.image_bytes import encoded, natural, png

ANY_HEALTH = list(HealthCheck)
CONFIG = PictureConfig(image_size=16)
STRICT = PictureConfig(image_size=16, max_pixels=100_000, resize=ResizeMode.SHORT_SIDE, image_format=ImageFormat.WEBP)


def outcome_of(content: bytes, config: PictureConfig = CONFIG) -> str:
    """The reason, or "ok" and a digest of the picture; whatever is made has the size that it must have."""
    measured = measure(content, config)
    outcome = render(content, measured, config) if isinstance(measured, Measured) else measured
    if isinstance(outcome, Reject):
        assert outcome.reason in PICTURE_REASONS
        assert len(outcome.detail) <= 200
        return outcome.reason
    assert isinstance(measured, Measured)
    assert measured.width * measured.height <= config.max_pixels
    assert min(outcome.pixels.shape[:2]) == config.image_size
    assert outcome.pixels.shape[2] == 3
    return f"{OK} {hashlib.sha256(outcome.content + outcome.pixels.tobytes()).hexdigest()}"


def digests() -> dict[str, str]:
    return {name: outcome_of(bad.content) for name, bad in BAD_IMAGES.items()}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_ends_under_its_reason(name):
    assert outcome_of(BAD_IMAGES[name].content).split()[0] == BAD_IMAGES[name].outcome


def test_bad_images_are_of_many_kinds_and_meet_nearly_every_reason():
    assert len({name.rstrip("0123456789") for name in BAD_IMAGES}) >= 60
    elsewhere = {"too_long", "svg_not_wanted", "no_map", "bad_map"}  # tests/test_transforms_shape, test_semantic_maps
    assert {bad.outcome for bad in BAD_IMAGES.values()} >= PICTURE_REASONS.keys() - elsewhere


def test_pictures_are_the_same_in_another_process_and_in_many_threads():
    program = "import json; from tests.test_transforms_bad import digests; print(json.dumps(digests()))"
    there = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(outcome_of, (bad.content for bad in BAD_IMAGES.values())))
    assert there == dict(zip(BAD_IMAGES, together, strict=True))


MEASURE_PEAK = r"""
import re, sys
from pathlib import Path
from pipeline.ingest.transforms import PictureConfig, measure, render
from PIL import Image
from tests.image_bytes import encoded
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024
config = PictureConfig()
warm_up = encoded(Image.new("RGB", (300, 300)), "JPEG")
render(warm_up, measure(warm_up, config), config)
with open(sys.argv[1], "rb") as file:
    content = file.read()
before = peak()
picture = render(content, measure(content, config), config)
assert picture.pixels.shape == (256, 256, 3), picture
print(peak() - before)
"""


# ru_maxrss would not do: a process begins with that of the one that started it.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    "make, limit_mb",
    [
        (lambda: encoded(natural(400, 312).resize((1600, 1250)), "JPEG"), 50),
        (lambda: encoded(natural(400, 312).resize((1600, 1250)), "JPEG", progressive=True), 50),
        (lambda: encoded(natural(500, 500).resize((8000, 8000)), "JPEG"), 500),
        (lambda: png(6000, 6000, colour=6), 300),  # 144 MB of colours and alpha, and no second copy of them
    ],
    ids=["2 MP", "2 MP progressive", "64 MP", "36 MP with alpha"],
)
def test_memory_of_one_picture_is_bounded(make, limit_mb, tmp_path):
    (tmp_path / "image").write_bytes(make())
    command = [sys.executable, "-c", MEASURE_PEAK, str(tmp_path / "image")]
    found = subprocess.run(command, capture_output=True, check=True, text=True)
    print(f"{int(found.stdout)} MB")
    assert int(found.stdout) < limit_mb


# --- fuzz -----------------------------------------------------------------------------------------------------------

SEED = natural(48, 36, seed=9)
SOUND = [
    encoded(SEED, "JPEG", quality=80),
    encoded(SEED, "JPEG", progressive=True, icc_profile=b"x" * 200),
    encoded(SEED.convert("CMYK"), "JPEG"),
    encoded(SEED, "PNG"),
    encoded(SEED.quantize(16), "PNG", transparency=3),
    encoded(SEED, "WEBP"),
    encoded(SEED.convert("RGBA"), "WEBP", lossless=True),
    encoded(SEED.quantize(16), "GIF"),
    encoded(SEED, "TIFF", compression="tiff_lzw"),
    encoded(SEED, "BMP"),
    encoded(SEED, "AVIF"),
    encoded(SEED, "PPM"),
    BAD_IMAGES["svg"].content,
    BAD_IMAGES["tiff_plain"].content,
]


@settings(max_examples=300, deadline=None, suppress_health_check=ANY_HEALTH)
@given(st.sampled_from(SOUND), damage)
def test_damaged_bytes_never_raise_and_keep_to_the_limits(sound, changes):
    outcome_of(damaged(sound, changes), STRICT)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([sound[:16] for sound in SOUND]))
def test_any_bytes_after_a_signature_never_raise(tail, signature):
    outcome_of(signature + tail, STRICT)


@pytest.mark.slow
@pytest.mark.timeout(FUZZ_SECONDS + 300)
def test_damaged_bytes_never_raise_for_ten_minutes():
    starts = [*SOUND, *(bad.content for bad in BAD_IMAGES.values() if len(bad.content) < 20_000)]
    fuzz(lambda sound, changes: outcome_of(damaged(sound, changes), STRICT), st.sampled_from(starts), damage)


def test_reasons_say_what_they_mean():
    assert all(meaning and meaning[-1] != "." for meaning in PICTURE_REASONS.values())
    assert isinstance(Image.MAX_IMAGE_PIXELS, int)  # nobody has switched Pillow's own limit off
