"""How a picture was drawn, kept in the PNG itself as a text chunk."""

from __future__ import annotations

from io import BytesIO
from typing import IO

from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

NAME = "settings"
PNG_BEGINS = b"\x89PNG\r\n\x1a\n"


def is_png(content: bytes) -> bool:
    """Say whether a file is a PNG, by its first bytes."""
    return content.startswith(PNG_BEGINS)


def save_with_settings(picture: PILImage.Image, settings: str, file: IO[bytes]) -> None:
    """Write a PNG with its settings, which are text."""
    info = PngInfo()
    info.add_text(NAME, settings)
    picture.save(file, "PNG", pnginfo=info)


def settings_in(content: bytes) -> str:
    """Return the settings in a PNG.

    Raises:
        ValueError: if it holds none, or is damaged.
    """
    try:
        with PILImage.open(BytesIO(content)) as image:
            image.load()  # text may stand behind the picture
            text = str(image.info.get(NAME, ""))
    except OSError as error:
        raise ValueError(f"the picture can't be read: {error}") from error
    if not text:
        raise ValueError("the picture holds no settings: it was not drawn by this job, or they were stripped from it")
    return text
