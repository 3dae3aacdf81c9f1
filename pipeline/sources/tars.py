"""WebDataset tars made elsewhere, such as img2dataset's: one source shard for each tar.

Captions come from a text member and from a field of the JSON member. Whole tars are held out, so that none is read
twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from ldm.config import Config, digest_of
from ldm.storage import join, list_names
from pipeline.sources.source import check_share
from pipeline.store.schema import Row, SourceRow, Split, key_of
from pipeline.store.shards import read_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class TarsConfig(Config):
    """A folder of WebDataset tars."""

    folder: str
    """Where the .tar files are: a folder or a URL such as s3://bucket/tars."""
    image_suffixes: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """Members that may be the image; the first that a row has is taken."""
    caption_suffix: str = "txt"
    """Member with the caption."""
    caption_field: str = "caption"
    """Field of the JSON member with the caption, or a list of them, where there is no caption member."""
    holdout_share: float = 0.01
    """Share of tars kept for validation: rounded up, and never all."""

    def __post_init__(self) -> None:
        """Refuse what makes no dataset."""
        check_share(self.holdout_share)
        if not self.image_suffixes:
            raise ValueError("image_suffixes must name one member at least")

    def build(self) -> TarsSource:
        """Return the source."""
        return TarsSource(self)


class TarsSource:
    """The rows of a `TarsConfig`, in the tars' own order."""

    def __init__(self, config: TarsConfig) -> None:
        """Keep the configuration; the folder is listed at the first use."""
        self.config = config

    @cached_property
    def digest(self) -> str:
        """Digest of the configuration without its path, and of the tars' names."""
        config = {name: value for name, value in self.config.to_dict().items() if name != "folder"}
        return digest_of({"config": config, "tars": self._names})

    def shard_names(self, split: Split) -> Sequence[str]:
        """Return the names of a split's tars, in order."""
        return [name for name in self._names if (name in self._held_out) == (split is Split.VALIDATION)]

    def open_shard_at_row(self, name: str, row: int) -> Iterator[SourceRow]:
        """Yield the rows of a tar from row number `row` on; rows without an image have no payload."""
        rows = islice(read_rows(join(self.config.folder, name)), row, None)
        return (self._source_row(name, members) for members in rows)

    def shard_num_rows(self, name: str) -> int | None:
        """Return None: a tar does not say how many rows it holds."""
        return None

    def num_rows(self, split: Split) -> int | None:
        """Return None: tars do not say how many rows they hold."""
        return None

    @cached_property
    def _names(self) -> list[str]:
        names = [name for name in list_names(self.config.folder) if name.endswith(".tar") and not name.startswith(".")]
        if not names:
            raise ValueError(f"{self.config.folder} holds no .tar file")
        return names

    @cached_property
    def _held_out(self) -> set[str]:
        num_held_out = min(math.ceil(len(self._names) * self.config.holdout_share), len(self._names) - 1)
        return set(sorted(self._names, key=lambda name: hashlib.sha256(name.encode()).digest())[:num_held_out])

    def _source_row(self, name: str, members: Row) -> SourceRow:
        facts = _json_object(members.get("json", b"{}"))
        image_suffix = next((suffix for suffix in self.config.image_suffixes if suffix in members), None)
        texts = (
            [members[self.config.caption_suffix].decode(errors="replace")]
            if self.config.caption_suffix in members
            else []
        )
        said = facts.get(self.config.caption_field, facts.get("captions", []))
        texts += [str(text) for text in (said if isinstance(said, list) else [said]) if text]
        return SourceRow(
            key=key_of(f"tar:{name}:{members['__key__']}"),
            captions=tuple(dict.fromkeys(texts)),
            payload=members[image_suffix] if image_suffix else None,
            attributes={"tar": name, "key": members["__key__"], **_scalars(facts)},
        )


def _json_object(content: bytes) -> dict[str, Any]:
    """Return a row's JSON member, or nothing where it is broken: the image and its caption may still be good."""
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _scalars(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if isinstance(value, str | int | float | bool)}
