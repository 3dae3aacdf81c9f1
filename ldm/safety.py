"""What a user lays down of prompts and pictures: filters of their own, and a watermark on what is handed out.

Order: prompts → the prompt filter says why one must not be drawn → drawn → the picture filter says why one must not be
shown, which becomes plain grey → all others are watermarked.

A filter is any function that a module names, in a package that is installed or in a file of the folder that a job is
started in. It is asked about one at a time, and its answer is the reason, or "" for none:

    def prompts(prompt: str) -> str: ...
    def pictures(pixels: numpy.ndarray, prompt: str) -> str: ...       # uint8, (y, x, 3), without the watermark

Letters: n number of pictures, y pixel row, x pixel column.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ldm import storage
from ldm.config import Config
from ldm.watermark import Picture, Pixels, check_size, marked

PromptFilter = Callable[[str], str]
PictureFilter = Callable[[Picture, str], str]

GREY = 128
"""Of every pixel of a picture that must not be shown."""
DIGEST_LETTERS = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class SafetyConfig(Config):
    """What is refused, and how pictures are marked."""

    prompt_filter: str = ""
    """MODULE:FUNCTION that is asked about every prompt (not the negative one) and returns why it must not be drawn, or
    "" if it may be."""
    picture_filter: str = ""
    """MODULE:FUNCTION that is asked about every picture (uint8 array of rows, columns, 3) and its prompt, and returns
    why it must not be shown, or "" if it may be."""
    watermark: str = ""
    """Key of an invisible watermark, any text that is hard to guess; empty marks nothing. It marks whole pictures, what
    a mask left untouched included, and python -m jobs.detect finds it. It is never written into a picture."""
    watermark_file: str = ""
    """File or URL of the key, in its place: what stands in a command stays in the shell's history."""
    watermark_digest: str = ""
    """First letters of the key's digest: another key is refused. A picture's own settings name it."""

    def __post_init__(self) -> None:
        for field in ("prompt_filter", "picture_filter"):
            module, _, name = getattr(self, field).partition(":")
            if getattr(self, field) and not (_is_dotted(module) and name.isidentifier()):
                raise ValueError(f"{field} is MODULE:FUNCTION, got {getattr(self, field)!r}")
        if self.watermark and self.watermark_file:
            raise ValueError("a watermark's key is given or stands in a file: give watermark or watermark_file")

    def identified(self) -> SafetyConfig:
        """Return it with the key, out of its file too, and the digest of that.

        Raises:
            ValueError: if the file can't be read or is empty, or the key is not the one that the digest names.
        """
        key = key_in(self.watermark_file) if self.watermark_file else self.watermark
        if self.watermark_digest and not key:
            raise ValueError(
                f"this asks for the watermark of the key {self.watermark_digest}, and no picture holds a key: give it "
                "as watermark or watermark_file; an empty watermark_digest goes without"
            )
        digest = key_digest(key) if key else ""
        if self.watermark_digest and digest != self.watermark_digest:
            raise ValueError(
                f"the key that is given is {digest}, the one that is asked for {self.watermark_digest}: an empty "
                "watermark_digest takes what is given"
            )
        return replace(self, watermark=key, watermark_file="", watermark_digest=digest)

    def without_key(self) -> SafetyConfig:
        """Return what may stand in a picture: the key's digest, and neither the key nor where it lies."""
        return replace(self, watermark="", watermark_file="")


class Safety:
    """Filters that are loaded, and the watermark's key.

    Args:
        config: what is refused and how pictures are marked.

    Raises:
        ValueError: for a filter that is not there or can't be called, or a key that is not the one that is named.
    """

    def __init__(self, config: SafetyConfig) -> None:
        self._prompt_filter = _loaded(config.prompt_filter, "prompt_filter")
        self._picture_filter = _loaded(config.picture_filter, "picture_filter")
        self._key = config.identified().watermark

    def check_size(self, rows: int, columns: int) -> None:
        """Refuse pictures that are too small for the watermark, before they are drawn.

        Raises:
            ValueError: with both sizes.
        """
        if self._key:
            check_size(rows, columns)

    def refused(self, prompts: Sequence[str]) -> list[str]:
        """Return for each prompt why it must not be drawn, or "" if it may be.

        Raises:
            ValueError: if the filter returns no text.
        """
        if self._prompt_filter is None:
            return [""] * len(prompts)
        return [_reason(self._prompt_filter(prompt), "prompt_filter") for prompt in prompts]

    def judged(self, pixels: Pixels, prompts: Sequence[str]) -> tuple[Pixels, list[str]]:
        """Return pictures of which those that must not be shown are plain grey, and for each the reason or "".

        Raises:
            ValueError: if the filter returns no text.
        """
        if self._picture_filter is None:
            return pixels, [""] * len(pixels)
        # Copies: what a filter does to its pixels does nothing to the pictures.
        asked = [self._picture_filter(shown.copy(), prompt) for shown, prompt in zip(pixels, prompts, strict=True)]
        reasons = [_reason(answer, "picture_filter") for answer in asked]
        is_refused = np.array([bool(reason) for reason in reasons])
        return np.where(is_refused[:, None, None, None], np.uint8(GREY), pixels), reasons

    def marked(self, pixels: Pixels) -> Pixels:
        """Return pictures with the watermark; as they are without a key."""
        return marked(pixels, self._key) if self._key else pixels

    def finished(self, pixels: Pixels, prompts: Sequence[str]) -> tuple[Pixels, list[str]]:
        """Return pictures as they may be handed out, and for each why it is plain grey, or "".

        The watermark is on all but grey ones; the filter sees pictures without it.

        Raises:
            ValueError: if the filter returns no text, or a picture is too small for the watermark.
        """
        shown, reasons = self.judged(pixels, prompts)
        is_shown = np.array([not reason for reason in reasons], bool)
        finished = shown.copy()
        finished[is_shown] = self.marked(shown[is_shown])
        return finished, reasons


def key_in(path: str) -> str:
    """Return the key in a file, without space around it.

    Raises:
        ValueError: if it can't be read, or holds none.
    """
    try:
        key = storage.read_text(path).strip()
    except (*storage.PLACE_ERRORS, UnicodeDecodeError) as error:
        raise ValueError(f"the watermark's key can't be read from {path}: {type(error).__name__} {error}") from error
    if not key:
        raise ValueError(f"{path} is empty and should hold the watermark's key")
    return key


def key_digest(key: str) -> str:
    """Return what tells keys apart and may be shown."""
    return hashlib.sha256(b"watermark " + key.encode()).hexdigest()[:DIGEST_LETTERS]


def _is_dotted(module: str) -> bool:
    return all(part.isidentifier() for part in module.split("."))


def _loaded(name: str, field: str) -> Callable[..., object] | None:
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ValueError(f"{field} {name!r} can't be loaded: {error}") from error
    if found is None:
        raise ValueError(f"{field} {name!r} can't be loaded: the module {module} has no {function}")
    if not callable(found):
        raise ValueError(f"{field} {name!r} is no function but {type(found).__name__}")
    loaded: Callable[..., object] = found
    return loaded


def _reason(answer: object, field: str) -> str:
    if not isinstance(answer, str):
        raise ValueError(f'{field} must return the reason as text, or "" for none, got {answer!r}')
    return answer
