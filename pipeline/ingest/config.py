"""The whole configuration of a dataset, and which part of it decides the rows.

What says where and how fast (paths, workers, rows in a shard) is no part of a folder's identity. Nor are the filters:
they stand in the journal, since they may change, and a change is shown before it is done.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ldm.config import Config
from pipeline.ingest.captions import ScrubConfig
from pipeline.ingest.duplicates import DuplicateConfig
from pipeline.ingest.fetch import FetchConfig
from pipeline.ingest.filters import FilterConfig
from pipeline.ingest.transforms import PictureConfig
from pipeline.sources.dataset import FinishedDatasetConfig
from pipeline.sources.emoji import EmojiConfig
from pipeline.sources.folder import FolderConfig
from pipeline.sources.image_parquet import ImageParquetConfig
from pipeline.sources.mixture import MixtureConfig
from pipeline.sources.scenes import ScenesConfig
from pipeline.sources.tables import UrlTableConfig
from pipeline.sources.tars import TarsConfig
from pipeline.store.schema import JSON

_DECIDING = ("source", "picture", "scrub", "duplicates")
"""Fields that decide which rows come out and what they hold, the filters aside."""
_PLACES = frozenset({"folder", "files", "keys", "rows_per_shard"})
"""Fields of sources that say where rows are read and how they are cut, not what they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig(Config):
    """A sharded image-text dataset, made from a source."""

    root: str
    """Folder or URL that the dataset is written to."""
    source: (
        EmojiConfig
        | ScenesConfig
        | FolderConfig
        | UrlTableConfig
        | TarsConfig
        | ImageParquetConfig
        | FinishedDatasetConfig
        | MixtureConfig
    )
    """Where images and captions come from."""
    picture: PictureConfig = field(default_factory=PictureConfig)
    """What becomes of an image."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which rows are left out."""
    scrub: ScrubConfig = field(default_factory=ScrubConfig)
    """What is taken out of captions."""
    duplicates: DuplicateConfig = field(default_factory=lambda: DuplicateConfig(exact=False))
    """Which copies of a picture are left out."""
    fetch: FetchConfig = field(default_factory=FetchConfig)
    """How addresses are fetched."""
    num_cpus: float = 1.0
    """CPUs of one worker."""
    min_actors: int = 1
    """Workers that stay, however little there is to do."""
    max_actors: int | None = None
    """Workers at once; none for as many as the cluster holds now. A cluster that grows by itself needs a number."""
    resource_label: str = ""
    """Ray resource that a node must offer to get a worker, to choose among unlike nodes; empty for any node."""

    def __post_init__(self) -> None:
        """Refuse what no worker could do."""
        if self.num_cpus <= 0:
            raise ValueError(f"num_cpus must be above 0, got {self.num_cpus}")
        if self.min_actors < 1:
            raise ValueError(f"min_actors must be at least 1, got {self.min_actors}")
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ValueError(f"max_actors must be at least min_actors {self.min_actors}, got {self.max_actors}")

    def identity(self) -> dict[str, JSON]:
        """Return what decides the dataset's rows: no path, no worker count, no filter."""
        facts = self.to_dict()
        return {name: without_places(facts[name]) for name in _DECIDING}


def without_places(facts: JSON) -> JSON:
    """Return plain data of a source without the fields that say where and how it is read, at any depth."""
    if isinstance(facts, dict):
        return {name: without_places(value) for name, value in facts.items() if name not in _PLACES}
    if isinstance(facts, list):
        return [without_places(value) for value in facts]
    return facts
