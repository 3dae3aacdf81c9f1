"""What a latent cache is to be: the plan of its shards, its identity, its summary, and who may use it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from ldm.autoencoder.model import Autoencoder
from ldm.conditioning.conditioner import ConditioningConfig, TextUse
from ldm.conditioning.text import TextEncoder, TextEncoderConfig, TextEncoderKind, text_encoder_digest
from ldm.conditioning.text_embedding import embedded_condition, numbered_condition
from ldm.first_stage import load_autoencoder
from ldm.interop.diffusers import weights_digest
from ldm.storage import is_local
from ldm.types import Condition
from pipeline.crops import buckets_of
from pipeline.encode import EncodeStage, picture_config
from pipeline.encoder import torch_device
from pipeline.ingest.geometry import landscape_buckets
from pipeline.ingest.picture import PictureConfig, ResizeMode
from pipeline.latent_config import ColumnsConfig, CropShape, Device, LatentsConfig, TextStorage
from pipeline.latent_summary import summarize
from pipeline.loader import ReadTokens
from pipeline.plan import Plan, Resources, ShardTask
from pipeline.store.manifest import Manifest, load_manifest, shard_path
from pipeline.store.schema import JSON, SCHEMA_VERSION

STORED_DTYPE = "float16"
FORMAT_VERSION = 3
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
    model = load_autoencoder(config.autoencoder)
    _check_sizes(config, model.config.factor, picture_config(config.dataset))
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
    identity = _identity(config, model)
    # The driver of a cluster may have no GPU itself, so a plain "cuda" is only checked in the workers.
    is_on_gpu = config.device is Device.CUDA or torch_device(config.device).type == "cuda"
    return Plan(
        root=config.root,
        kind="latents",
        identity=identity,
        tasks=tasks,
        make_stage=partial(EncodeStage, config, identity["autoencoder"]),
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


def _check_sizes(config: LatentsConfig, factor: int, picture: PictureConfig | None) -> None:
    """Refuse sizes that the dataset's pictures or the autoencoder can't have."""
    where, has_buckets = config.dataset, config.crop.shape is CropShape.BUCKETS
    for size in config.image_sizes:
        if size % factor:
            raise ValueError(f"image_size must be a multiple of {factor}, got {size}")
        if picture is not None and size > picture.image_size:
            raise ValueError(f"image_size {size} is more than the dataset's {picture.image_size} in {where}")
        if has_buckets and size % config.crop.bucket_step:
            raise ValueError(f"image_size must be a multiple of crop.bucket_step {config.crop.bucket_step}, got {size}")
    low_res = config.columns.low_res_factor
    if has_buckets and low_res and config.crop.bucket_step % low_res:
        raise ValueError(f"columns.low_res_factor {low_res} must divide crop.bucket_step {config.crop.bucket_step}")
    if has_buckets and config.crop.bucket_step % factor:
        raise ValueError(f"crop.bucket_step must be a multiple of {factor}, got {config.crop.bucket_step}")
    for size in config.image_sizes if has_buckets else ():
        if len(buckets_of(size, config).landscape()) < 2:
            step = config.crop.bucket_step
            raise ValueError(f"buckets of step {step} at {size} px are only the square: lower crop.bucket_step")
    if picture is None:
        return
    for width, height in landscape_buckets(picture) if picture.resize is ResizeMode.BUCKETS and has_buckets else ():
        wanted = buckets_of(config.image_size, config).nearest(width, height)
        if wanted[0] > width or wanted[1] > height:
            raise ValueError(
                f"pictures in {where} come as {width}x{height}, their nearest bucket is {wanted[0]}x{wanted[1]}: "
                f"take the dataset's crop.bucket_step, {picture.bucket_step}, or a smaller image_size"
            )
    if config.crop.count > 1 and picture.resize in (ResizeMode.CENTRE_CROP, ResizeMode.PAD):
        raise ValueError(
            f"the pictures in {where} are squares: {config.crop.count} crops of one would be the same; make the "
            "dataset with picture.resize short-side"
        )
    if picture.resize is ResizeMode.BUCKETS and not has_buckets:
        shortest = min(height for _, height in landscape_buckets(picture))
        if max(config.image_sizes) > shortest:
            raise ValueError(
                f"the pictures in {where} come in buckets, the flattest {shortest} px high: take crop.shape buckets, "
                f"or an image_size up to {shortest}"
            )


def token_reader(manifest: Manifest, text: TextEncoderConfig, use: TextUse, device: torch.device) -> ReadTokens | None:
    """Return what becomes of captions while a cache is read; None where it holds their embeddings."""
    if not manifest.identity.get("text_storage"):
        return None
    if use is TextUse.NONE:
        return _nothing
    if use is TextUse.TRAINED:
        return partial(numbered_condition, max_tokens=text.max_tokens)
    return partial(embedded_condition, encode=TextEncoder(text, device).encode_tokens, max_tokens=text.max_tokens)


def _nothing(tokens: Sequence[object]) -> Condition:
    """Return what a denoiser is told that hears no captions; no encoder is needed for that."""
    return Condition()


def check_told(conditioning: ConditioningConfig, manifest: Manifest) -> None:
    """Refuse a denoiser that is told what the latents don't hold.

    Raises:
        ValueError: naming the options that make it.
    """
    if conditioning.text is TextUse.TRAINED and not manifest.identity.get("text_storage"):
        raise ValueError("a trained text transformer reads token ids: make the latents with text_storage online")
    if conditioning.has_sizes and conditioning.text is not TextUse.FROZEN:
        raise ValueError(f"has_sizes comes with a frozen encoder's vector, got text {conditioning.text.value}")
    max_tokens = int(manifest.identity["max_tokens"])
    if conditioning.text is TextUse.TRAINED and max_tokens > conditioning.text_transformer.max_tokens:
        raise ValueError(
            f"captions of up to {max_tokens} tokens were cached, "
            f"text_transformer.max_tokens is {conditioning.text_transformer.max_tokens}"
        )
    made = manifest.identity.get("columns", {})
    if conditioning.num_classes and conditioning.num_classes < len(made.get("classes", ())):
        raise ValueError(f"num_classes is {conditioning.num_classes}, the latents have {len(made['classes'])} classes")
    wanted = {
        "class_attribute": bool(conditioning.num_classes),
        "boxes_attribute": conditioning.has_layout,
        "map_member": bool(conditioning.map_classes),
        "low_res_factor": conditioning.has_low_res,
        "num_masks": conditioning.has_masked_image,
    }
    if lacking := [name for name, is_wanted in wanted.items() if is_wanted and not made.get(name)]:
        options = ", ".join(f"columns.{name}" for name in lacking)
        raise ValueError(f"the denoiser is told what the latents don't hold: make them with {options}")


def _identity(config: LatentsConfig, model: Autoencoder) -> dict[str, JSON]:
    # Said only where there is any, so that other latents are what they were before.
    more: dict[str, JSON] = {"pooled": output} if (output := config.text.kind.pooled_output) else {}
    if config.text_storage is not TextStorage.EMBEDDED:
        more["text_storage"] = config.text_storage.value
    if config.columns != ColumnsConfig():
        more["columns"] = config.columns.to_dict()
    return {
        "autoencoder": weights_digest(model.state_dict(), model.config),
        "preprocessing": {
            "image_size": config.image_size,
            "crop": config.crop.to_dict(),
            "scaled_by": "bicubic",
            "range": [-1, 1],
        },
        "text_encoder": text_encoder_digest(config.text),
        "max_tokens": config.text.max_tokens,
        "latent_kind": model.config.latent_kind.value,
        "dtype": STORED_DTYPE,
        "precision": config.precision.value,
        "flip": config.flip,
        "format": FORMAT_VERSION,
        "schema_version": SCHEMA_VERSION,
        **more,
    }


def _bytes_per_row(config: LatentsConfig, model: Autoencoder) -> int:
    forms = (2 if config.flip else 1) * config.crop.count * (1 + config.columns.num_masks)
    places = sum((size // model.config.factor) ** 2 for size in config.image_sizes)
    return 2 * forms * model.config.moment_channels * places + _text_bytes(config) + _TAR_BYTES_PER_ROW


def _text_bytes(config: LatentsConfig) -> int:
    kind = config.text.kind
    tokens = config.text.max_tokens if kind.has_attended_pads else _TOKENS_PER_ROW
    if config.text_storage is TextStorage.ONLINE:
        return 4 * tokens * len(kind.towers)
    return 2 * tokens * _WIDE_TOKENS.get(kind, _TOKEN_WIDTH)
