"""When a failed download is tried again: exponential back-off with full jitter, and never before the server said.

    wait = max(Retry-After, u · min(ceiling, base · 2^attempt))      u uniform in [0, 1), from (seed, url, attempt)

Full jitter spreads the second attempts of many clients best (Brooker, "Exponential Backoff And Jitter", 2015). The draw
is a function of its arguments, so a run repeats.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime


def backoff_seconds(seed: int, url: str, attempt: int, base_seconds: float, ceiling_seconds: float) -> float:
    """Return how long to wait after the failed attempt number `attempt` (from 0) for `url`."""
    longest = min(ceiling_seconds, base_seconds * 2.0 ** min(attempt, 64))
    return longest * _uniform(f"{seed}\n{attempt}\n{url}")


def retry_after_seconds(headers: Mapping[str, str]) -> float:
    """Return the wait that an answer asks for with `Retry-After`, in seconds or as a date; 0 where it asks for none.

    A date counts from the answer's own `Date`, so that neither clock has to be right.
    """
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value) if len(value) < 10 else math.inf
    try:
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(headers.get("Date", ""))
    except (ValueError, TypeError, OverflowError):  # no date, or one with and one without a zone
        return 0.0
    return max(0.0, wait.total_seconds())


def _uniform(text: str) -> float:
    """Return a number in [0, 1) that is a function of `text`: the first 53 bits of its sha256."""
    bits = int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big")
    return (bits >> 11) / (1 << 53)
