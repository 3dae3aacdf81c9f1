"""The language of a caption, by a small offline model (py3langid, the extra `[language]`), for rules on `language`.

Captions are short, and a short text of names fits many languages: what the model is not sure of is "und", ISO 639's
word for undetermined. A rule that wants English says `language in en, und` to keep such captions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

MAX_CHARS = 200
"""Letters of a caption that are looked at: as many as a ledger keeps, so that it tells the same language."""
MIN_CONFIDENCE = 0.5
"""Share of belief that a language must reach ("a red bicycle leaning on a wall" 0.90, "Green Leaf" 0.08)."""
UNDETERMINED = "und"


def language_of(caption: str) -> str:
    """Return the ISO 639 code of a caption's language, such as "en", or "und".

    Raises:
        ValueError: if py3langid is not installed.
    """
    language, _ = _identifier().classify(caption[:MAX_CHARS])
    return str(language)


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError(
            "a rule on language needs py3langid: pip install 'latent-diffusion-pipeline[language]'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=MIN_CONFIDENCE)
