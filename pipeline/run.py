"""Mapping a stage over shards with Ray Data: only what is missing, each shard committed where it was made.

Order: claim the folder → drop what interrupted writers left → map the missing tasks over a pool of actors (each builds
its stage once; each commits its own shards) → try failed shards twice more → publish the manifest.
The driver holds no data: it may die at any moment, and the same command goes on from the shards that are there.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.context import ShuffleStrategy
from ray.exceptions import RayError

from ldm.storage import check_writable, exists, read_text, remove_partials
from pipeline.effort import Effort, TimedStage, WorkByWorker
from pipeline.plan import Plan, Resources, ShardTask, Stage, missing
from pipeline.progress import ShardProgress
from pipeline.starts import StartCounter, Turns
from pipeline.store.manifest import (
    RECORD_SUFFIX,
    Manifest,
    ShardRecord,
    claim_root,
    commit_shard,
    publish_manifest,
    read_records,
    shard_path,
)
from pipeline.store.schema import Split

MAX_BLOCKS = 1 << 14
"""Tasks are handed out in at most this many pieces: each costs the driver a millisecond and some memory."""
NUM_ATTEMPTS = 3
"""Times that a shard is tried before it fails the job; the later ones when everything else is done."""
MAX_STARTS = 4
"""Times that one shard may be begun: Ray begins it again whenever its process dies, even if the shard kills it."""
MAX_ERROR_LINES = 3
"""Failed shards named in the error, beyond which they are only counted."""
GROWING_ACTORS = 8
"""Workers asked for where the cluster has none yet and grows by what is asked."""
LABEL_SHARE = 0.001
"""How much of a node's label one worker takes: the label chooses nodes and limits nothing."""
GROUP = "group"
"""Column of a spread table by which rows come together."""

logger = logging.getLogger(__name__)


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
        work: what the workers did, where the stage says so.
    """

    num_rows: int
    num_shards: int
    num_skipped: int
    seconds: float
    counts: Mapping[str, int]
    manifest: Manifest
    work: WorkByWorker = field(default_factory=WorkByWorker)


@dataclass(frozen=True, slots=True)
class _Failure:
    """A shard that could not be made, and the last lines of why."""

    task: ShardTask
    cause: str


def run(plan: Plan) -> RunReport:
    """Make every missing shard and publish the manifest. Assumes that `ray.init` was called.

    Raises:
        ValueError: if the folder holds something else or cannot take the result, before any work.
        RuntimeError: if a shard failed three times, naming it and its cause; all others are committed by then.
    """
    started = time.monotonic()
    check_writable(plan.root)
    claim_root(plan.root, plan.kind, plan.identity)
    todo = missing(plan)
    check_writable(plan.root, plan.estimate(todo))
    remove_partials(plan.root)
    if plan.prepare is not None:
        plan.prepare(todo)
    work = WorkByWorker()
    made = make(plan, todo, work=work)
    remove_partials(plan.root)  # what killed workers left
    manifest = _publish(plan)
    if plan.finish is not None:
        plan.finish()
    return RunReport(
        num_rows=sum(record.num_rows for record in made),
        num_shards=len(made),
        num_skipped=len(plan.tasks) - len(made),
        seconds=time.monotonic() - started,
        counts=_total(record.counts for record in made),
        manifest=manifest,
        work=work,
    )


def make(plan: Plan, todo: Sequence[ShardTask], title: str = "", work: WorkByWorker | None = None) -> list[ShardRecord]:
    """Make and commit shards, the failed ones twice more, and return the records of all.

    Args:
        plan: where, and by what.
        todo: the shards.
        title: what a person reads beside the progress; the plan's kind by default.
        work: adds up what the shards took, where the stage says so.

    Raises:
        RuntimeError: as `run`.
    """
    if not todo:
        return []
    # Its process may die like any other; a new one counts from nought, which costs a deadly shard a few more tries.
    counter = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(StartCounter).remote()
    made: list[ShardRecord] = []
    failures = [_Failure(task, "") for task in todo]
    num_there = len(plan.tasks) - len(todo)
    with ShardProgress(title or plan.kind, len(plan.tasks), num_there, work=work) as progress:
        for attempt in range(NUM_ATTEMPTS):
            done, failures = _attempt(plan, [failure.task for failure in failures], counter, progress)
            made += done
            if not failures:
                return made
            if attempt + 1 < NUM_ATTEMPTS:
                logger.warning("%d shards failed and are tried again, such as %s", len(failures), failures[0].cause)
    raise RuntimeError(_sentence(failures))


def shuffle(
    tables: Sequence[pa.Table],
    spread: Callable[[pa.Table, int], pa.Table],
    gather: Callable[[pa.Table], pa.Table],
    num_groups: int,
) -> Iterator[pa.Table]:
    """Yield `gather` of the rows of each group that `spread` put them into, in no fixed order, by Ray.

    Args:
        tables: read one at a time in the workers, so a sequence that opens files by index holds nothing.
        spread: adds the column GROUP to a table's rows.
        gather: what becomes of all rows of one group.
        num_groups: how many groups there are; a worker holds a few of them at once.
    """

    def spread_one(row: pa.Table) -> pa.Table:
        return spread(tables[row["table"][0].as_py()], num_groups)

    with DataContext.current(_quiet_context()):
        groups = (
            ray.data.from_items([{"table": number} for number in range(len(tables))])
            .map_batches(spread_one, batch_size=1, batch_format="pyarrow", zero_copy_batch=True)
            .groupby(GROUP)
            .map_groups(gather, batch_format="pyarrow")
        )
        for batch in groups.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(batch, pa.Table)
            if batch.num_rows:
                yield batch


class ShardWorker:
    """Runs a plan's stage on tasks inside one actor, on one or more threads, and commits what it makes."""

    def __init__(self, root: str, make_stage: Callable[[], Stage], counter: Any) -> None:
        """Keep the recipe of the stage; it is built for the first task, where a failure can be reported."""
        self.root = root
        self.make_stage = make_stage
        self.counter = counter
        self.stage: Stage | None = None
        self.building = Lock()
        self.turns = Turns()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make one shard; return its record and what it took, or the error's text, as JSON."""
        try:
            is_suspect = ray.get(self.counter.count.remote(row["task"])) > 0
            with self.turns.alone() if is_suspect else self.turns.together():
                num_starts = ray.get(self.counter.begin.remote(row["task"]))
                if num_starts > MAX_STARTS:
                    return _outcome(row["task"], error=f"its worker process died {MAX_STARTS} times")
                return self._made(row["task"], has_begun_before=num_starts > 1)
        except Exception:  # noqa: BLE001 - reported to the driver, which tries again and then fails the job with it
            return _outcome(row["task"], error=traceback.format_exc())

    def built(self) -> Stage:
        """Return the stage, which the first thread builds."""
        with self.building:
            self.stage = self.stage or self.make_stage()
            return self.stage

    def _made(self, text: str, *, has_begun_before: bool) -> dict[str, Any]:
        task = _task_of(text)
        record = self._committed(task) if has_begun_before else None
        if record is not None:
            return _outcome(text, record)
        stage = self.built()
        begun = time.time()
        record = stage(task)
        commit_shard(self.root, record)
        if not isinstance(stage, TimedStage):
            return _outcome(text, record)
        timers = stage.take_timers(task)
        effort = Effort(
            worker=f"{platform.node()} {os.getpid()}",
            begun=begun,
            ended=time.time(),
            num_rows=record.num_rows,
            num_bytes=record.num_bytes,
            busy_seconds=timers.busy_seconds,
            wait_seconds=timers.wait_seconds,
        )
        return _outcome(text, record, effort)

    def _committed(self, task: ShardTask) -> ShardRecord | None:
        """Return the shard's record if an earlier start of the same task came as far as its commit."""
        path = shard_path(self.root, task.split, task.name, RECORD_SUFFIX)
        if not exists(path):
            return None
        record = ShardRecord.from_dict(json.loads(read_text(path)))
        is_whole = all(exists(shard_path(self.root, task.split, task.name, suffix)) for suffix in record.files)
        return record if is_whole and record.source == task.source_digest else None


def _outcome(
    task: str, record: ShardRecord | None = None, effort: Effort | None = None, error: str = ""
) -> dict[str, str]:
    """Return a row of the outcomes; what the shard took stands beside its record, which is the same whoever made it."""
    return {
        "task": task,
        "record": json.dumps(record.to_dict()) if record else "",
        "effort": json.dumps(effort.to_dict()) if effort else "",
        "error": error,
    }


def _publish(plan: Plan) -> Manifest:
    """Publish the manifest of the plan's shards, all of which must be there by now."""
    wanted = {(task.split, task.name) for task in plan.tasks}
    records = [record for record in read_records(plan.root) if (record.split, record.name) in wanted]
    lost = wanted - {(record.split, record.name) for record in records}
    if lost:
        split, name = min(lost)
        raise RuntimeError(f"{len(lost)} shards that were made are not there any more, such as {split.value}/{name}")
    identity = {**plan.identity, **(plan.facts or {})}
    return publish_manifest(plan.root, identity, plan.kind, plan.summarize(records), records)


def _attempt(
    plan: Plan, tasks: Sequence[ShardTask], counter: Any, progress: ShardProgress
) -> tuple[list[ShardRecord], list[_Failure]]:
    """Try each task once; a task of which nothing was heard has failed as well."""
    made: dict[ShardTask, ShardRecord] = {}
    causes: dict[ShardTask, str] = {}
    silence = "its outcome never came back"
    try:
        for outcome in _outcomes(plan, tasks, counter):
            task = _task_of(outcome["task"])
            if outcome["error"]:
                causes[task] = outcome["error"]
                continue
            record = made[task] = ShardRecord.from_dict(json.loads(outcome["record"]))
            effort = Effort(**json.loads(outcome["effort"])) if outcome["effort"] else None
            progress.advance(record.num_rows, record.counts, effort)
    except RayError as error:
        silence = f"Ray gave up: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    failures = [_Failure(task, causes.get(task, silence)) for task in tasks if task not in made]
    return list(made.values()), failures


def _outcomes(plan: Plan, tasks: Sequence[ShardTask], counter: Any) -> Iterator[dict[str, str]]:
    """Yield what became of each task, a row as `_outcome` gives it, as it becomes known."""
    needs = plan.resources
    rows = [{"task": json.dumps(asdict(task))} for task in tasks]
    with DataContext.current(_quiet_context()):
        outcomes = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
            ShardWorker,  # type: ignore[arg-type]  # Ray's annotation knows functions only
            fn_constructor_args=(plan.root, plan.make_stage, counter),
            compute=_pool(needs, len(tasks)),
            num_cpus=needs.num_cpus,
            num_gpus=needs.num_gpus,
            resources={needs.label: LABEL_SHARE} if needs.label else {},
        )
        yield from outcomes.iter_rows()


def _task_of(text: str) -> ShardTask:
    raw = json.loads(text)
    return ShardTask(**raw | {"split": Split(raw["split"])})


def _quiet_context() -> DataContext:
    """Return Ray Data's settings with its own bars and banners off: the driver shows its own."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A worker that has as many tasks as it does at once is full; by default Ray adds one only when tasks queue up too.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    # Tasks that spill to disk, in place of one long-lived process for each of 200 partitions.
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    return context


def _pool(needs: Resources, num_tasks: int) -> ActorPoolStrategy:
    """Return a pool that begins as large as fits now, and grows and shrinks between what was asked.

    Raises:
        ValueError: if not one worker fits into the cluster, and nobody said that it will grow.
    """
    fits = _num_fitting(needs)
    if needs.max_actors is None and fits < 1:
        wanted = _wanted(needs)
        has = " and ".join(f"{ray.cluster_resources().get(name, 0):g} {name}" for name in wanted)
        raise ValueError(f"a worker needs {wanted}, the Ray cluster has {has}")
    largest = min(needs.max_actors or fits, num_tasks)
    smallest = min(needs.min_actors, largest)
    # The first worker that is up is given all that it does at once, so where tasks are few each gets its share only.
    at_once = min(needs.tasks_at_once, max(1, num_tasks // largest))
    return ActorPoolStrategy(
        min_size=smallest,
        max_size=largest,
        initial_size=min(largest, max(smallest, fits)),
        max_tasks_in_flight_per_actor=at_once,
        max_concurrent_calls_per_actor=at_once,
        enable_true_multi_threading=at_once > 1,
    )


def _num_fitting(needs: Resources) -> int:
    """Return how many workers the cluster's nodes hold as they are."""
    held: dict[str, float] = ray.cluster_resources()
    if not held.get("CPU"):  # a head that offers nothing: the workers' nodes are yet to be started for us
        return GROWING_ACTORS
    fits = [int(held.get(name, 0) / amount + 1e-9) for name, amount in _wanted(needs).items() if amount > 0]
    return min(fits)


def _wanted(needs: Resources) -> dict[str, float]:
    label = {needs.label: LABEL_SHARE} if needs.label else {}
    return {"CPU": needs.num_cpus, "GPU": needs.num_gpus} | label


def _sentence(failures: Sequence[_Failure]) -> str:
    named = [
        f"shard {failure.task.split}/{failure.task.name} (from {failure.task.source_name}): "
        + failure.cause.strip().splitlines()[-1]
        for failure in failures[:MAX_ERROR_LINES]
    ]
    first = "\n".join(failures[0].cause.strip().splitlines()[-6:])
    lines = [f"{len(failures)} shards failed {NUM_ATTEMPTS} times:", *named, "the first one ended in:", first]
    return "\n".join(lines)


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for part in counts:
        total.update(part)
    return dict(sorted(total.items()))
