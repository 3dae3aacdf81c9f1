r"""What e-mail addresses, URLs, phone numbers, markup and unseen characters look like in a caption.

Each pattern takes time linear in the text. A match may begin only where its first run of letters begins (lookbehind),
runs are never given back (possessive `++`), repetitions are bounded or their parts share no character.
"""

from __future__ import annotations

import re
import sys
import unicodedata

UNSEEN = re.compile(
    "(\U0001f3f4[\U000e0020-\U000e007e]{1,8}\U000e007f)"  # a flag such as Scotland's is spelt in tag characters
    r"|[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164"
    r"\ufeff\uffa0\ufff9-\ufffb\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
    r"|(?<![\u0590-\u1fff\u2070-\U0010ffff])[\u200c\u200d]|[\u200c\u200d](?![\u0590-\u1fff\u2070-\U0010ffff])"
)
"""Control characters, zero-width ones, bidi overrides, lone surrogates; group 1 is to stay. Joiners stay between
letters of scripts that are written with them and between emoji."""

_MARK_RANGES = "".join(
    chr(code) for code in range(sys.maxunicode + 1) if 0x300 <= code < 0x1F000 and unicodedata.combining(chr(code))
)
MARK_RUN = re.compile(f"([{_MARK_RANGES}]{{8}})[{_MARK_RANGES}]+")
"""More than eight accents on one letter, which no language has; group 1 is to stay."""

ENTITY = re.compile(
    r"&(?:amp;|#0{0,8}38;|#[xX]0{0,8}26;)*(#[0-9]{1,7};|#[xX][0-9a-fA-F]{1,6};|[a-zA-Z][a-zA-Z0-9]{1,31};)"
)
"""An HTML entity, however often its ampersand was escaped; group 1 is what follows the last ampersand."""

_INLINE = "a abbr b big cite code del em font i ins kbd mark s samp small span strike strong sub sup tt u wbr"
_BLOCK = (
    "address article aside audio base blockquote body br button canvas center col dd div dl dt embed fieldset "
    "figcaption figure footer form frame h1 h2 h3 h4 h5 h6 head header hr html iframe img input label legend li link "
    "main map meta nav noscript object ol option p param picture pre script section select source style svg table "
    "tbody td textarea tfoot th thead title tr track ul video"
)
INLINE_TAGS = frozenset(_INLINE.split())
"""Tags within a word or a sentence: nothing comes in their place, where a space comes in that of others."""
TAGS = INLINE_TAGS | frozenset(_BLOCK.split())
"""Tags of HTML; other words in angle brackets, such as <PERSON>, are a caption's own."""
TAG = re.compile(
    r"<(?P<raw>script|style)\b[^<>]*>[^<]*</(?P=raw)\s*>"
    r"|<[!?][a-z\[-][^<>]*>"
    r"|</?(?P<name>[a-z][a-z0-9]{0,15}+)(?:[\s/][^<>]*)?>"
    r"|<(?P<cut>[a-z][a-z0-9]{0,15}+)\s+[a-z-]+\s?=[^<>]*\Z",
    re.IGNORECASE,
)
"""What may be a tag of HTML, a comment, a script with what it holds, or a tag that the text's end cuts off."""

_BBCODE = (
    "b|i|u|s|align|center|centre|code|color|colour|email|font|img|indent|left|list|quote|right|size|spoiler|strike|sub"
    "|sup|table|td|th|tr|url|video|youtube"
)
BBCODE_END = re.compile(rf"\[/({_BBCODE})\]", re.IGNORECASE)
BBCODE = re.compile(rf"\[/?({_BBCODE})(=[^\[\]]*)?\]", re.IGNORECASE)
"""A tag in brackets: group 1 its name, group 2 what it is set to. `[left]` alone is a caption's own word."""

EMAIL = re.compile(
    r"(?:mailto:)?(?<![\w.%+-])[\w.%+-]++(?:[@\uff20]|\s?[(\[{<]\s?at\s?[)\]}>]\s?)"
    r"(?:[\w-]++(?:\.|\s?[(\[{<]\s?dot\s?[)\]}>]\s?))+[^\W\d_]{2,24}(?![\w@])",
    re.IGNORECASE,
)
EMAIL_HINT = re.compile(r"[@\uff20]|[(\[{<]\s?at\s?[)\]}>]", re.IGNORECASE)

_URL_CHARS = (
    r"[^\s<>\"\u201c\u201d\u00ab\u00bb\uff0c\u3002\uff1b\uff1a\uff01\uff1f\u3001\uff09\u3011\u300d\u300f\u300b]"
)
_NO_URL_END = r"(?<![.,;:!?'\")\]}*\u2026])"
_GENERIC = "com|net|org|info|biz|edu|gov|io|(?:com?|org|net|ac)\\.[a-z]{2}"
_COUNTRY = (
    "ae|ar|at|au|be|bg|br|ca|cc|ch|cl|cn|co|cz|de|dk|ee|es|eu|fi|fr|gr|hk|hr|hu|id|ie|il|in|ir|it|jp|kr|lt|lv|ly|me|mx|my"
    "|nl|no|nz|pe|ph|pk|pl|pt|ro|rs|ru|se|sg|si|sk|th|to|tr|tv|tw|ua|uk|us|vn|za|app|blog|dev|shop|site|store|xyz"
)
URL = re.compile(
    rf"(?:https?|s?ftp|file)://(?:{_URL_CHARS}+{_NO_URL_END})?"
    rf"|data:[\w.+-]++/[\w.+-]++;base64,[A-Za-z0-9+/=_-]*"
    rf"|(?<![\w.@-])www\d?\.[\w-]{_URL_CHARS}*{_NO_URL_END}",
    re.IGNORECASE,
)
"""An address with a scheme or with www."""
HOST = re.compile(
    rf"(?<![\w.@-])(?!(?:asp|vb|ado|ml)\.net\b)(?:[a-z0-9-]{{1,63}}+\.)+"
    rf"(?:(?:{_GENERIC})(?![\w@-]|\.\w)(?::\d{{2,5}})?(?:[/?#](?:{_URL_CHARS}*{_NO_URL_END})?)?"
    rf"|(?:{_COUNTRY})/(?:{_URL_CHARS}*{_NO_URL_END})?)",
    re.IGNORECASE,
)
"""A bare host: of a generic domain, or of any common one if a path follows."""

_GAP = r"[ .\-/\u00a0\u2010-\u2015]"
PHONE = re.compile(
    rf"""
    (?P<label> \b(?:tel|t[eé]l[eé]fono?|t[eé]l[eé]phone|phone|mobile|mob|cell|ph|fax|whats\s?app)\s?[.:\#]{{1,2}}\s?
        | \b(?:tel|fax|call|whats\s?app)\s )
    (?P<labelled> \+?\(?\d(?:[ .\-()/\u00a0]{{0,2}}\d){{6,13}} )(?!\w)
    | (?<![\d+])(?<!\d[.,/\-]) (?:
        \([2-9]\d\d\)\s?\d{{3}}{_GAP}\d{{4}}                              # (555) 123-4567
        | \(\d\d\)\s?9?\d{{4}}-\d{{4}}                                      # (11) 91234-5678
        | \(0\d{{1,5}}\)(?:{_GAP}{{0,3}}\d{{2,8}}){{1,4}}                   # (030) 123 456
        | (?<!\w) (?:
            \+[1-9](?:[ .\-()/\u00a0]{{0,3}}\d){{7,14}}                     # E.164: +49 (0)30 123456
            | 00[1-9]\d{{0,2}}{_GAP}(?:[ .\-()/\u00a0]{{0,3}}\d){{6,12}}    # 0049 30 123456
            | (?:1{_GAP})?[2-9]\d\d(?P<same>[-. ])\d{{3}}(?P=same)\d{{4}} # 555-123-4567, 1-800-555-0199
            | 1[38]00{_GAP}\d{{3}}{_GAP}\d{{3}}                             # 1300 123 456
            | 1[3-9]\d[ -]\d{{4}}[ -]\d{{4}}                                # 138 0013 8000
            | [6-9]\d{{4}}[ -]\d{{5}}                                       # 98765 43210
            | (?P<trunk> 0[1-9]\d{{0,4}}(?:{_GAP}{{1,3}}\d{{2,8}}){{1,5}} ) # 01 23 45 67 89, 020 7946 0958
        )
    )(?!\w)(?![.,/\-]\d)
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""What may be a phone number; `is_phone` looks closer. A number without signs between its digits needs a label or +."""

PHONE_HINT = re.compile(r"\d\D{0,3}\d")

_CATALOGUE = re.compile(
    r"(?:isbn|issn|ean|upc|gtin|doi|oclc|sku|asin|part|serial|model|item|ref|lot|inv|art)\W{0,3}"
    r"(?:(?:no|nr|number|1[03])\b)?\W{0,3}\Z",
    re.IGNORECASE,
)
"""Words before a number that is no phone's."""
_DATE = re.compile(r"\d{1,2}([ .\-/])\d{1,2}\1(?:19|20)\d\d(?!\d)|(?:19|20)\d\d\D{1,3}(?:19|20)\d\d\b")
_DECIMAL = re.compile(r"\+\d{1,3}\.\d+")
_TRUNK_DIGITS = range(9, 13)


def is_phone(found: re.Match[str]) -> bool:
    """Return whether a match of PHONE is no date, range of years, decimal or catalogue number."""
    number = found["labelled"] or found[0]
    if _DATE.match(number) or _DECIMAL.fullmatch(number):
        return False
    if _CATALOGUE.search(found.string, max(0, found.start() - 24), found.start()):
        return False
    if found["trunk"]:
        num_digits = sum(letter.isdigit() for letter in number)
        gaps = set(re.findall(r"\D+", number)[1:])
        return num_digits in _TRUNK_DIGITS and len(gaps) <= 1
    return True


EMPTY_BRACKETS = re.compile(r"\(\s?\)|\[\s?\]|\{\s?\}|<\s?>")
"""What is left of a link in brackets."""
