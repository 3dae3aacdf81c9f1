"""Mapping a stage over shards with Ray Data: only what is missing, each shard committed where it was made.

Order: claim the folder → drop what interrupted writers left → map the missing tasks over a pool of actors (each builds
its stage once; each commits its own shards) → try failed shards once more → publish the manifest.
The driver holds no data: it may die at any moment, and the same command goes on from the shards that are there.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import ray
from ray.data import ActorPoolStrategy, DataContext

from ldm.storage import check_writable, join, list_names, remove_partials
from pipeline.progress import ShardProgress
from pipeline.store.manifest import Manifest, ShardRecord, claim_root, commit_shard, publish_manifest, read_records
from pipeline.store.schema import JSON, Split

MAX_BLOCKS = 4096
"""Tasks are handed out in at most this many pieces: each costs the driver a millisecond and some memory."""
MAX_STARTS = 4
"""Times that one shard may be begun: Ray begins it again whenever its process dies, even if the shard kills it."""
MAX_ERROR_LINES = 3
"""Failed shards named in the error, beyond which they are only counted."""

logger = logging.getLogger(__name__)


GROWING_ACTORS = 8
"""Workers asked for where the cluster has none yet and grows by what is asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """One shard to make.

    Attributes:
        split: the part that the shard belongs to.
        name: the shard's name in the folder to be, such as "000000".
        source_name: the name of what it is made of, at its source.
        source_digest: digest of what it is made of; a shard made of something else is made again.
        num_rows: rows that go in, where known.
    """

    split: Split
    name: str
    source_name: str
    source_digest: str
    num_rows: int = 0


class Stage(Protocol):
    """What turns one task into one shard; built once in each worker."""

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Publish the shard's files and return their record, not yet committed; `source` is the task's digest."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one worker needs, and how many workers there may be.

    Attributes:
        num_cpus: CPUs of a worker.
        num_gpus: GPUs of a worker.
        num_actors: workers at once; None for as many as the cluster holds.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    num_actors: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A folder to be filled, shard by shard.

    Attributes:
        root: the folder.
        kind: "dataset" or "latents".
        identity: what the folder is made from and how; without paths.
        tasks: every shard that the finished folder has.
        make_stage: builds the stage inside a worker; must be picklable.
        resources: what a worker needs.
        num_rows: rows that go in, over all tasks.
        num_bytes_estimate: bytes that the finished folder will take, about.
        summarize: the manifest's summary from all records.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What one call of `run` did.

    Attributes:
        num_rows: rows in the shards made now.
        num_shards: shards made now.
        num_skipped: shards that were already there.
        seconds: wall-clock time.
        counts: input rows by status in the shards made now.
        manifest: the finished folder.
    """

    num_rows: int
    num_shards: int
    num_skipped: int
    seconds: float
    counts: Mapping[str, int]
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class _Failure:
    """A shard that could not be made, and the last lines of why."""

    task: ShardTask
    cause: str


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
    num_bytes = plan.num_bytes_estimate * len(todo) / max(len(plan.tasks), 1)
    needs = plan.resources
    workers = "as many as fit" if needs.num_actors is None else str(needs.num_actors)
    shards_of_split = Counter(task.split.value for task in plan.tasks)
    lines = [
        f"{plan.kind} in {plan.root}",
        f"  rows     {plan.num_rows or 'unknown until read'}",
        f"  shards   {len(plan.tasks)} ({', '.join(f'{split} {n}' for split, n in shards_of_split.items())})",
        f"  there    {len(plan.tasks) - len(todo)}, missing {len(todo)}",
        f"  to write about {num_bytes / 1e6:.1f} MB",
        f"  workers  {workers}, each with {needs.num_cpus:g} CPU and {needs.num_gpus:g} GPU",
    ]
    return "\n".join(lines)


def run(plan: Plan) -> RunReport:
    """Make every missing shard and publish the manifest. Assumes that `ray.init` was called.

    Raises:
        ValueError: if the folder holds something else or cannot take the result, before any work.
        RuntimeError: if a shard failed twice, naming it and its cause; all others are committed by then.
    """
    started = time.monotonic()
    check_writable(plan.root)
    claim_root(plan.root, plan.kind, plan.identity)
    todo = missing(plan)
    check_writable(plan.root, plan.num_bytes_estimate * len(todo) // max(len(plan.tasks), 1))
    remove_partials(plan.root)
    made = _make(plan, todo)
    remove_partials(plan.root)  # what killed workers left
    manifest = publish_manifest(plan.root, plan.identity, plan.kind, plan.summarize(read_records(plan.root)))
    return RunReport(
        num_rows=sum(record.num_rows for record in made),
        num_shards=len(made),
        num_skipped=len(plan.tasks) - len(made),
        seconds=time.monotonic() - started,
        counts=_total(record.counts for record in made),
        manifest=manifest,
    )


class StartCounter:
    """An actor that outlives the workers and counts how often each shard was begun."""

    def __init__(self) -> None:
        self.starts = Counter[str]()

    def begin(self, task: str) -> int:
        """Count one more start of a task and return how many there were."""
        self.starts[task] += 1
        return self.starts[task]


class ShardWorker:
    """Runs a plan's stage on tasks inside one actor and commits what it makes."""

    def __init__(self, root: str, make_stage: Callable[[], Stage], counter: Any) -> None:
        """Keep the recipe of the stage; it is built for the first task, where a failure can be reported."""
        self.root = root
        self.make_stage = make_stage
        self.counter = counter
        self.stage: Stage | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make one shard; return its record, or the error's text, as JSON."""
        task = ShardTask(**json.loads(row["task"]))
        if ray.get(self.counter.begin.remote(row["task"])) > MAX_STARTS:
            return {"task": row["task"], "record": "", "error": f"its worker process died {MAX_STARTS} times"}
        try:
            self.stage = self.stage or self.make_stage()
            record = self.stage(replace(task, split=Split(task.split)))
            commit_shard(self.root, record)
        except Exception:  # noqa: BLE001 - reported to the driver, which tries again and then fails the job with it
            return {"task": row["task"], "record": "", "error": traceback.format_exc()}
        return {"task": row["task"], "record": json.dumps(record.to_dict()), "error": ""}


def _make(plan: Plan, todo: Sequence[ShardTask]) -> list[ShardRecord]:
    """Make shards, the failed ones once more, and return the records of all."""
    if not todo:
        return []
    num_there = len(plan.tasks) - len(todo)
    counter = ray.remote(num_cpus=0)(StartCounter).remote()
    with ShardProgress(plan.kind, len(plan.tasks), num_there) as progress:
        made, failures = _attempt(plan, todo, counter, progress)
        if failures:
            logger.warning("%d shards failed and are tried again, such as %s", len(failures), failures[0].cause)
            again, failures = _attempt(plan, [failure.task for failure in failures], counter, progress)
            made += again
    if failures:
        raise RuntimeError(_sentence(failures))
    return made


def _attempt(
    plan: Plan, tasks: Sequence[ShardTask], counter: Any, progress: ShardProgress
) -> tuple[list[ShardRecord], list[_Failure]]:
    made: list[ShardRecord] = []
    failures: list[_Failure] = []
    for outcome in _outcomes(plan, tasks, counter):
        if isinstance(outcome, _Failure):
            failures.append(outcome)
        else:
            made.append(outcome)
            progress.advance(outcome.num_rows)
    return made, failures


def _outcomes(plan: Plan, tasks: Sequence[ShardTask], counter: Any) -> Iterator[ShardRecord | _Failure]:
    """Yield what became of each task, as it becomes known."""
    rows = [{"task": json.dumps(asdict(task))} for task in tasks]
    with DataContext.current(_quiet_context()):
        outcomes = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
            ShardWorker,  # type: ignore[arg-type]  # Ray's annotation knows functions only
            fn_constructor_args=(plan.root, plan.make_stage, counter),
            compute=ActorPoolStrategy(size=_num_actors(plan.resources, len(tasks)), max_tasks_in_flight_per_actor=1),
            num_cpus=plan.resources.num_cpus,
            num_gpus=plan.resources.num_gpus,
        )
        for outcome in outcomes.iter_rows():
            if outcome["error"]:
                raw = json.loads(outcome["task"])
                yield _Failure(ShardTask(**raw | {"split": Split(raw["split"])}), outcome["error"])
            else:
                yield ShardRecord.from_dict(json.loads(outcome["record"]))


def _quiet_context() -> DataContext:
    """Return Ray Data's settings with its own bars and banners off: the driver shows its own."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context


def _num_actors(needs: Resources, num_tasks: int) -> int:
    """Return how many workers to start: as asked, else as many as the cluster's CPUs and GPUs hold."""
    if needs.num_actors is not None:
        return min(needs.num_actors, num_tasks)
    held: dict[str, float] = ray.cluster_resources()
    if not held.get("CPU"):  # a head that offers nothing: the workers' nodes are yet to be started for us
        return min(GROWING_ACTORS, num_tasks)
    wanted = {"CPU": needs.num_cpus, "GPU": needs.num_gpus}
    fits = [int(held.get(name, 0) // amount) for name, amount in wanted.items() if amount > 0]
    if not fits or min(fits) < 1:
        raise ValueError(
            f"a worker needs {wanted}, the Ray cluster has {held.get('CPU', 0):g} CPU and {held.get('GPU', 0):g} GPU"
        )
    return min(*fits, num_tasks)


def _sentence(failures: Sequence[_Failure]) -> str:
    named = [
        f"shard {failure.task.split}/{failure.task.name} (from {failure.task.source_name}): "
        + failure.cause.strip().splitlines()[-1]
        for failure in failures[:MAX_ERROR_LINES]
    ]
    first = "\n".join(failures[0].cause.strip().splitlines()[-6:])
    return f"{len(failures)} shards failed twice:\n" + "\n".join(named) + f"\nthe first one ended in:\n{first}"


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for part in counts:
        total.update(part)
    return dict(sorted(total.items()))
