"""Dataset shards → latent shards: raw posterior moments and text embeddings, checked before they are published.

Order for each shard: captions of all rows → distinct ones embedded → batches of rows: read and decoded on threads →
centre crops → encoder → fp16 moments, each on a thread of its own, ahead of what needs it → tar, while the gate counts
and keeps a few rows → gate judges → tar, index and text table are published → record.
Dropout, flips and the choice of a caption are no part of this: they are drawn when rows are loaded. What is in memory
are some batches, and the captions and embeddings of one shard, these three times while their table is written.

Letters: b batch, m moment channel, h latent row, w latent column, y pixel row, x pixel column.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16

from ldm.autoencoder.regularizer import mode
from ldm.conditioning.text import TextEncoder, TextEncoderConfig
from ldm.config import Config
from ldm.interop.diffusers import load_autoencoder
from ldm.storage import copy_file, is_local, write_bytes
from ldm.types import Image, Moments
from pipeline.images import Pixels, decode_pixels, image_of_pixels, image_suffix
from pipeline.latent_gate import EncodedBatch, Gate, GateConfig, evaluated_psnr, stored_form
from pipeline.latent_shard import FLIPPED_MOMENTS, MOMENTS, npy_bytes
from pipeline.plan import ShardTask
from pipeline.prefetch import prefetched
from pipeline.store.manifest import FileRecord, ShardRecord, shard_path
from pipeline.store.schema import JSON, Row
from pipeline.store.shards import ShardIndex, read_index, write_shard
from pipeline.text_table import distinct_captions, table_bytes

TEXT_SUFFIX = "text.safetensors"
NUM_BATCHES_AHEAD = 2


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
    FP16 = "fp16"
    """Some autoencoders overflow in it (Stable Diffusion XL's first one): the gate finds that and refuses."""


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
    gate: GateConfig = field(default_factory=GateConfig)
    """What a shard must pass before it is published."""
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
        for name in ("image_size", "batch_size", "num_cpus"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.num_actors is not None and self.num_actors < 1:
            raise ValueError(f"num_actors must be at least 1, got {self.num_actors}")


class Encoder:
    """The frozen autoencoder and what turns rows' bytes into its input; one for each worker."""

    def __init__(self, config: LatentsConfig) -> None:
        """Load the autoencoder and take the worker's share of CPUs."""
        num_threads = max(1, int(config.num_cpus))
        torch.set_num_threads(num_threads)
        self.config = config
        self.device = torch_device(config.device)
        self._autoencoder = load_autoencoder(config.autoencoder).requires_grad_(False).eval().to(self.device)
        self._decoders = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def images(self, rows: Sequence[Row]) -> Image:
        """Return the rows' crops, decoded on the worker's threads."""
        return image_of_pixels(list(self._decoders.map(self._crop, rows)))

    def encode(self, images: Image) -> Moments:
        """Return the images' raw moments, float32, on the device."""
        with torch.inference_mode(), self._arithmetic():
            return self._autoencoder.encode(images.to(self.device)).float()

    def decode(self, moments: Moments) -> Image:
        """Return the images of the posteriors' means, on the CPU."""
        with torch.inference_mode(), self._arithmetic():
            return self._autoencoder.decode(mode(moments.to(self.device))).float().cpu()

    def crop_box(self, key: str, height: int, width: int) -> tuple[int, int, int, int]:
        """Return top, left, height and width of the centre crop.

        Raises:
            ValueError: if the picture is smaller than the crop.
        """
        side = self.config.image_size
        if min(height, width) < side:
            raise ValueError(f"row {key} is {width}x{height}, too small for a crop of image_size {side}")
        return (height - side) // 2, (width - side) // 2, side, side

    def _crop(self, row: Row) -> Pixels:
        pixels = decode_pixels(row[image_suffix(tuple(row))])
        top, left, side, _ = self.crop_box(row["__key__"], *pixels.shape[:2])
        return pixels[top : top + side, left : left + side]

    def _arithmetic(self) -> torch.autocast:
        dtype = torch.float16 if self.config.precision is Precision.FP16 else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.config.precision is not Precision.FP32)


@dataclass(frozen=True, slots=True)
class _Tar:
    """A dataset's tar on this machine, read by its index."""

    path: Path
    index: ShardIndex

    def member(self, row: int, suffix: str) -> bytes:
        """Return one member of a row."""
        column = self.index.column(suffix)
        with self.path.open("rb") as file:
            return os.pread(file.fileno(), int(self.index.sizes[row, column]), int(self.index.offsets[row, column]))


class EncodeStage:
    """Makes the shards of one latent cache; built once in each worker."""

    def __init__(self, config: LatentsConfig) -> None:
        """Load both networks, and what the autoencoder's evaluation says that a shard must reach."""
        self.config = config
        self._floor = config.gate.floor(evaluated_psnr(config.autoencoder))
        self._encoder = Encoder(config)
        self._text = TextEncoder(config.text, self._encoder.device)
        # Alone in its batch, so that every shard holds the same bytes for the null condition.
        self._null_embedding = self._text.encode([""])[0]

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Publish a shard's tar, index and text table and return their record.

        Raises:
            ValueError: if the shard fails its gate, naming rows and figures; nothing is published then.
        """
        index = read_index(f"{task.source_name.removesuffix('.tar')}.index")
        num_rows = len(index.keys)
        if not num_rows or num_rows != task.num_rows:
            raise ValueError(f"{task.source_name} has {num_rows} rows, its manifest says {task.num_rows}")
        gate = Gate(self.config.gate, self._floor, task)
        with on_this_machine(task.source_name) as path:
            tar = _Tar(path, index)
            facts = [json.loads(tar.member(row, "json")) for row in range(num_rows)]
            captions = [tuple(fact["captions"]) or ("",) for fact in facts]
            distinct = distinct_captions(captions)
            number_of_caption = {caption: number for number, caption in enumerate(distinct)}
            choices = [[number_of_caption[caption] for caption in row] for row in captions]
            embeddings = [self._null_embedding, *self._text.encode(distinct[1:])]
            # The gate stands at the end of the rows: if it refuses, the tar is not published.
            members = self._members(tar, facts, captions, choices, gate)
            files = write_shard(self.config.root, task.split, task.name, members)
        files[TEXT_SUFFIX] = self._write_text(task, table_bytes(distinct, embeddings, choices))
        return ShardRecord(
            name=task.name,
            split=task.split,
            num_rows=num_rows,
            files=files,
            counts={"ok": num_rows},
            source=task.source_digest,
            details={
                "statistics": gate.statistics.to_dict(),
                "gate": {"rows": list(gate.chosen), "psnr": gate.figures, "floor": self._floor},
                "moment_shape": list(gate.moment_shape),
                **self._text_widths(),
                "num_captions": len(distinct),
                "num_truncated": self._text.count_truncated(distinct),
            },
        )

    def _members(
        self,
        tar: _Tar,
        facts: Sequence[Mapping[str, Any]],
        captions: Sequence[Sequence[str]],
        choices: Sequence[Sequence[int]],
        gate: Gate,
    ) -> Iterator[Row]:
        """Yield the rows of the latents' tar as they are encoded, and let the gate judge behind the last one."""
        for batch in self._batches(tar, gate):
            rows = range(batch.first, batch.first + len(batch.is_bad))
            gate.take(batch, [tar.index.keys[row] for row in rows])
            for row, *moments in zip(rows, *batch.forms, strict=True):
                yield self._member(tar.index.keys[row], facts[row], captions[row], choices[row], moments)
        gate.judge(self._encoder.decode)

    def _batches(self, tar: _Tar, gate: Gate) -> Iterator[EncodedBatch]:
        """Yield the shard's batches: rows are read and decoded on one thread, encoded on the next."""
        num_rows, step = len(tar.index.keys), self.config.batch_size
        spans = ((start, min(start + step, num_rows)) for start in range(0, num_rows, step))
        suffix = image_suffix(tar.index.suffixes)

        def read(span: tuple[int, int]) -> tuple[int, Image]:
            rows = [{"__key__": tar.index.keys[row], suffix: tar.member(row, suffix)} for row in range(*span)]
            return span[0], self._encoder.images(rows)

        def encode(piece: tuple[int, Image]) -> EncodedBatch:
            first, images = piece
            chosen = gate.chosen_of(first, len(images))
            made = [stored_form(self._encoder.encode(form)) for form in self._forms(images)]
            return EncodedBatch(
                first=first,
                forms=[stored for stored, _, _ in made],
                faults=sum((faults for _, faults, _ in made), Counter()),
                is_bad=np.logical_or.reduce([is_bad for _, _, is_bad in made]),
                crops=images[chosen],
            )

        with (
            closing(prefetched(read, spans, NUM_BATCHES_AHEAD, _ignore)) as images,
            closing(prefetched(encode, images, 1, _ignore)) as batches,
        ):
            yield from batches

    def _forms(self, images: Image) -> list[Image]:
        return [images, images.flip(-1)] if self.config.flip else [images]

    def _member(
        self,
        key: str,
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
            "crop": list(self._encoder.crop_box(key, height, width)),
            "size": [int(fact.get("original_height", height)), int(fact.get("original_width", width))],
        }
        stored = {name: npy_bytes(form) for name, form in zip((MOMENTS, FLIPPED_MOMENTS), moments, strict=False)}
        text = {"txt": captions[0].encode(), "json": json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()}
        return {"__key__": key, **stored, **text}

    def _text_widths(self) -> dict[str, JSON]:
        if self._text.pooled_width is None:
            return {"text_width": self._text.width}
        return {"text_width": self._text.width, "pooled_width": self._text.pooled_width}

    def _write_text(self, task: ShardTask, content: bytes) -> FileRecord:
        write_bytes(shard_path(self.config.root, task.split, task.name, TEXT_SUFFIX), content)
        return FileRecord(len(content), hashlib.sha256(content).hexdigest())


@contextmanager
def on_this_machine(url: str) -> Iterator[Path]:
    """Yield a local path of a file: itself, or a copy for as long as the block lasts."""
    if is_local(url) and "://" not in url:
        yield Path(url)
        return
    with TemporaryDirectory(prefix="ldm-encode-") as folder:
        copy_file(url, f"{folder}/shard.tar")
        yield Path(folder, "shard.tar")


def _ignore(seconds: float) -> None:
    """Nobody asks how long the stage waited for its pictures."""


def has_gpu() -> bool:
    """Say whether this machine has a GPU that torch can use."""
    return torch.cuda.is_available()


def torch_device(device: Device) -> torch.device:
    """Return the device that is meant; raises ValueError if a GPU is asked for where there is none."""
    match device:
        case Device.CPU:
            return torch.device("cpu")
        case Device.CUDA if not has_gpu():
            raise ValueError("device is cuda, and this machine has no GPU that torch can use")
        case Device.CUDA:
            return torch.device("cuda")
        case Device.AUTO:
            return torch.device("cuda" if has_gpu() else "cpu")
