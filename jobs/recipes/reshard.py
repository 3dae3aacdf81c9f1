"""A finished dataset cut anew: another shard size, or the rows that a list of keys names, every byte of them as it was.

`HOME/source` is the dataset (`--source.folder` names another one), `--source.keys FILE` takes a subset.
"""

from __future__ import annotations

from jobs.wiring.shard_dataset import ShardDatasetConfig
from ldm.storage import join
from pipeline.sources.dataset import FinishedDatasetConfig


def shard_dataset(home: str) -> ShardDatasetConfig:
    """A subset of a finished dataset, or the whole of it in shards of another size; nothing is decoded."""
    return ShardDatasetConfig(root=join(home, "dataset"), source=FinishedDatasetConfig(folder=join(home, "source")))
