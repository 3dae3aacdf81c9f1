"""What a latent cache is to be: the plan of its shards, its identity, its summary, and who may use it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ldm.autoencoder.model import Autoencoder
from ldm.conditioning.text import TextEncoderKind, text_encoder_digest
from ldm.interop.diffusers import load_autoencoder, weights_digest
from ldm.storage import is_local
from pipeline.encode import Device, EncodeStage, LatentsConfig, torch_device
from pipeline.moment_statistics import MomentStatistics, merged
from pipeline.plan import Plan, Resources, ShardTask
from pipeline.store.manifest import Manifest, ShardRecord, load_manifest, shard_path
from pipeline.store.schema import JSON, SCHEMA_VERSION, Split

LATENT_KIND = "kl_moments"
STORED_DTYPE = "float16"
FORMAT_VERSION = 2
"""Raised whenever a shard of latents or its record changes its form."""

_TAR_BYTES_PER_ROW = 4096
"""Headers, caption and JSON of a row, each padded to blocks of 512."""
_TOKENS_PER_ROW = 32
"""For the estimate of disk space only: a row's captions without padding, some of them shared with other rows."""
_TOKEN_WIDTH = 768
_WIDE_TOKENS = {TextEncoderKind.CLIP_PROJECTION: 1280, TextEncoderKind.SDXL: 2048, TextEncoderKind.T5: 4096}
"""For the same estimate: widths of the usual encoders of a kind, where they are wider."""


def plan_latents(config: LatentsConfig) -> Plan:
    """Return the plan of a latent cache; `pipeline.run.run` carries it out.

    Raises:
        ValueError: if the dataset is not finished, or autoencoder, image size and dataset do not fit together.
    """
    dataset = load_manifest(config.dataset)
    if dataset.kind != "dataset":
        raise ValueError(f"{config.dataset} holds {dataset.kind}, expected a dataset")
    stored_size = dataset.image_size or config.image_size
    if config.image_size > stored_size:
        raise ValueError(f"image_size {config.image_size} is more than the dataset's {stored_size} in {config.dataset}")
    model = load_autoencoder(config.autoencoder)
    if config.image_size % model.config.factor:
        raise ValueError(f"image_size must be a multiple of {model.config.factor}, got {config.image_size}")
    tasks = tuple(
        ShardTask(
            split=shard.split,
            name=shard.name,
            source_name=shard_path(config.dataset, shard.split, shard.name, "tar"),
            source_digest=shard.files["tar"].sha256,
            num_rows=shard.num_rows,
        )
        for shard in dataset.shards
        if shard.num_rows
    )
    num_rows = sum(task.num_rows for task in tasks)
    # The driver of a cluster may have no GPU itself, so a plain "cuda" is only checked in the workers.
    is_on_gpu = config.device is Device.CUDA or torch_device(config.device).type == "cuda"
    return Plan(
        root=config.root,
        kind="latents",
        identity=_identity(config, model),
        tasks=tasks,
        make_stage=partial(EncodeStage, config),
        resources=Resources(
            num_cpus=config.num_cpus,
            num_gpus=float(is_on_gpu),
            min_actors=config.num_actors or 1,
            max_actors=config.num_actors,
            tasks_at_once=config.shards_at_once or (1 if is_local(config.dataset) and not is_on_gpu else 2),
        ),
        num_rows=num_rows,
        num_bytes_estimate=num_rows * _bytes_per_row(config, model),
        summarize=partial(summarize, dataset_digest=dataset.digest),
    )


def summarize(records: Sequence[ShardRecord], *, dataset_digest: str) -> dict[str, JSON]:
    """Return the manifest's summary: what the latents were made of, and the statistics of all of them together."""
    ordered = sorted(records, key=lambda record: (record.split, record.name))
    statistics = merged([MomentStatistics.from_dict(record.details["statistics"]) for record in ordered])
    figures = [figure for record in ordered for figure in record.details["gate"]["psnr"]]
    shapes = {tuple(record.details["moment_shape"]) for record in ordered}
    if len(shapes) != 1:
        raise ValueError(f"moments of one cache have one shape, got {sorted(shapes)}")
    return {
        "dataset": dataset_digest,
        "mean": statistics.mean.tolist(),
        "std": statistics.std.tolist(),
        "min": statistics.lowest.tolist(),
        "max": statistics.highest.tolist(),
        "num_values_per_channel": statistics.count,
        "num_rows": {split.value: sum(r.num_rows for r in ordered if r.split is split) for split in Split},
        "gate_psnr_mean": sum(figures) / len(figures),
        "num_captions": sum(record.details["num_captions"] for record in ordered),
        "num_truncated": sum(record.details["num_truncated"] for record in ordered),
        **{name: width for name, width in ordered[0].details.items() if name in ("text_width", "pooled_width")},
        "moment_shape": list(shapes.pop()),
    }


def check_latents(manifest: Manifest, autoencoder_digest: str, text_digest: str) -> None:
    """Refuse latents that another autoencoder or text encoder made.

    Raises:
        ValueError: showing both digests.
    """
    if manifest.kind != "latents":
        raise ValueError(f"expected a manifest of latents, got one of kind {manifest.kind!r}")
    for name, given in (("autoencoder", autoencoder_digest), ("text_encoder", text_digest)):
        made_with = manifest.identity[name]
        if made_with != given:
            raise ValueError(f"these latents were made with {name} {made_with}, the one given is {given}")


def _identity(config: LatentsConfig, model: Autoencoder) -> dict[str, JSON]:
    # Said only where there is one, so that latents of other text encoders are what they were before there were any.
    pooled: dict[str, JSON] = {"pooled": output} if (output := config.text.kind.pooled_output) else {}
    return {
        "autoencoder": weights_digest(model.state_dict(), model.config),
        "preprocessing": {"image_size": config.image_size, "crop": "center", "range": [-1, 1]},
        "text_encoder": text_encoder_digest(config.text),
        "max_tokens": config.text.max_tokens,
        "latent_kind": LATENT_KIND,
        "dtype": STORED_DTYPE,
        "precision": config.precision.value,
        "flip": config.flip,
        "format": FORMAT_VERSION,
        "schema_version": SCHEMA_VERSION,
        **pooled,
    }


def _bytes_per_row(config: LatentsConfig, model: Autoencoder) -> int:
    side = config.image_size // model.config.factor
    forms = 2 if config.flip else 1
    kind = config.text.kind
    tokens = config.text.max_tokens if kind.has_attended_pads else _TOKENS_PER_ROW
    width = _WIDE_TOKENS.get(kind, _TOKEN_WIDTH)
    return 2 * (forms * model.config.moment_channels * side**2 + tokens * width) + _TAR_BYTES_PER_ROW
