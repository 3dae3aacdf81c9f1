"""How well small models do the paper's tasks on scenes that they never saw, in numbers and in pictures.

python -m tests.benchmarks.tasks --scenes HOME [--things HOME] [--rows 64] [--save]

after jobs.shard_dataset, precompute_latents and train_ldm of the recipes in jobs/recipes/scenes.py.
What a box or a picture shows is decided by the nearest of the twelve drawings; the same is asked of the scenes
themselves (the most that can be reached) and of drawings for another scene's layout (what chance reaches).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from jobs.command_line import MARKERS
from jobs.recipes.scenes import FACTOR, TOLD
from ldm.conditioning.masks import random_mask
from ldm.config import Config, added_later
from ldm.drawing import Box, images_of
from ldm.evaluation.scores import psnr, ssim
from ldm.losses.perceptual import PerceptualConfig, perceptual_distance
from ldm.requests import Mask, Picture, Request, SemanticMap, draw, map_from, picture_from
from ldm.text_to_image import TextToImage, load_text_to_image
from pipeline.sources.scenes import Placed, ScenesConfig, composed, drawings_of
from pipeline.store.manifest import load_manifest, shard_path
from pipeline.store.schema import Split
from pipeline.store.shards import read_rows

RESULTS = Path(__file__).parent / "results"
TEMPLATE_SIDE = 96
SHOWN = 6
CELL = 96
CONFIG = ScenesConfig()
MASK_SEED = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksBenchmark(Config):
    """Held-out scenes, drawn by each task's model."""

    scenes: str
    """Home of the recipe `scenes`."""
    things: str = added_later("")
    """Home of the recipe `things`; empty leaves classes out."""
    rows: int = 64
    """Held-out rows."""
    threads: int = 2
    """CPU threads."""
    save: bool = False
    """Write numbers and pictures beside the other results, where those of other tasks stay as they are."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Held:
    """A held-out row.

    Attributes:
        picture: its pixels.
        shown: class of each pixel, -1 for none.
        boxes: (class, left, top, right, bottom), sides in shares of the picture.
        number: its class, where it shows one thing.
    """

    picture: Picture
    shown: SemanticMap
    boxes: tuple[Box, ...]
    number: int | None

    @property
    def small(self) -> Picture:
        """The picture a few times smaller, by a bicubic filter."""
        side = self.picture.shape[0] // FACTOR
        return np.asarray(PILImage.fromarray(self.picture).resize((side, side), PILImage.Resampling.BICUBIC))

    def mask(self, row: int) -> Mask:
        """Return a mask as inpainting is trained with."""
        return random_mask(np.random.default_rng([MASK_SEED, row]), *self.picture.shape[:2])


Measured = tuple[dict[str, float], list[Sequence[Picture]], Sequence[str]]
"""Numbers, rows of pictures to show, and the titles of their columns."""


def main() -> None:
    """Measure each model that is there, print the table, and write the pictures."""
    settings = tyro.cli(TasksBenchmark, description=__doc__, config=MARKERS)
    torch.set_num_threads(settings.threads)
    record: dict[str, Any] = {}
    tasks: dict[str, Callable[[TextToImage, list[Held]], Measured]] = {
        "scenes_layout": layout,
        "scenes_map": semantic_map,
        "scenes_inpainting": inpainting,
        "scenes_upscaling": upscaling,
        "things_class": classes,
    }
    assert set(tasks) == set(TOLD)
    for name, measure in tasks.items():
        home = settings.things if name.startswith("things") else settings.scenes
        folder = f"{home}/{name}/model"
        if not home or not Path(folder, "model.json").exists():
            print(f"{name}: not trained")
            continue
        model = load_text_to_image(folder, torch.device("cpu"))
        numbers, shown, titles = measure(model, held_out(f"{home}/dataset", settings.rows))
        made_by = {"rows": settings.rows, "torch": torch.__version__}
        record[name] = made_by | {key: round(number, 4) for key, number in numbers.items()}
        print(f"{name}: " + ", ".join(f"{key} {number:.3f}" for key, number in numbers.items()))
        sheet(shown[:SHOWN], titles).save(RESULTS / f"task-{name}.png" if settings.save else f"task-{name}.png")
    if settings.save:
        file = RESULTS / "tasks.json"
        earlier = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(earlier | record, indent=1) + "\n")


def layout(model: TextToImage, rows: list[Held]) -> Measured:
    """Return how often a box shows what its layout says."""
    drawn = draw(model, [Request(prompt="", seed=row, layout=held.boxes) for row, held in enumerate(rows)])
    boxes = [boxes_as_picture(held) for held in rows]
    return (
        box_figures(drawn, rows),
        list(zip(boxes, drawn, (held.picture for held in rows), strict=True)),
        ("layout", "drawn", "its scene"),
    )


def semantic_map(model: TextToImage, rows: list[Held]) -> Measured:
    """Return the same of maps, and how well what is drawn covers what the map shows."""
    drawn = draw(model, [Request(prompt="", seed=row, semantic_map=held.shown) for row, held in enumerate(rows)])
    inside = [is_drawn(picture) for picture in drawn]
    covered = [
        (one & (held.shown >= 0)).sum() / (one | (held.shown >= 0)).sum()
        for one, held in zip(inside, rows, strict=True)
    ]
    maps = [map_as_picture(held) for held in rows]
    figures = box_figures(drawn, rows) | {"intersection_over_union": float(np.mean(covered))}
    return figures, list(zip(maps, drawn, (held.picture for held in rows), strict=True)), ("map", "drawn", "its scene")


def inpainting(model: TextToImage, rows: list[Held]) -> Measured:
    """Return how near to the scene what is under the mask comes, beside plain white."""
    masks = [held.mask(row) for row, held in enumerate(rows)]
    asked = [
        Request(prompt="", seed=row, picture=held.picture, mask=mask)
        for row, (held, mask) in enumerate(zip(rows, masks, strict=True))
    ]
    drawn = draw(model, asked)
    white = [np.where(mask[..., None], np.uint8(255), held.picture) for held, mask in zip(rows, masks, strict=True)]
    hidden = [np.where(mask[..., None], np.uint8(150), held.picture) for held, mask in zip(rows, masks, strict=True)]
    truth = [held.picture for held in rows]
    figures = {**similarity(drawn, truth), **{f"white_{key}": n for key, n in similarity(white, truth).items()}}
    return figures, list(zip(hidden, drawn, truth, strict=True)), ("given", "drawn", "its scene")


def upscaling(model: TextToImage, rows: list[Held]) -> Measured:
    """Return how near to the scene the enlarged small picture comes, beside a bicubic filter."""
    drawn = draw(model, [Request(prompt="", seed=row, small=held.small) for row, held in enumerate(rows)])
    side = rows[0].picture.shape[0]
    plain = [
        np.asarray(PILImage.fromarray(held.small).resize((side, side), PILImage.Resampling.BICUBIC)) for held in rows
    ]
    small = [np.repeat(np.repeat(held.small, FACTOR, 0), FACTOR, 1) for held in rows]
    truth = [held.picture for held in rows]
    figures = {**similarity(drawn, truth), **{f"bicubic_{key}": n for key, n in similarity(plain, truth).items()}}
    return figures, list(zip(small, plain, drawn, truth, strict=True)), ("16 px", "bicubic", "drawn", "its scene")


def classes(model: TextToImage, rows: list[Held]) -> Measured:
    """Return how often a picture shows the class that was asked for."""
    numbers = [held.number or 0 for held in rows]
    drawn = draw(model, [Request(prompt="", seed=row, class_id=number) for row, number in enumerate(numbers)])
    found = [nearest(tight(picture)) for picture in drawn]
    itself = [nearest(tight(held.picture)) for held in rows]
    figures = {
        "class_accuracy": share_equal(found, numbers),
        "of_the_pictures_themselves": share_equal(itself, numbers),
        "of_other_classes": share_equal(found, numbers[1:] + numbers[:1]),
    }
    asked = draw(
        model,
        [Request(prompt="", seed=seed, class_id=number) for number in range(len(CONFIG.classes)) for seed in range(8)],
    )
    shown = [asked[8 * number : 8 * number + 8] for number in range(len(CONFIG.classes))]
    return figures, list(shown), ["" for _ in range(8)]


def held_out(dataset: str, count: int) -> list[Held]:
    """Return the first held-out rows of a dataset of scenes."""
    manifest = load_manifest(dataset)
    rows: list[Held] = []
    for shard in manifest.shards:
        if shard.split is not Split.VALIDATION or len(rows) >= count:
            continue
        for row in read_rows(shard_path(dataset, shard.split, shard.name, "tar")):
            facts = json.loads(row["json"])
            height, width = facts["original_height"], facts["original_width"]
            boxes = [
                (CONFIG.classes.index(name), left / width, top / height, right / width, low / height)
                for left, top, right, low, name in facts["attributes"]["layout"]
            ]
            name = facts["attributes"]["class"]
            rows.append(
                Held(
                    picture=picture_from(row["png"]),
                    shown=map_from(row["map.png"]),
                    boxes=tuple(boxes),
                    number=None if name is None else CONFIG.classes.index(name),
                )
            )
    return rows[:count]


def box_figures(drawn: list[Picture], rows: list[Held]) -> dict[str, float]:
    """Return the share of boxes that show their class, in drawings, scenes and drawings for another layout."""
    own = [held.boxes for held in rows]
    return {
        "box_accuracy": box_accuracy(drawn, own),
        "of_the_scenes_themselves": box_accuracy([held.picture for held in rows], own),
        "of_other_layouts": box_accuracy(drawn, own[1:] + own[:1]),
    }


def box_accuracy(pictures: Sequence[Picture], layouts: Sequence[Sequence[Box]]) -> float:
    """Return the share of boxes whose content is nearest to the drawing of their class."""
    found, wanted = [], []
    for picture, boxes in zip(pictures, layouts, strict=True):
        height, width = picture.shape[:2]
        for number, *sides in boxes:
            left, top, right, low = (
                round(side * whole) for side, whole in zip(sides, (width, height) * 2, strict=True)
            )
            found.append(nearest(picture[top:low, left:right]))
            wanted.append(number)
    return share_equal(found, wanted)


def nearest(content: Picture) -> int:
    """Return the class whose drawing, stretched to the same sides, has the least squared distance."""
    height, width = content.shape[:2]
    distances = [
        np.square(np.asarray(template.resize((width, height), PILImage.Resampling.BOX), float) - content).mean()
        for template in TEMPLATES
    ]
    return int(np.argmin(distances))


def is_drawn(picture: Picture) -> Mask:
    """Return which pixels are not white."""
    return (picture < 225).any(axis=-1)


def tight(picture: Picture) -> Picture:
    """Return the part of a picture that is not white."""
    where = np.argwhere(is_drawn(picture))
    if not len(where):
        return picture
    (top, left), (low, right) = where.min(axis=0), where.max(axis=0) + 1
    return picture[top:low, left:right]


def similarity(drawn: Sequence[Picture], truth: Sequence[Picture]) -> dict[str, float]:
    """Return mean PSNR (dB), SSIM and ST-LPIPS of pictures to others."""
    one, other = (images_of(np.stack(list(pictures)), torch.device("cpu")) for pictures in (drawn, truth))
    same = (one == other).flatten(1).all(dim=1)  # nothing was hidden there: infinitely near
    with torch.no_grad():
        distance = perceptual_distance(PerceptualConfig())(one, other)
    return {
        "psnr_db": float(psnr(one[~same], other[~same]).mean()),
        "ssim": float(ssim(one, other).mean()),
        "st_lpips": float(distance.mean()),
    }


def share_equal(found: Sequence[int], wanted: Sequence[int]) -> float:
    """Return the share of places where both are equal."""
    return float(np.mean(np.array(found) == np.array(wanted)))


def boxes_as_picture(held: Held) -> Picture:
    """Return a layout as frames with names."""
    side = CELL
    canvas = PILImage.new("RGB", (side, side), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(9)
    for number, left, top, right, low in held.boxes:
        pen.rectangle((left * side, top * side, right * side - 1, low * side - 1), outline="black")
        pen.text((left * side + 2, top * side + 1), CONFIG.classes[number].split()[0], "black", font)
    return np.asarray(canvas)


def map_as_picture(held: Held) -> Picture:
    """Return a map in a colour for each class."""
    colours = np.random.default_rng(3).integers(40, 220, (len(CONFIG.classes) + 1, 3), np.uint8)
    colours[-1] = 255
    return colours[held.shown]


def sheet(rows: Sequence[Sequence[Picture]], titles: Sequence[str]) -> PILImage.Image:
    """Return rows of pictures under titles, two rows beside each other where there are few columns."""
    gap, head = 6, 20
    beside = 2 if len(titles) <= 4 else 1
    columns = len(titles)
    lines = -(-len(rows) // beside)
    canvas = PILImage.new("RGB", (beside * (columns * (CELL + gap) + 3 * gap), head + lines * (CELL + gap)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for number, row in enumerate(rows):
        left = (number % beside) * (columns * (CELL + gap) + 3 * gap)
        top = head + number // beside * (CELL + gap)
        for column, picture in enumerate(row):
            place = left + column * (CELL + gap) + gap
            if number < beside:
                pen.text((place + CELL / 2, head / 2), titles[column], "black", font, anchor="mm")
            shown = PILImage.fromarray(picture).resize((CELL, CELL), PILImage.Resampling.NEAREST)
            canvas.paste(shown, (place, top))
            pen.rectangle((place - 1, top - 1, place + CELL, top + CELL), outline="#cccccc")
    return canvas


def _templates() -> list[PILImage.Image]:
    """Return each class's drawing on white, cut to what is seen of it."""
    drawings = drawings_of(replace(CONFIG, num_scenes=1), CONFIG.styles[0])
    whole = [
        composed([Placed(number=number, left=0, top=0, side=TEMPLATE_SIDE)], drawings, TEMPLATE_SIDE)
        for number in range(len(CONFIG.classes))
    ]
    made = []
    for picture, shown in whole:
        where = np.argwhere(shown != 255)
        (top, left), (low, right) = where.min(axis=0), where.max(axis=0) + 1
        made.append(PILImage.fromarray(picture[top:low, left:right]))
    return made


TEMPLATES = _templates()


if __name__ == "__main__":
    main()
