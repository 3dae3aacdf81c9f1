"""What tars of pictures a file of prompts comes to: the plan of its shards, its identity, and its verification.

Shards are cut by a fixed number of rows, and a shard that is there keeps its rows: prompts that are added at the end of
the file go into new shards, also where the last one was not full.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from ldm.conditioning.conditioner import ConditioningConfig
from ldm.drawing import Given, checked_size
from ldm.model_card import find_model, load_card, model_digest
from ldm.model_sizes import ModelSizes, model_sizes
from ldm.request_table import PROMPT
from ldm.storage import join, list_names, remove_file
from pipeline.encoder import torch_device
from pipeline.generate import NUM_CUT, GenerateStage, RowRange, deciding
from pipeline.generate_config import GenerateConfig
from pipeline.latent_config import Device
from pipeline.plan import Plan, Resources, ShardTask, missing
from pipeline.prompt_admission import prompt_table
from pipeline.prompts import Survey
from pipeline.store.manifest import ShardRecord, claim_root, count_by_split, load_manifest, read_records
from pipeline.store.schema import JSON, SCHEMA_VERSION, Split
from pipeline.store.verification import Verification, verify_shards

logger = logging.getLogger(__name__)

KIND = "generated"
FORMAT_VERSION = 1
"""Raised whenever a shard of pictures or its record changes its form."""
SPLIT = Split.TRAIN
_BYTES_BESIDE_PICTURE = 4096
"""Headers, words and JSON of a picture, each padded to blocks of 512."""
_SHOWN = 3

Range = tuple[int, int]
"""Rows [start, stop) of all files together."""


def plan_generate(config: GenerateConfig) -> Plan:
    """Return the plan of the tars; `pipeline.run.run` carries it out.

    Raises:
        ValueError: if there is no such model, no row can be drawn, or the folder holds pictures of other prompts.
    """
    config = identified(config)
    folder = find_model(config.model, config.model_digest)
    card = load_card(folder)
    sizes = model_sizes(folder, card)
    survey = prompt_table(config, card.conditioning).survey(config.prompts)
    _check_rows(survey, config, card.conditioning, sizes)
    records = read_records(config.bulk.root)
    ranges = _ranges(survey, config, records)
    tasks = tuple(_task(survey, config, number, rows) for number, rows in enumerate(ranges))
    num_pictures = survey.num_rows * config.bulk.images_per_prompt
    pixels = (config.drawing.height or sizes.trained[0]) * (config.drawing.width or sizes.trained[1])
    is_on_gpu = config.bulk.device is Device.CUDA or torch_device(config.bulk.device).type == "cuda"
    names = {task.name for task in tasks}
    return Plan(
        root=config.bulk.root,
        kind=KIND,
        identity=_identity(config),
        tasks=tasks,
        make_stage=partial(GenerateStage, config),
        resources=Resources(
            num_cpus=config.bulk.num_cpus,
            num_gpus=float(is_on_gpu),
            min_actors=config.bulk.num_actors or 1,
            max_actors=config.bulk.num_actors,
        ),
        num_rows=survey.num_rows,
        num_bytes_estimate=num_pictures * (2 * pixels + _BYTES_BESIDE_PICTURE),
        summarize=partial(summarize, num_prompts=survey.num_rows),
        facts={"prompts": survey.digest(0, survey.num_rows)},
        prepare=partial(_remove_left_over, config.bulk.root, [r for r in records if r.name not in names]),
    )


def identified(config: GenerateConfig) -> GenerateConfig:
    """Return the configuration with the digest of the model that lies there, where it names none."""
    return replace(config, model_digest=config.model_digest or model_digest(load_card(config.model)))


def summarize(records: Sequence[ShardRecord], *, num_prompts: int) -> dict[str, JSON]:
    """Return the manifest's summary: rows that went in, and pictures by what became of them."""
    num_cut = sum(int(record.details.get(NUM_CUT, 0)) for record in records)
    return {"num_prompts": num_prompts, NUM_CUT: num_cut, "counts": count_by_split(records)}


def verify_generated(config: GenerateConfig) -> Verification:
    """Read finished tars back and return what is wrong with them.

    Raises:
        ValueError: if there are none, or they were made otherwise than `config` says.
    """
    load_manifest(config.bulk.root)
    plan = plan_generate(config)
    claim_root(plan.root, plan.kind, plan.identity)
    found = verify_shards(plan.root)
    lacking = [f"{task.split.value}/{task.name}: rows of {config.prompts} that are not drawn" for task in missing(plan)]
    return replace(found, problems=(*found.problems, *lacking))


def _identity(config: GenerateConfig) -> dict[str, JSON]:
    bulk = config.bulk
    return {
        **deciding(config),
        "images_per_prompt": bulk.images_per_prompt,
        "carry": list(bulk.carry),
        "shard_rows": bulk.shard_rows,
        "batch_size": bulk.batch_size,
        "image_format": bulk.image_format.value,
        "quality": bulk.quality,
        "format": FORMAT_VERSION,
        "schema_version": SCHEMA_VERSION,
    }


def _task(survey: Survey, config: GenerateConfig, number: int, rows: Range) -> ShardTask:
    start, stop = rows
    repeats = {place: int(count) for place, count in enumerate(survey.repeats[start:stop]) if count}
    payload = RowRange(first=start, pieces=tuple(survey.pieces(start, stop)), repeats=repeats)
    return ShardTask(
        split=SPLIT,
        name=f"{number:06d}",
        source_name=f"rows {start} to {stop} of {config.prompts}",
        source_digest=survey.digest(start, stop),
        num_rows=stop - start,
        payload=payload.to_json(),
    )


def _ranges(survey: Survey, config: GenerateConfig, records: Sequence[ShardRecord]) -> list[Range]:
    """Return the rows of each shard.

    Raises:
        ValueError: if shards that are there were made of rows that the file does not have any more.
    """
    ranges = cut_rows(survey.num_rows, config.bulk.shard_rows, {} if config.bulk.replaces else _kept_ranges(records))
    if config.bulk.replaces:
        return ranges
    digest_of_shard = {f"{number:06d}": survey.digest(*rows) for number, rows in enumerate(ranges)}
    changed = [record.name for record in records if digest_of_shard.get(record.name) != record.source]
    if changed:
        more = ", ..." if len(changed) > _SHOWN else ""
        raise ValueError(
            f"{config.bulk.root} holds pictures of other prompts than {config.prompts} has: {len(changed)} of its "
            f"{len(records)} tars ({', '.join(changed[:_SHOWN])}{more}). Rows can be added at the end; else choose "
            "another --bulk.root, or draw those tars anew with --bulk.replaces"
        )
    return ranges


def cut_rows(num_rows: int, shard_rows: int, kept: Mapping[int, Range]) -> list[Range]:
    """Return ranges of rows, each of `shard_rows`: those that are kept stay as they are, and no other reaches into one.

    Args:
        num_rows: rows of the file.
        shard_rows: rows of a new range.
        kept: ranges that are there, by their number.
    """
    begins = [*sorted(start for start, _ in kept.values() if start < num_rows), num_rows]
    ranges: list[Range] = []
    start = 0
    while start < num_rows:
        there = kept.get(len(ranges))
        limit = begins[bisect_right(begins, start)]
        stop = there[1] if there is not None and there[0] == start else min(start + shard_rows, limit)
        ranges.append((start, min(stop, num_rows)))
        start = ranges[-1][1]
    return ranges


def _kept_ranges(records: Sequence[ShardRecord]) -> dict[int, Range]:
    found = {}
    for record in records:
        first = int(record.details["first_row"])
        found[int(record.name)] = (first, first + int(record.details["num_source_rows"]))
    return found


def _check_rows(survey: Survey, config: GenerateConfig, told: ConditioningConfig, sizes: ModelSizes) -> None:
    """Refuse what no row of the file could be drawn with.

    Raises:
        ValueError: naming it.
    """
    num_drawable = survey.filled.get(PROMPT, 0)
    counts = ", ".join(f"{reason} {count}" for reason, count in survey.rejects.items())
    if not num_drawable:
        raise ValueError(f"none of the {survey.num_rows} rows of {config.prompts} can be drawn: {counts}")
    given = {**survey.filled, "mask": survey.filled.get("mask", 0) + survey.filled.get("margins", 0)}
    needed = {
        "class_id": told.num_classes > 0,
        "layout": told.has_layout,
        "semantic_map": told.map_classes > 0,
        "small": told.has_low_res,
        "mask": told.has_masked_image,
    }
    if survey.rejects:
        logger.warning("rows of %s that can't be drawn: %s", config.prompts, counts)
    if lacking := [name for name, is_needed in needed.items() if is_needed and not given.get(name)]:
        raise ValueError(f"the model is told {', '.join(lacking)}, and no row of {config.prompts} has that column")
    idle = [name for name in needed if name != "mask" and not needed[name] and survey.filled.get(name) == num_drawable]
    if idle:
        raise ValueError(f"the model is not told {', '.join(idle)}, and every row of {config.prompts} has that column")
    if min(survey.filled.get(side, 0) for side in ("height", "width")) < num_drawable:
        checked_size(config.drawing, Given(), sizes.trained, sizes.multiple)


def _remove_left_over(root: str, records: Sequence[ShardRecord], _: Sequence[ShardTask]) -> None:
    """Delete shards that are no part of the plan any more."""
    for path in _paths_of(root, records):
        remove_file(path)


def _paths_of(root: str, records: Sequence[ShardRecord]) -> Iterator[str]:
    """Yield the files of shards, their records first: a shard without one does not exist."""
    places = {(record.split, record.name) for record in records}
    folders = {split: list_names(join(root, split.value)) for split, _ in places}
    for split, shard in sorted(places):
        names = [name for name in folders[split] if name.startswith(f"{shard}.")]
        yield from (join(root, split.value, name) for name in sorted(names, key=lambda name: "record" not in name))
