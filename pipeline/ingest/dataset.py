"""Making a dataset: what its journal lacks is made, then what the source has that the journal has not seen is planned.

Order of one run: finish every planned shard that is missing → ask the source for rows that no generation covers (or,
where asked: rows that failed, shards that other filters change) → append them to the journal as a generation → make its
shards (through `staging/` where copies are looked for) → publish the manifest → remove what was dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ldm.storage import exists, join, list_names, remove_file, remove_folder
from pipeline.ingest.config import DatasetConfig
from pipeline.ingest.growth import (
    SUPERSEDES,
    dropping,
    journal_filters,
    new_generation,
    refiltering,
    retry_generation,
)
from pipeline.ingest.page import ledger_path
from pipeline.ingest.retrying import Retry
from pipeline.ingest.settling import LedgerPlace, SettledStage, find_fallen
from pipeline.ingest.stage import IngestStage, task_of
from pipeline.ingest.transforms import ImageFormat
from pipeline.plan import Plan, Resources, ShardTask, missing
from pipeline.run import RunReport, make, run, shuffle
from pipeline.sources.dataset import FinishedDatasetConfig
from pipeline.sources.source import Source
from pipeline.store.journal import Generation, Journal, append_generation, place, read_journal
from pipeline.store.manifest import ShardRecord, load_manifest, read_records
from pipeline.store.schema import JSON, Split

STAGING = "staging"
"""Folder of shards whose copies are still among their rows."""
_BYTES_PER_PIXEL = {ImageFormat.PNG: 1.5, ImageFormat.JPG: 0.6, ImageFormat.WEBP: 0.4}
_TAR_BYTES_PER_ROW = 4096
"""Three headers, a short JSON and a caption, each padded to blocks of 512."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a person wants besides the dataset itself.

    Attributes:
        retry: which failed rows to try again.
        refilter: whether shards may be remade for other filters.
    """

    retry: Retry = Retry.NONE
    refilter: bool = False


@dataclass(frozen=True, slots=True)
class _Outlook:
    """A plan, and whether it is the last one of a run."""

    plan: Plan
    is_last: bool


def plan_dataset(config: DatasetConfig, request: Request | None = None) -> Plan:
    """Return what is to be done next; `pipeline.run.run` carries it out. Nothing is written.

    Raises:
        ValueError: if the source is not there or has no rows, or other filters would change shards.
    """
    return _outlook(config, request or Request()).plan


def make_dataset(
    config: DatasetConfig, request: Request | None = None, runner: Callable[[Plan], RunReport] = run
) -> RunReport:
    """Make all that is missing and all that is new, by `runner`; the report is of both together.

    Raises:
        ValueError: as `plan_dataset` and `run`.
        RuntimeError: as `run`.
    """
    asked = request or Request()
    outlook = _outlook(config, asked)
    report = runner(outlook.plan)
    while not outlook.is_last:
        outlook = _outlook(config, asked)
        report = _joined(report, runner(outlook.plan))
    return report


def summarize(records: Sequence[ShardRecord], *, root: str) -> dict[str, JSON]:
    """Return the manifest's summary: input rows by their latest status for each split, and the journal's digests."""
    totals = {split.value: Counter[str]() for split in Split}
    for record in records:
        totals[record.split.value].update(record.counts)
        totals[record.split.value].subtract(record.details.get(SUPERSEDES, {}))
    counts = {
        split: {status: count for status, count in sorted(total.items()) if count} for split, total in totals.items()
    }
    return {"counts": counts, "plans": list(read_journal(root).digests)}


def _outlook(config: DatasetConfig, request: Request) -> _Outlook:
    """Look at the folder and at the source and say what comes next."""
    journal = read_journal(config.root)
    source: Source = config.source.build()
    there = replace(config, filters=journal_filters(journal, config.filters))
    is_refiltering = config.filters != there.filters
    if is_refiltering and not request.refilter:
        raise ValueError(refiltering(config, journal).sentence(config.root))
    todo = missing(_plan(there, journal, None, source))
    if todo:
        return _Outlook(_plan(there, journal, dropping(there, journal, source, todo), source), is_last=False)
    if is_refiltering:
        return _Outlook(_plan(config, journal, refiltering(config, journal).generation, source), is_last=False)
    if request.retry is not Retry.NONE:
        generation = retry_generation(config, journal, source, request.retry)
    else:
        generation = new_generation(config, journal, source)
    return _Outlook(_plan(config, journal, generation, source), is_last=True)


def _plan(config: DatasetConfig, journal: Journal, generation: Generation | None, source: Source) -> Plan:
    """Return the plan of everything that the journal and one more generation want."""
    if generation is not None:
        journal = Journal((*journal.generations, generation), journal.digests)
    tasks = tuple(task_of(shard, number) for number, shard in journal.shards())
    num_rows = sum(task.num_rows for task in tasks) or sum(source.num_rows(split) or 0 for split in Split)
    bytes_per_row = config.picture.image_size**2 * _BYTES_PER_PIXEL[config.picture.image_format] + _TAR_BYTES_PER_ROW
    staging = join(config.root, STAGING)
    stage = (
        partial(SettledStage, config, staging) if config.duplicates.is_on else partial(IngestStage, config, config.root)
    )
    plan = Plan(
        root=config.root,
        kind="dataset",
        identity=_identity(config),
        tasks=tasks,
        make_stage=stage,
        resources=Resources(
            num_cpus=config.num_cpus,
            min_actors=config.min_actors,
            max_actors=config.max_actors,
            label=config.resource_label,
        ),
        num_rows=num_rows,
        num_bytes_estimate=round(num_rows * bytes_per_row) * (2 if config.duplicates.is_on else 1),
        summarize=partial(summarize, root=config.root),
        facts={"filters": config.filters.to_dict()},
        finish=partial(_clean, config.root, journal.dropped),
    )
    return replace(plan, prepare=partial(_prepare, config, plan, journal, generation))


def _identity(config: DatasetConfig) -> dict[str, JSON]:
    """Return the dataset's identity; pictures that are passed on are what they were made as, not what is configured."""
    identity = config.identity()
    if isinstance(config.source, FinishedDatasetConfig):
        made_as = load_manifest(config.source.folder).identity
        identity |= {name: made_as[name] for name in ("picture", "scrub") if name in made_as}
    return identity


def _prepare(
    config: DatasetConfig, plan: Plan, journal: Journal, generation: Generation | None, todo: Sequence[ShardTask]
) -> None:
    """Append the new generation to the journal; where copies are looked for, stage its shards and find them."""
    if generation is not None:
        append_generation(config.root, generation)
    if not (config.duplicates.is_on and todo):
        return
    staging = join(config.root, STAGING)
    staged = replace(plan, root=staging, tasks=tuple(todo), make_stage=partial(IngestStage, config, staging))
    make(staged, missing(staged), title="staged")
    records = [*read_records(config.root), *read_records(staging)]
    places = _ledger_places(config.root, staging, journal, {place(task.split, task.name) for task in todo})
    find_fallen(config, staging, places, sum(record.num_rows for record in records), shuffle)


def _ledger_places(root: str, staging: str, journal: Journal, staged: Container[str]) -> list[LedgerPlace]:
    """Return where the ledger of each shard lies, and of which generation its rows are."""
    planned_in = {place(s.split, s.name): each.number for each in journal.generations for s in each.shards}
    places: list[LedgerPlace] = []
    for generation, shard in journal.shards():
        here = place(shard.split, shard.name)
        if here not in staged:
            places.append(LedgerPlace(root=root, place=here, generation=generation))
            continue
        places.append(
            LedgerPlace(
                root=staging,
                place=here,
                generation=planned_in[here],
                amends=shard.amends if exists(ledger_path(root, shard.amends)) else "",
                amended_generation=generation,
                amended_root=root,
            )
        )
    return places


def _clean(root: str, dropped: Collection[str]) -> None:
    """Remove what is no part of the finished dataset: staged shards, and shards that others replaced."""
    if list_names(join(root, STAGING)):
        remove_folder(join(root, STAGING))
    for split in Split if dropped else ():
        for name in list_names(join(root, split.value)):
            if place(split, name.partition(".")[0]) in dropped:
                remove_file(join(root, split.value, name))


def _joined(first: RunReport, second: RunReport) -> RunReport:
    """Return the report of two runs, one after the other."""
    return RunReport(
        num_rows=first.num_rows + second.num_rows,
        num_shards=first.num_shards + second.num_shards,
        num_skipped=second.num_skipped - first.num_shards,
        seconds=first.seconds + second.seconds,
        counts=dict(sorted((Counter(first.counts) + Counter(second.counts)).items())),
        manifest=second.manifest,
    )
