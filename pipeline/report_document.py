"""A report as one HTML page that needs nothing else: no script, no file beside it, no network.

A policy in the page's head forbids scripts and anything from outside.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ldm.config import digest_of
from pipeline.report_elements import Element, element, stranger
from pipeline.report_style import STYLE
from pipeline.store.manifest import Manifest

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
MAX_IDENTITY_CHARS = 20_000


def document(title: str, header: Element, sections: Sequence[Element]) -> Element:
    """Return the whole page: header, links to the sections, sections."""
    links = [element("a", part[0].text or "", href=f"#{part.get('id')}") for part in sections]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", STYLE),
    )
    body = element(
        "body",
        element("a", "Skip to the report", href=f"#{sections[0].get('id')}", class_="skip"),
        header,
        element("nav", *links, aria_label="Sections"),
        element("main", *sections),
    )
    return element("html", head, body, lang="en")


def section(name: str, title: str, *children: Element) -> Element:
    """Return a part of the page that its links lead to."""
    return element(
        "section", element("h2", title, id=f"{name}-title"), *children, id=name, aria_labelledby=f"{name}-title"
    )


def table(names: Sequence[str], rows: Sequence[Sequence[str | Element]], kind: str = "figures") -> Element:
    """Return a table whose first column names its rows; an empty name leaves its head empty."""
    heads = [element("th", name, scope="col") if name else element("td") for name in names]
    lines = [
        element("tr", element("th", line[0], scope="row"), *[element("td", cell) for cell in line[1:]]) for line in rows
    ]
    return element("table", element("thead", element("tr", *heads)), element("tbody", *lines), class_=kind)


def making(manifest: Manifest) -> Element:
    """Return digests and configuration of what the report is about."""
    digests = [["Manifest", manifest.digest], ["Identity", digest_of(dict(manifest.identity))]]
    digests.append(["Schema version", str(manifest.version)])
    content = json.dumps({"identity": manifest.identity, "summary": manifest.summary}, indent=1, sort_keys=True)
    return section(
        "making",
        "How it was made",
        table(("What", "Digest"), [[name, element("code", digest)] for name, digest in digests], kind="digests"),
        element(
            "details",
            element("summary", "Configuration and counts"),
            element("pre", stranger(content, MAX_IDENTITY_CHARS), tabindex="0", aria_label="Configuration and counts"),
        ),
    )
