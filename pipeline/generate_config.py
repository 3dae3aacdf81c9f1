"""How a file of prompts becomes tars of pictures: where, by how many workers, in which shards and batches."""

from __future__ import annotations

from dataclasses import dataclass, field

from ldm.config import Config
from ldm.drawing import Drawing
from ldm.request_table import PROMPT
from ldm.safety import SafetyConfig
from pipeline.ingest.picture import ImageFormat, PictureConfig
from pipeline.latent_config import Device


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkConfig(Config):
    """How a file of prompts is drawn."""

    root: str = ""
    """Folder or URL that the tars of pictures are written to."""
    record: str = ""
    """Local folder that remembers the MLflow run of the drawing; empty for none."""
    images_per_prompt: int = 1
    """Pictures of each row; their seeds count on."""
    prompt_column: str = PROMPT
    """The column of prompts, where it has another name."""
    carry: tuple[str, ...] = ()
    """Further columns, whose cells are passed on into each picture's JSON; other columns that nobody knows are
    refused."""
    shard_rows: int = 512
    """Rows of the file in one tar."""
    batch_size: int = 8
    """Pictures of the trained size that are sampled together; of another size as many as have about as many pixels.
    Batches that are not full are filled up with copies of their last row, so that a picture is the same to the bit
    whatever else the file holds: for each size, sampler and kind of row in a tar up to batch_size - 1 copies are drawn
    for nothing."""
    max_pixels: int = 1 << 22
    """Most pixels of one picture, rows times columns: a row that asks for more is refused, and costs no worker its
    memory."""
    image_format: ImageFormat = ImageFormat.PNG
    """How pictures are stored; png loses nothing."""
    quality: int = 95
    """Quality of jpg and webp, 1 to 100."""
    device: Device = Device.AUTO
    """Where pictures are drawn."""
    num_cpus: float = 1.0
    """CPUs of one worker; on CPUs another number changes a picture's last bits."""
    num_actors: int | None = None
    """Workers at once; none for as many as the cluster holds."""
    replaces: bool = False
    """Draw tars anew whose rows were changed in the file or are no longer there; else such a file is refused."""
    verify: bool = False
    """Read the tars back and compare them with their manifest, ledgers and the file of prompts; draws nothing."""

    def __post_init__(self) -> None:
        for name in ("images_per_prompt", "shard_rows", "batch_size", "max_pixels", "num_cpus"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.num_actors is not None and self.num_actors < 1:
            raise ValueError(f"num_actors must be at least 1, got {self.num_actors}")
        if len(set(self.carry)) < len(self.carry):
            raise ValueError(f"columns to carry must differ, got {', '.join(self.carry)}")
        self.picture_config()

    def picture_config(self) -> PictureConfig:
        """Return how a picture is encoded."""
        return PictureConfig(image_format=self.image_format, quality=self.quality)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig(Config):
    """A file of prompts, drawn by a model into tars."""

    prompts: str
    """File of prompts, folder or wildcards of files, or the URL of one of these."""
    model: str
    """Folder or URL of the model."""
    model_digest: str = ""
    """Digest of the model; empty takes the one that lies there when the work is planned."""
    drawing: Drawing = Drawing()
    """How rows are drawn that say nothing."""
    guidance: float
    """Guidance scale of rows that say nothing."""
    negative_prompt: str = ""
    """What guidance leads away from in rows that say nothing."""
    seed: int = 0
    """Rows that name no seed get one from this and from what they say."""
    safety: SafetyConfig = SafetyConfig()
    """Filters of prompts and pictures, and the watermark."""
    bulk: BulkConfig = field(default_factory=BulkConfig)
    """How, and where to."""

    def __post_init__(self) -> None:
        if not self.bulk.root:
            raise ValueError("a file of prompts is drawn into a folder of tars: --bulk.root DIR")
