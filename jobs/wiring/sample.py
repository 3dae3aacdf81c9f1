"""Sampling, put together: prompts x guidance scales → one picture with captions, or each by itself."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from jobs.wiring.picture_grid import grid_picture
from jobs.wiring.picture_settings import save_with_settings, settings_of
from jobs.wiring.sample_tasks import Row, SampleTask, check_task, rows_of
from ldm import storage
from ldm.config import added_later, digest_of
from ldm.drawing import Drawing, Given, Pixels, check_strength
from ldm.model_card import find_model, load_card, model_digest
from ldm.request_table import MAX_SEED, layout_in
from ldm.requests import fitted, fitted_map, fitted_mask, map_from, mask_from, outpainted, picture_from
from ldm.safety import Safety, SafetyConfig
from ldm.text_to_image import TextToImage, load_text_to_image
from ldm.training.local_launch import LaunchConfig, Outcome
from ldm.training.loop import Progress
from ldm.training.tracking_config import TrackingConfig
from ldm.training.world import World
from pipeline.generate_config import BulkConfig, GenerateConfig

FILES = ("picture", "mask", "semantic_map", "small")
"""Fields that name a picture."""
ADDRESSES = ("model", *FILES)
"""What a picture's name does not depend on: their digests are in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig(Drawing):
    """Draw a grid of prompts x guidance scales, its pictures one by one, or a file of prompts into tars."""

    task: SampleTask = added_later(SampleTask.DRAW)
    """What is asked of the model: draw, vary (like a picture), inpaint, outpaint, upscale or interpolate; may stand
    first, before the recipe."""
    root: str
    """Folder that pictures are written to; tars of a file of prompts go to bulk.root."""
    record: str
    """Local folder of the training's record, which names its MLflow run."""
    model: str
    """Folder or URL of the model."""
    model_digest: str = added_later("")
    """Digest of the model; empty takes the one that lies there now. A picture's own settings name it."""
    prompts: tuple[str, ...]
    """One row of the grid each."""
    prompts_from: str = added_later("")
    """File of prompts that are drawn into tars in place of a grid: parquet, CSV, TSV, JSONL or text, a folder or
    wildcards of such files, or a URL. Its columns are those of a table that is served; see bulk."""
    bulk: BulkConfig = added_later(BulkConfig())
    """How a file of prompts is drawn."""
    negative_prompt: str = added_later("")
    """What guidance leads away from, in all pictures."""
    guidance: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0)
    """One column of the grid each; 1 is the conditional model without guidance."""
    seed: int = 0
    """Seed of the first row's noise; the next rows count on. A row has one noise over all scales."""
    picture: str = added_later("")
    """Picture that every drawing begins with (see strength), cut to height and width, or where they are 0 to the size
    of the training; file or URL."""
    mask: str = added_later("")
    """Picture whose light pixels are drawn anew, laid over the other one; all else comes back untouched, but for
    a watermark."""
    margins: tuple[int, int, int, int] = added_later((0, 0, 0, 0))
    """For outpaint: pixels that are added at the picture's left, top, right and bottom."""
    shares: tuple[float, ...] = added_later((0.0, 0.2, 0.4, 0.6, 0.8, 1.0))
    """For interpolate: places on the way from the first prompt and seed to the second, a row each."""
    classes: tuple[int, ...] = added_later(())
    """For a model that is told classes: the number of each row's."""
    layouts: tuple[str, ...] = added_later(())
    """For a model that is told layouts: each row's boxes, "CLASS LEFT TOP RIGHT BOTTOM; ...", sides in shares of the
    picture."""
    semantic_map: str = added_later("")
    """For a model that is told maps: a picture of which a pixel's grey is its class, 255 none; cut as pictures are."""
    small: str = added_later("")
    """For super-resolution: the picture of which a larger one is drawn."""
    file_digests: tuple[str, ...] = added_later(())
    """What these files must be, "picture=SHA256"; without it what lies there now is taken. A picture's own settings
    name them."""
    is_separate: bool = added_later(False)
    """Write each picture by itself and without captions, in place of a grid."""
    safety: SafetyConfig = added_later(SafetyConfig())
    """Filters of prompts and pictures, and the watermark. A grid is marked as a whole."""
    launch: LaunchConfig = LaunchConfig()
    """Where it runs (one worker)."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""

    def __post_init__(self) -> None:
        Drawing.__post_init__(self)
        if self.prompts_from:
            self._check_alone()
            return
        if not self.prompts or not self.guidance:
            raise ValueError("a grid needs at least one prompt and one guidance scale")
        if self.task is SampleTask.INTERPOLATE and (self.classes or self.layouts):
            raise ValueError("interpolate knows no way between classes or layouts")
        for name in ("classes", "layouts"):
            if len(found := getattr(self, name)) not in (0, len(self.prompts)):
                raise ValueError(
                    f"{name} are one for each of the {len(self.prompts)} prompts, got {len(found)}: give as many "
                    "--prompts (a model without text takes them as the rows' names)"
                )
        if self.mask and not self.picture:
            raise ValueError("a mask needs a picture that it lies over: --picture FILE")
        is_given = {name: bool(getattr(self, name)) for name in ("picture", "mask", "small", "shares")}
        is_given["margins"] = any(self.margins)
        check_task(self.task, [name for name, is_there in is_given.items() if is_there])
        if self.task is SampleTask.INTERPOLATE and len(self.prompts) != 2:
            raise ValueError(f"interpolate goes from one prompt to another, two in all: got {self.prompts}")
        if wrong := [share for share in self.shares if not 0 <= share <= 1]:
            raise ValueError(f"shares of the way lie in [0, 1], got {wrong[0]}")
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"a seed lies in [0, 2^63), got {self.seed}")
        has_mask = bool(self.mask) or self.task is SampleTask.OUTPAINT
        check_strength(self.strength, has_picture=bool(self.picture), has_mask=has_mask)

    def _check_alone(self) -> None:
        """Refuse what is said of a grid where a file of prompts is drawn."""
        if len(self.guidance) != 1:
            raise ValueError(
                "a file of prompts is drawn at one guidance scale, which its rows may change: give one, such as "
                f"--guidance 3, got {', '.join(f'{scale:g}' for scale in self.guidance)}"
            )
        if self.task is not SampleTask.DRAW:
            raise ValueError(f"{self.task.value} is of a grid: a file's rows say in columns what they ask")
        # A recipe's own prompts, classes and layouts are its grid's, and give way to the rows'.
        given = [name for name in (*FILES, "is_separate") if getattr(self, name)]
        if given := [*given, *(["margins"] if any(self.margins) else [])]:
            raise ValueError(
                f"{', '.join(given)} are of a grid: the rows of a file of prompts name their own in columns"
            )

    def generate_config(self) -> GenerateConfig:
        """Return how the file of prompts is drawn."""
        return GenerateConfig(
            prompts=_whole(self.prompts_from),
            model=_whole(self.model),
            model_digest=self.model_digest,
            drawing=self.drawing,
            guidance=self.guidance[0],
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            safety=self.safety.identified(),
            bulk=replace(self.bulk, root=_whole(self.bulk.root) if self.bulk.root else ""),
        )

    @property
    def drawing(self) -> Drawing:
        """How pictures are drawn."""
        return Drawing(**{field.name: getattr(self, field.name) for field in fields(Drawing)})

    def parts(self) -> list[SampleConfig]:
        """Return the requests of the pictures that are written: the grid's own, or those of its pictures by row."""
        if not self.is_separate:
            return [self]
        if self.task is SampleTask.INTERPOLATE:
            return [
                replace(self, shares=(share,), guidance=(scale,)) for share in self.shares for scale in self.guidance
            ]
        rows = [
            replace(
                self,
                prompts=(prompt,),
                seed=self.seed + row,
                classes=self.classes[row : row + 1],
                layouts=self.layouts[row : row + 1],
            )
            for row, prompt in enumerate(self.prompts)
        ]
        return [replace(row, guidance=(scale,)) for row in rows for scale in self.guidance]

    def shown_settings(self) -> dict[str, Any]:
        """Return what a picture says of its request: nothing of the place, and not the watermark's key."""
        return settings_of(replace(self, safety=self.safety.without_key()))

    def picture_paths(self) -> list[str]:
        """Return where the pictures lie: the same request of the same model has the same name."""
        kind = "picture" if self.is_separate else "grid"
        asked = [part.shown_settings() for part in self.identified().parts()]
        names = [digest_of({name: part[name] for name in part if name not in ADDRESSES})[:12] for part in asked]
        return [storage.join(self.root, f"{kind}-{name}.png") for name in names]

    def identified(self) -> SampleConfig:
        """Return the request with the digests of its model, files and key, and their whole addresses.

        Raises:
            ValueError: if one of them can't be read, or is not the one that the request names.
        """
        digest = model_digest(load_card(self.model_folder()))
        files = {name: getattr(self, name) for name in FILES if getattr(self, name)}
        found = {name: _file_digest(path) for name, path in files.items()}
        for name, _, named in (entry.partition("=") for entry in self.file_digests):
            if named != found.get(name):
                raise ValueError(_is_another(name, files.get(name, "no place"), named, "--file-digests"))
        whole: dict[str, Any] = {name: _whole(path) for name, path in {"model": self.model, **files}.items()}
        named_files = tuple(f"{name}={sha256}" for name, sha256 in found.items())
        safety = self.safety.identified()
        return replace(self, **whole, model_digest=digest, file_digests=named_files, safety=safety)

    def rows(self) -> list[Row]:
        """Return what the rows of the grid show."""
        return rows_of(self.task, self.prompts, self.seed, self.shares)

    def model_folder(self) -> str:
        """Return where the model lies: at its address, or among those that this held before.

        Raises:
            ValueError: if the one that is named is in neither.
        """
        if not self.model_digest:
            return self.model
        try:
            return find_model(self.model, self.model_digest)
        except ValueError as error:
            raise ValueError(_is_another("model", self.model, self.model_digest, '--model-digest ""')) from error


def sample_worker(
    config: SampleConfig, world: World, report: Callable[[Progress], None], should_stop: Callable[[], bool]
) -> Outcome:
    """Draw the pictures in one process and write them.

    Raises:
        ValueError: if a filter refuses a prompt, before the model is loaded.
    """
    config = config.identified()
    safety = Safety(config.safety)
    _refuse(config.prompts, safety)
    model = load_text_to_image(config.model_folder(), world.device)
    if told := cut_prompts(model, [*config.prompts, config.negative_prompt]):
        report(Progress(done=0, total=0, notice=told))
    rows = config.rows()
    count = len(rows) * len(config.guidance)
    given = _given(config, model, count)
    drawing = config.drawing
    if given is not None and given.size is not None:
        drawing = replace(drawing, height=given.size[0], width=given.size[1])
    if config.is_separate:
        safety.check_size(drawing.height or model.trained_size[0], drawing.width or model.trained_size[1])
    prompts = [row.label for row in rows for _ in config.guidance]
    images = model.generate(
        [row.prompt for row in rows for _ in config.guidance],
        seeds=[row.seed for row in rows for _ in config.guidance],
        guidance=list(config.guidance) * len(rows),
        negative_prompts=[config.negative_prompt] * count,
        drawing=drawing,
        given=given,
        on_step=_Steps(report, count),
    )
    pictures, reasons = _finished(config, images, prompts, safety)
    if refused := _listed(prompts, reasons):
        what = "left out" if config.is_separate else "grey"
        report(Progress(done=0, total=0, notice=f"pictures that the filter refuses are {what}: {'; '.join(refused)}"))
    written = []
    for path, part, picture in zip(config.picture_paths(), config.parts(), pictures, strict=True):
        if picture is not None:
            with storage.open_atomic(path) as file:
                save_with_settings(picture, part.shown_settings(), file)
            written.append(path)
    return {"is_finished": True, "pictures": written, "num_refused": len(refused), "num_drawn": count}


def _refuse(prompts: Sequence[str], safety: Safety) -> None:
    if refused := _listed(prompts, safety.refused(prompts)):
        raise ValueError(
            f"{len(refused)} of the {len(prompts)} prompts must not be drawn, says the filter: {'; '.join(refused)}"
        )


def _listed(prompts: Sequence[str], reasons: Sequence[str]) -> list[str]:
    """Return what is refused, with the reason, in a few words each."""
    return [
        f"{textwrap.shorten(prompt, 60, placeholder='...')!r} ({textwrap.shorten(reason, 80, placeholder='...')})"
        for prompt, reason in zip(prompts, reasons, strict=True)
        if reason
    ]


def _finished(
    config: SampleConfig, images: Pixels, prompts: Sequence[str], safety: Safety
) -> tuple[list[PILImage.Image | None], list[str]]:
    """Return the pictures that are written, None for one that must not be, and the filter's reason for each image."""
    if config.is_separate:
        images, reasons = safety.finished(images, prompts)
        pairs = zip(images, reasons, strict=True)
        return [None if reason else PILImage.fromarray(image) for image, reason in pairs], reasons
    images, reasons = safety.judged(images, prompts)
    whole = np.asarray(grid_picture(images, [row.label for row in config.rows()], config.guidance))
    return [PILImage.fromarray(safety.marked(whole[None])[0])], reasons


def _file_digest(path: str) -> str:
    try:
        return storage.sha256_of(path)
    except storage.PLACE_ERRORS as error:
        raise ValueError(f"the picture {path} can't be read: {type(error).__name__} {error}") from error


def _whole(address: str) -> str:
    return str(Path(address).expanduser().absolute()) if storage.is_local(address) else address


def _is_another(name: str, place: str, digest: str, takes: str) -> str:
    return (
        f"at {place} lies another {name} than the one that is asked for, {digest[:16]}: "
        f"--{name.replace('_', '-')} says where that lies, {takes} takes what is there"
    )


class _Steps:
    """Reports pictures, those under way in part, and steps a second."""

    def __init__(self, report: Callable[[Progress], None], count: int) -> None:
        self._report = report
        self._count = count
        self._num_steps = 0
        self._begun = time.monotonic()

    def __call__(self, done: float, _: int) -> None:
        self._num_steps += 1
        seconds = max(1e-9, time.monotonic() - self._begun)
        # Measured where they are drawn: reports may reach whoever shows them several at once.
        metrics = {"images_per_second": done / seconds, "steps_per_second": self._num_steps / seconds}
        self._report(Progress(done=int(done), total=self._count, metrics=metrics))


def _given(config: SampleConfig, model: TextToImage, count: int) -> Given | None:
    """Return what every row and column of the grid is given; none where nothing is."""
    size = config.height or model.trained_size[0], config.width or model.trained_size[1]
    columns = len(config.guidance)
    parts: dict[str, Any] = {}
    if config.classes:
        parts["classes"] = tuple(number for number in config.classes for _ in range(columns))
    if config.layouts:
        layouts = [layout_in(text) for text in config.layouts]
        parts["layouts"] = tuple(layout for layout in layouts for _ in range(columns))
    if config.semantic_map:
        parts["maps"] = np.stack([fitted_map(map_from(config.semantic_map), size)] * count)
    if config.small:
        parts["small"] = np.stack([picture_from(config.small)] * count)
    if config.picture:
        parts |= _begun(config, size, count)
    return Given(**parts) if parts else None


def _begun(config: SampleConfig, size: tuple[int, int], count: int) -> dict[str, Any]:
    """Return the picture to begin with and its mask, as parts of what is given."""
    own = picture_from(config.picture)
    if config.mask:
        mask = mask_from(config.mask)
        if mask.shape != own.shape[:2]:
            raise ValueError(
                f"the mask has {mask.shape[1]} x {mask.shape[0]} px, the picture {own.shape[1]} x {own.shape[0]} px: "
                "they must lie over each other"
            )
    if config.task is SampleTask.OUTPAINT:
        canvas, room = outpainted(fitted(own, size), config.margins)
        return {"pixels": np.stack([canvas] * count), "masks": np.stack([room] * count)}
    pixels = np.stack([fitted(own, size)] * count)
    return {"pixels": pixels, **({"masks": np.stack([fitted_mask(mask, size)] * count)} if config.mask else {})}


def cut_prompts(model: TextToImage, prompts: Sequence[str]) -> str:
    """Return in words which prompts are longer than the model reads; empty if none is."""
    cut = [prompt for prompt in dict.fromkeys(prompts) if model.is_cut(prompt)]
    if not cut:
        return ""
    shown = ", ".join(repr(textwrap.shorten(prompt, 60, placeholder="...")) for prompt in cut[:3])
    return (
        f"{len(cut)} of the prompts {'is' if len(cut) == 1 else 'are'} longer than the {model.max_tokens} tokens that "
        f"the model reads, and cut there: {shown}"
    )
