"""Which decoded rows are worth keeping: sides, shape and captions, each with the name of its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ldm.config import Config
from pipeline.store.schema import Reject


@dataclass(frozen=True, kw_only=True, slots=True)
class FilterConfig(Config):
    """Limits beyond which a row is left out."""

    min_side: int = 1
    """Shorter side of the original image in pixels, at least."""
    max_aspect: float = 100.0
    """Longer side over shorter side, at most."""
    min_caption_chars: int = 1
    """Letters of a caption, at least; shorter ones are dropped."""
    max_caption_chars: int = 1000
    """Letters of a caption, at most; longer ones are dropped."""
    max_captions: int = 16
    """Captions kept for one image, the first ones."""

    def __post_init__(self) -> None:
        """Refuse limits that nothing passes."""
        if self.min_side < 1:
            raise ValueError(f"min_side must be at least 1, got {self.min_side}")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect must be at least 1, got {self.max_aspect}")
        if not 1 <= self.min_caption_chars <= self.max_caption_chars:
            raise ValueError(
                f"min_caption_chars must be from 1 to max_caption_chars, got {self.min_caption_chars} and "
                f"{self.max_caption_chars}"
            )
        if self.max_captions < 1:
            raise ValueError(f"max_captions must be at least 1, got {self.max_captions}")


def reject_shape(width: int, height: int, config: FilterConfig) -> Reject | None:
    """Return why an original of this size is left out ("too_small", "too_long"), or None."""
    short, long = sorted((width, height))
    if short < config.min_side:
        return Reject("too_small", f"{width}x{height}")
    if long > config.max_aspect * short:
        return Reject("too_long", f"{width}x{height}")
    return None


def kept_captions(captions: Sequence[str], config: FilterConfig) -> tuple[str, ...] | Reject:
    """Return the captions worth keeping, spaces made single and repetitions dropped, in order.

    Reasons: "no_caption" where there was none, "caption_length" where all were too short or too long.
    """
    texts = [" ".join(caption.split()) for caption in captions]
    texts = [text for text in dict.fromkeys(texts) if text]
    if not texts:
        return Reject("no_caption")
    fitting = [text for text in texts if config.min_caption_chars <= len(text) <= config.max_caption_chars]
    if not fitting:
        return Reject("caption_length", f"{len(texts[0])} letters")
    return tuple(fitting[: config.max_captions])
