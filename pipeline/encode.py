"""Dataset shards → latent shards: raw posterior moments and text embeddings, checked before they are published.

Order for each shard: rows of the dataset's tar → centre crops → encoder → fp16 moments → gate (non-finite and saturated
values counted, some rows decoded again and compared) → distinct captions embedded → tar, index, text table → record.
Dropout, flips and the choice of a caption are no part of this: they are drawn when rows are loaded.

Letters: b batch, m moment channel, h latent row, w latent column, y pixel row, x pixel column.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16
from torch import Tensor

from ldm.autoencoder.model import Autoencoder
from ldm.autoencoder.regularizer import mode
from ldm.conditioning.text import TextEncoder, TextEncoderConfig, TextEncoderKind, text_encoder_digest
from ldm.config import Config
from ldm.evaluation.scores import psnr
from ldm.interop.diffusers import load_autoencoder, weights_digest
from ldm.storage import write_bytes
from ldm.types import Image, Moments
from pipeline.images import Pixels, decode_pixels, image_of_pixels, image_suffix
from pipeline.latent_shard import FLIPPED_MOMENTS, MOMENTS, npy_bytes
from pipeline.moment_statistics import MomentStatistics, merged, statistics_of
from pipeline.plan import Plan, Resources, ShardTask
from pipeline.prefetch import prefetched
from pipeline.store.manifest import FileRecord, Manifest, ShardRecord, load_manifest, shard_path
from pipeline.store.schema import JSON, SCHEMA_VERSION, Row, Split
from pipeline.store.shards import read_rows, write_shard
from pipeline.text_table import distinct_captions, table_bytes

LATENT_KIND = "kl_moments"
STORED_DTYPE = "float16"
LARGEST_STORED = float(np.finfo(np.float16).max)
TEXT_SUFFIX = "text.safetensors"
MAX_LISTED = 5

_TAR_BYTES_PER_ROW = 4096
"""Headers, caption and JSON of a row, each padded to blocks of 512."""
_TOKENS_PER_ROW = 32
"""For the estimate of disk space only: a row's captions without padding, some of them shared with other rows."""
_TOKEN_WIDTH = 768
_WIDE_TOKENS = {TextEncoderKind.CLIP_PROJECTION: 1280, TextEncoderKind.SDXL: 2048, TextEncoderKind.T5: 4096}
"""For the same estimate: widths of the usual encoders of a kind, where they are wider."""
_LARGEST_PSNR = 200.0
"""An exact reconstruction has an infinite one, which JSON cannot hold."""

Moments16 = Float16[np.ndarray, "b m h w"]


class Device(StrEnum):
    """Where the encoder runs."""

    CPU = "cpu"
    CUDA = "cuda"
    AUTO = "auto"
    """A GPU where the job is started on a machine that has one."""


class Precision(StrEnum):
    """Number format of the encoder's arithmetic; weights stay float32."""

    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsConfig(Config):
    """A cache of latents, made from a dataset by a frozen autoencoder and a frozen text encoder."""

    root: str
    """Folder or URL that the latents are written to."""
    dataset: str
    """Folder or URL of the finished dataset."""
    autoencoder: str
    """Folder or URL of the autoencoder, in the layout of diffusers."""
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """Which text encoder embeds the captions."""
    image_size: int
    """Side of the centre crop in pixels; a multiple of the autoencoder's factor, at most the dataset's size."""
    batch_size: int = 32
    """Images encoded at once."""
    gate_rows: int = 8
    """Rows of each shard that are decoded again and compared with their crops."""
    gate_min_psnr: float = 15.0
    """Least mean PSNR of those rows, in decibels; a shard below it fails."""
    device: Device = Device.AUTO
    """Where the encoder runs."""
    precision: Precision = Precision.FP32
    """Number format of the encoder's arithmetic."""
    flip: bool = False
    """Whether the moments of mirrored images are stored too, so that flips can be drawn when rows are loaded."""
    num_cpus: float = 1.0
    """CPUs of one worker."""
    num_actors: int | None = None
    """Workers at once; none for as many as the cluster holds."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "gate_rows", "num_cpus"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.num_actors is not None and self.num_actors < 1:
            raise ValueError(f"num_actors must be at least 1, got {self.num_actors}")


class EncodeStage:
    """Makes the shards of one latent cache; built once in each worker."""

    def __init__(self, config: LatentsConfig) -> None:
        """Load both networks and take the worker's share of CPUs."""
        num_threads = max(1, int(config.num_cpus))
        torch.set_num_threads(num_threads)
        self.config = config
        self._device = _torch_device(config.device)
        self._autoencoder = load_autoencoder(config.autoencoder).requires_grad_(False).eval().to(self._device)
        self._text = TextEncoder(config.text, self._device)
        # Alone in its batch, so that every shard holds the same bytes for the null condition.
        self._null_embedding = self._text.encode([""])[0]
        self._decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Publish a shard's tar, index and text table and return their record.

        Raises:
            ValueError: if the shard fails its gate, naming rows and figures; nothing is published then.
        """
        rows = list(read_rows(task.source_name))
        if not rows or len(rows) != task.num_rows:
            raise ValueError(f"{task.source_name} has {len(rows)} rows, its manifest says {task.num_rows}")
        moments = self._moments(task, rows)
        gate_rows, gate_psnr = self._gate(task, rows, moments[0])
        facts = [json.loads(row["json"]) for row in rows]
        captions = [tuple(fact["captions"]) or ("",) for fact in facts]
        distinct = distinct_captions(captions)
        number_of_caption = {caption: number for number, caption in enumerate(distinct)}
        choices = [[number_of_caption[caption] for caption in row] for row in captions]
        embeddings = [self._null_embedding, *self._text.encode(distinct[1:])]
        members = map(self._members, rows, facts, captions, choices, zip(*moments, strict=True))
        files = write_shard(self.config.root, task.split, task.name, members)
        files[TEXT_SUFFIX] = self._write_text(task, table_bytes(distinct, embeddings, choices))
        return ShardRecord(
            name=task.name,
            split=task.split,
            num_rows=len(rows),
            files=files,
            counts={"ok": len(rows)},
            source=task.source_digest,
            details={
                "statistics": statistics_of(moments[0]).to_dict(),
                "gate": {"rows": gate_rows, "psnr": gate_psnr},
                "moment_shape": list(moments[0].shape[1:]),
                **self._text_widths(),
                "num_captions": len(distinct),
                "num_truncated": self._text.count_truncated(distinct),
            },
        )

    def _moments(self, task: ShardTask, rows: Sequence[Row]) -> list[Moments16]:
        """Return stored moments of all rows: plain, then (where the config asks for them) of their mirror images."""
        step = self.config.batch_size
        batches = (rows[start : start + step] for start in range(0, len(rows), step))
        forms: list[list[Tensor]] = [[], []] if self.config.flip else [[]]
        for images in prefetched(self._images, batches, 2, lambda seconds: None):
            for parts, form in zip(forms, (images, images.flip(-1)), strict=False):
                parts.append(self._encoded(form))
        return [self._storable(task, rows, torch.cat(parts)) for parts in forms]

    def _storable(self, task: ShardTask, rows: Sequence[Row], moments: Moments) -> Moments16:
        """Return moments as fp16, or refuse those that hold what fp16 or arithmetic cannot."""
        found = {
            "NaN": moments.isnan(),
            "infinite": moments.isinf(),
            "saturated": moments.isfinite() & (moments.abs() > LARGEST_STORED),
        }
        counts = {name: int(where.sum()) for name, where in found.items()}
        if any(counts.values()):
            is_bad = torch.stack(list(found.values())).any(dim=0).flatten(1).any(dim=1)
            bad = [rows[row]["__key__"] for row in is_bad.nonzero().flatten().tolist()]
            figures = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ValueError(
                f"shard {task.split.value}/{task.name} fails its gate: {figures} of {moments.numel()} values "
                f"in {len(bad)} rows, first {', '.join(bad[:MAX_LISTED])}"
            )
        stored: Moments16 = moments.half().numpy()
        return stored

    def _images(self, rows: Sequence[Row]) -> Image:
        return image_of_pixels(list(self._decoders.map(self._crop, rows)))

    def _crop(self, row: Row) -> Pixels:
        pixels = decode_pixels(row[image_suffix(tuple(row))])
        top, left, side, _ = self._crop_box(row["__key__"], *pixels.shape[:2])
        return pixels[top : top + side, left : left + side]

    def _crop_box(self, key: str, height: int, width: int) -> tuple[int, int, int, int]:
        """Return top, left, height and width of the centre crop."""
        side = self.config.image_size
        if min(height, width) < side:
            raise ValueError(f"row {key} is {width}x{height}, too small for a crop of image_size {side}")
        return (height - side) // 2, (width - side) // 2, side, side

    def _encoded(self, images: Image) -> Moments:
        with torch.inference_mode(), self._arithmetic():
            return self._autoencoder.encode(images.to(self._device)).float().cpu()

    def _arithmetic(self) -> torch.autocast:
        is_bf16 = self.config.precision is Precision.BF16
        return torch.autocast(self._device.type, torch.bfloat16, enabled=is_bf16)

    def _gate(self, task: ShardTask, rows: Sequence[Row], moments: Moments16) -> tuple[list[int], list[float]]:
        """Decode evenly spaced rows from what will be stored; return their numbers and PSNR against their crops."""
        chosen = np.unique(np.linspace(0, len(rows) - 1, self.config.gate_rows).round().astype(int)).tolist()
        crops = self._images([rows[row] for row in chosen])
        stored = torch.from_numpy(moments[chosen]).float().to(self._device)
        with torch.inference_mode(), self._arithmetic():
            decoded = self._autoencoder.decode(mode(stored)).float().cpu().clamp(-1.0, 1.0)
        figures = psnr(decoded, crops).clamp(max=_LARGEST_PSNR).tolist()
        mean = sum(figures) / len(figures)
        # Written so that NaN fails too.
        if not mean >= self.config.gate_min_psnr:
            shown = ", ".join(
                f"{rows[row]['__key__']} {figure:.2f}" for row, figure in zip(chosen, figures, strict=True)
            )
            raise ValueError(
                f"shard {task.split.value}/{task.name} fails its gate: decoded latents have a mean PSNR of "
                f"{mean:.2f} dB against their images, gate_min_psnr is {self.config.gate_min_psnr}; rows: {shown}"
            )
        return chosen, figures

    def _members(
        self,
        row: Row,
        fact: Mapping[str, Any],
        captions: Sequence[str],
        choices: Sequence[int],
        moments: Sequence[Float16[np.ndarray, "m h w"]],
    ) -> Row:
        """Return one row of the tar; `moments` are plain, then mirrored where the config asks for them."""
        height, width = int(fact["height"]), int(fact["width"])
        facts = {
            "captions": list(captions),
            "text_index": list(choices),
            "crop": list(self._crop_box(row["__key__"], height, width)),
            "size": [int(fact.get("original_height", height)), int(fact.get("original_width", width))],
        }
        stored = {name: npy_bytes(form) for name, form in zip((MOMENTS, FLIPPED_MOMENTS), moments, strict=False)}
        text = {"txt": captions[0].encode(), "json": json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()}
        return {"__key__": row["__key__"], **stored, **text}

    def _text_widths(self) -> dict[str, JSON]:
        if self._text.pooled_width is None:
            return {"text_width": self._text.width}
        return {"text_width": self._text.width, "pooled_width": self._text.pooled_width}

    def _write_text(self, task: ShardTask, content: bytes) -> FileRecord:
        write_bytes(shard_path(self.config.root, task.split, task.name, TEXT_SUFFIX), content)
        return FileRecord(len(content), hashlib.sha256(content).hexdigest())


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
    is_on_gpu = config.device is Device.CUDA or _torch_device(config.device).type == "cuda"
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


def _torch_device(device: Device) -> torch.device:
    has_gpu = torch.cuda.is_available()
    match device:
        case Device.CPU:
            return torch.device("cpu")
        case Device.CUDA if not has_gpu:
            raise ValueError("device is cuda, and this machine has no GPU that torch can use")
        case Device.CUDA:
            return torch.device("cuda")
        case Device.AUTO:
            return torch.device("cuda" if has_gpu else "cpu")
