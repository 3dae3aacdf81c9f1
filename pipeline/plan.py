"""What is to be made of a folder, shard by shard, and what of it is missing: known before anything is spent.

A plan holds no data and starts nothing; `pipeline.run.run` carries it out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ldm.storage import join, list_names
from pipeline.store.manifest import ShardRecord, read_records
from pipeline.store.schema import JSON, Split


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """One shard to make.

    Attributes:
        split: the part that the shard belongs to.
        name: the shard's name in the folder to be, such as "000000".
        source_name: the name of what it is made of, at its source.
        source_digest: digest of what it is made of; a shard made of something else is made again.
        num_rows: rows that go in, where known.
        payload: what else the stage must know, as JSON that only the stage reads.
    """

    split: Split
    name: str
    source_name: str
    source_digest: str
    num_rows: int = 0
    payload: str = ""


class Stage(Protocol):
    """What turns one task into one shard; built once in each worker, called from several threads if plans say so."""

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Publish the shard's files and return their record, not yet committed; `source` is the task's digest."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one worker needs, and how many workers there may be.

    Attributes:
        num_cpus: CPUs of a worker.
        num_gpus: GPUs of a worker.
        min_actors: workers that stay, however little there is to do.
        max_actors: workers at once; None for as many as the cluster holds.
        label: a Ray resource that a node must offer to get a worker, such as "ingest"; empty for any node.
        tasks_at_once: shards that a worker makes at once, on threads; its stage must allow for that.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    min_actors: int = 1
    max_actors: int | None = None
    label: str = ""
    tasks_at_once: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A folder to be filled, shard by shard.

    Attributes:
        root: the folder.
        kind: "dataset", "latents" or "generated".
        identity: what the folder is made from and how; without paths.
        tasks: every shard that the finished folder has.
        make_stage: builds the stage inside a worker; must be picklable.
        resources: what a worker needs.
        num_rows: rows that go in, over all tasks.
        num_bytes_estimate: bytes that the finished folder will take, about.
        summarize: the manifest's summary from the records of all tasks.
        facts: what the manifest's identity says beyond what the folder was claimed for.
        prepare: done on the driver before the given missing tasks are made.
        finish: done on the driver when the manifest is published.
    """

    root: str
    kind: str
    identity: Mapping[str, JSON]
    tasks: tuple[ShardTask, ...]
    make_stage: Callable[[], Stage]
    resources: Resources
    num_rows: int
    num_bytes_estimate: int
    summarize: Callable[[Sequence[ShardRecord]], dict[str, JSON]]
    facts: Mapping[str, JSON] | None = None
    prepare: Callable[[Sequence[ShardTask]], None] | None = None
    finish: Callable[[], None] | None = None

    def estimate(self, todo: Sequence[ShardTask]) -> int:
        """Return about how many bytes the given tasks will take."""
        return self.num_bytes_estimate * len(todo) // max(len(self.tasks), 1)


def missing(plan: Plan) -> list[ShardTask]:
    """Return the tasks whose shard is not there, or was made of something else, or lost a file."""
    names = {split: set(list_names(join(plan.root, split.value))) for split in Split}
    there = {
        (record.split, record.name, record.source)
        for record in read_records(plan.root)
        if all(f"{record.name}.{suffix}" in names[record.split] for suffix in record.files)
    }
    return [task for task in plan.tasks if (task.split, task.name, task.source_digest) not in there]


def describe(plan: Plan) -> str:
    """Return what `run` would do, for a person, without doing it."""
    todo = missing(plan)
    needs = plan.resources
    workers = "as many as fit" if needs.max_actors is None else f"{needs.min_actors} to {needs.max_actors}"
    where = f" on nodes with {needs.label}" if needs.label else ""
    at_once = f", {needs.tasks_at_once} shards at once" if needs.tasks_at_once > 1 else ""
    shards_of_split = Counter(task.split.value for task in plan.tasks)
    lines = [
        f"{plan.kind} in {plan.root}",
        f"  rows     {plan.num_rows or 'unknown until read'}",
        f"  shards   {len(plan.tasks)} ({', '.join(f'{split} {n}' for split, n in shards_of_split.items())})",
        f"  there    {len(plan.tasks) - len(todo)}, missing {len(todo)}",
        f"  to write about {plan.estimate(todo) / 1e6:.1f} MB",
        f"  workers  {workers}, each with {needs.num_cpus:g} CPU and {needs.num_gpus:g} GPU{where}{at_once}",
    ]
    return "\n".join(lines)
