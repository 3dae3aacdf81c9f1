"""What a latent cache is to hold: which crops of a dataset's pictures, encoded by what, with which columns beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ldm.conditioning.text import TextEncoderConfig
from ldm.config import Config, added_later
from ldm.precision import Precision
from pipeline.latent_gate import GateConfig


class Device(StrEnum):
    """Where the encoder runs."""

    CPU = "cpu"
    CUDA = "cuda"
    AUTO = "auto"
    """A GPU where the job is started on a machine that has one."""


class CropShape(StrEnum):
    """What shape the crops of a picture have."""

    SQUARE = "square"
    """The largest square, image_size pixels a side."""
    BUCKETS = "buckets"
    """The largest part that has the shape of the nearest bucket; a shard has a tar for each."""


class TextStorage(StrEnum):
    """What is stored of a caption."""

    EMBEDDED = "embedded"
    """Its token states in fp16: training needs no text encoder."""
    ONLINE = "online"
    """Its token ids only, some hundred times smaller: the text encoder runs along with the training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CropConfig(Config):
    """Which parts of a picture are encoded."""

    shape: CropShape = CropShape.SQUARE
    """What shape they have."""
    count: int = 1
    """Crops of each picture, spread evenly along its longer side, one of which is drawn when a row is loaded; 1 is the
    centre."""
    more_sizes: tuple[int, ...] = ()
    """Sizes beside image_size at which every picture is encoded too; training reads one of them."""
    bucket_step: int = 64
    """Sides of buckets are multiples of this many pixels."""
    bucket_max_aspect: float = 2.0
    """Longer over shorter side of the longest bucket, at most."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.bucket_step < 1 or self.bucket_max_aspect < 1:
            raise ValueError(
                "count, bucket_step and bucket_max_aspect must be at least 1, "
                f"got {self.count}, {self.bucket_step}, {self.bucket_max_aspect}"
            )
        if len(set(self.more_sizes)) < len(self.more_sizes) or any(size < 1 for size in self.more_sizes):
            raise ValueError(f"more_sizes must be positive and differ, got {self.more_sizes}")


class Degradation(StrEnum):
    """How a picture becomes small."""

    BICUBIC = "bicubic"
    """By a clean bicubic filter."""
    BSR_LIGHT = "bsr_light"
    """Blurred, shrunk, noisy and compressed in a drawn order, a function of mask_seed, the row's key and the crop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnsConfig(Config):
    """What is cached of a row beside its moments and captions, for networks that are told it."""

    class_attribute: str = ""
    """Attribute of the dataset's rows that holds the class; empty for none. A row without it has class -1."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers; none where the attribute is the number itself."""
    boxes_attribute: str = ""
    """Attribute that holds a layout: a list of [left, top, right, bottom, class] in pixels of the upright original."""
    box_classes: tuple[str, ...] = ()
    """Names of the classes of boxes, in the order of their numbers; none where they are numbers."""
    map_member: str = ""
    """Member of the dataset's tars that is a semantic map: a PNG as large as its picture, a class number a pixel, 255
    for none; `map.png` where the dataset was made with source.map_suffix."""
    low_res_factor: int = 0
    """So many times smaller a picture is stored with each crop, for super-resolution; 0 stores none."""
    degradation: Degradation = added_later(Degradation.BICUBIC)
    """How the small picture comes about: bicubic, or bsr_light (blur, noise and JPEG as in the world)."""
    num_masks: int = 0
    """Random masks of each picture, whose masked image is encoded too, for inpainting; one is drawn at loading."""
    mask_seed: int = 0
    """Seed of masks and degradations, which are functions of it and the row's key."""

    def __post_init__(self) -> None:
        for name in ("low_res_factor", "num_masks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for names in (self.classes, self.box_classes):
            if len(set(names)) < len(names):
                raise ValueError(f"names of classes must differ, got {', '.join(names)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentsConfig(Config):
    """A cache of latents, made from a dataset by a frozen autoencoder and a frozen text encoder."""

    root: str
    """Folder or URL that the latents are written to."""
    dataset: str
    """Folder or URL of the finished dataset."""
    autoencoder: str
    """The autoencoder: folder, checkpoint, URL, hub name, models:/NAME/1 at MLflow, or shipped:small_f4."""
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """Which text encoder embeds the captions."""
    text_storage: TextStorage = TextStorage.EMBEDDED
    """What is stored of a caption."""
    image_size: int
    """Side of the square crop in pixels, or the root of a bucket's area; a multiple of the autoencoder's factor. Larger
    pictures are scaled down to it, smaller ones refused."""
    crop: CropConfig = field(default_factory=CropConfig)
    """Which parts of a picture are encoded."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """What is cached beside moments and captions."""
    batch_size: int = 32
    """Images of image_size encoded at once; of a larger size as many as have about as many pixels."""
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
    shards_at_once: int | None = None
    """Shards that a worker has in hand, so that one is fetched, decoded and written while another is encoded; none is
    2 on a GPU or where the dataset lies elsewhere, and 1 on CPUs beside it, which have nothing to wait for."""

    def __post_init__(self) -> None:
        for name in ("image_size", "batch_size", "num_cpus"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.num_actors is not None and self.num_actors < 1:
            raise ValueError(f"num_actors must be at least 1, got {self.num_actors}")
        if self.shards_at_once is not None and self.shards_at_once < 1:
            raise ValueError(f"shards_at_once must be at least 1, got {self.shards_at_once}")
        if self.image_size in self.crop.more_sizes:
            raise ValueError(f"crop.more_sizes holds image_size {self.image_size} itself")
        for size in self.image_sizes:
            if self.columns.low_res_factor and size % self.columns.low_res_factor:
                raise ValueError(f"columns.low_res_factor {self.columns.low_res_factor} must divide {size}")

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """Every size at which pictures are encoded, the first one first."""
        return (self.image_size, *self.crop.more_sizes)
