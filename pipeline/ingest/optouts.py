"""Whether a server's `X-Robots-Tag` headers ask that a picture not be used.

    header     = directive ("," directive)*           for everybody, until a name
    directive  = word | name ":" word                 the name's words go on until the next name
Words are those of the robots meta tag; some carry a value of their own after a colon (max-snippet: 20).
"""

from __future__ import annotations

from collections.abc import Iterable

DEFAULT_DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex")
"""Words by which a site says that a picture is not for training: the first two were made for it."""

VALUED_DIRECTIVES = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
"""Words with a value after a colon, which is therefore not the end of a robot's name."""


def opt_out_of(headers: Iterable[str], robot: str, directives: frozenset[str]) -> str | None:
    """Return the directive that opts out, or None.

    Args:
        headers: the values of all `X-Robots-Tag` headers of one answer.
        robot: our name, lower case; directives for other names are not for us.
        directives: words, lower case, that opt out.
    """
    for header in headers:
        addressee = "*"
        for item in header.lower().split(","):
            name, colon, word = (part.strip() for part in item.partition(":"))
            if colon and name not in VALUED_DIRECTIVES:
                addressee = name
            else:
                word = "noindex" if name == "none" else name
            if addressee in ("*", robot) and word in directives:
                return word
    return None


def robot_name(user_agent: str) -> str:
    """Return the name by which a site's rules call a user agent: its first word without version, lower case."""
    return user_agent.partition("/")[0].partition(" ")[0].lower()
