"""How a picture was drawn, kept in the PNG itself as a text chunk, as JSON.

Nothing of where it was drawn is in it: folders, addresses of servers and machines belong to whoever draws it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from typing import IO, Any, TypeVar

import yaml
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from ldm.config import Config

ConfigT = TypeVar("ConfigT", bound=Config)

NAME = "settings"
OF_THE_PLACE = ("root", "record", "launch", "tracking", "bulk")
"""Fields of a configuration that say where something is drawn, or how files of prompts are."""
SAFETY = "safety"
FILTERS, KEYS = ("prompt_filter", "picture_filter"), ("watermark", "watermark_file")
"""What no picture may say: a stranger's would name code to run and files to read. Filters are the recipe's own; a key
is given anew, and marks only what the picture says was marked."""
PNG_BEGINS = b"\x89PNG\r\n\x1a\n"


def is_png(content: bytes) -> bool:
    """Say whether a file is a PNG, by its first bytes."""
    return content.startswith(PNG_BEGINS)


def is_png_name(path: str) -> bool:
    """Say whether a file's name is a PNG's."""
    return path.lower().endswith(".png")


def save_with_settings(picture: PILImage.Image, settings: Mapping[str, Any], file: IO[bytes]) -> None:
    """Write a PNG with its settings."""
    info = PngInfo()
    info.add_text(NAME, json.dumps(settings))
    picture.save(file, "PNG", pnginfo=info)


def settings_of(config: Config) -> dict[str, Any]:
    """Return what a picture says of the configuration that it was drawn with."""
    return {name: value for name, value in config.to_dict().items() if name not in OF_THE_PLACE}


def repeated_here(recipe: ConfigT, settings: Mapping[str, Any]) -> ConfigT:
    """Return the configuration that a picture was drawn with, at the places of a recipe and with its filters.

    Raises:
        ValueError: if the settings are of something else.
    """
    places = {name: value for name, value in recipe.to_dict().items() if name in OF_THE_PLACE}
    made = {name: value for name, value in settings.items() if name not in OF_THE_PLACE}
    if isinstance(said := made.get(SAFETY), dict):
        own = recipe.to_dict().get(SAFETY, {})
        filters = {name: value for name, value in own.items() if name in FILTERS}
        made[SAFETY] = {name: value for name, value in said.items() if name not in FILTERS + KEYS} | filters
    return type(recipe).from_yaml(yaml.safe_dump({**made, **places}))


def settings_in(content: bytes) -> dict[str, Any]:
    """Return the settings in a PNG.

    Raises:
        ValueError: if it holds none, or is damaged.
    """
    try:
        with PILImage.open(BytesIO(content)) as image:
            image.load()  # text may stand behind the picture
            text = str(image.info.get(NAME, ""))
    except (OSError, SyntaxError, PILImage.DecompressionBombError) as error:  # Pillow's, of a broken PNG
        raise ValueError(f"the picture can't be read: {error}") from error
    if not text:
        raise ValueError("the picture holds no settings: it was not drawn by this job, or they were stripped from it")
    settings = json.loads(text)
    if not isinstance(settings, dict):
        raise ValueError(f"the picture's settings are no mapping but {type(settings).__name__}")
    return settings
