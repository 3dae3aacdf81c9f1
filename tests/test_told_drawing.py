"""Drawing by what a denoiser is told beside text: what is given by hand is told as a cache tells it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from jobs.wiring.sample import SampleConfig, sample_worker
from jobs.wiring.sample_tasks import SampleTask
from jobs.wiring.train_ldm import row_conditions
from ldm.conditioning.masks import random_mask
from ldm.drawing import Drawing, Given
from ldm.registry import requests_of
from ldm.request_table import boxes_in
from ldm.requests import Request, draw, layout_from, map_from
from ldm.samplers.sample import SamplerConfig
from ldm.text_to_image import TextToImage, load_text_to_image
from ldm.training.local_launch import ignore
from ldm.types import Condition, LatentBatch
from pipeline.images import decode_pixels
from pipeline.latent_plan import token_reader
from pipeline.loader import LatentLoader
from pipeline.store.manifest import load_manifest
from pipeline.store.schema import Split, key_of
from tests.ranks import alone
from tests.test_conditional_training import COLOURS, COLUMNS, NUM_ROWS, SIDE, TOLD, folder, square, training
from tests.tiny_training import run

__all__ = ["folder"]  # the fixture: a dataset of squares and its caches
NAMES = [
    "class",
    "layout",
    "boxes",
    "map",
    "small image",
    "noisy small image",
    "masked image",
    "sizes and vector",
    "hybrid",
    "trained text",
]
ROWS = 5
DRAWING = Drawing(sampler=SamplerConfig(num_steps=2))


@pytest.fixture(scope="module", params=NAMES)
def told(request: pytest.FixtureRequest, folder: Path) -> tuple[TextToImage, LatentBatch, Condition]:
    """A model that is told something, held-out rows of its cache, and what it is told of them."""
    name = request.param
    config = training(folder, name, 16)
    config = replace(config, root=str(folder / f"drawing {name}"), record=str(folder / f"drawing record {name}"))
    run(config)
    manifest = load_manifest(config.latents)
    read_tokens = token_reader(manifest, config.text, config.conditioning.text, torch.device("cpu"))
    batch = LatentLoader(manifest, config.loader(Split.VALIDATION), read_tokens=read_tokens).rows(0, ROWS)
    model = load_text_to_image(config.model_folder, torch.device("cpu"))
    return model, batch, row_conditions(config, manifest).whole(batch)


def requests_for(batch: LatentBatch, model: TextToImage) -> list[Request]:
    """Return what asks for the rows of a batch, from the pictures that they were made of."""
    config = model.card.conditioning
    made = []
    numbers = {key_of(f"square {number}"): number for number in range(sum(NUM_ROWS.values()))}
    for place, key in enumerate(batch.keys):
        row = square(numbers[key])
        colour = tuple(COLOURS)[numbers[key] % 3]
        pixels = decode_pixels(row["png"])
        inside = map_from(row["map.png"])
        mask = None
        if config.has_masked_image:
            dice = np.random.default_rng([COLUMNS.mask_seed, int(key, 16)])
            masks = [random_mask(dice, SIDE, SIDE) for _ in range(COLUMNS.num_masks)]
            (mask,) = [each for each in masks if (each[1::2, 1::2] == batch.columns["mask"][place, 0].numpy()).all()]
        where = np.argwhere(inside == 1)
        (top, left), (bottom, right) = where.min(axis=0) / SIDE, (where.max(axis=0) + 1) / SIDE
        small = np.asarray(Image.fromarray(pixels).resize((SIDE // 2, SIDE // 2), Image.Resampling.BICUBIC))
        made.append(
            Request(
                prompt=row["txt"].decode(),
                drawing=DRAWING,
                class_id=list(COLOURS).index(colour) if config.num_classes else None,
                layout=((list(COLOURS).index(colour), left, top, right, bottom),) if config.has_layout else None,
                semantic_map=inside if config.map_classes else None,
                small=small if config.has_low_res else None,
                picture=pixels if config.has_masked_image else None,
                mask=None if mask is None else mask.astype(bool),
            )
        )
    return made


def test_what_is_given_is_told_as_the_cache_of_the_same_picture_tells_it(
    told: tuple[TextToImage, LatentBatch, Condition],
) -> None:
    model, batch, expected = told
    requests = requests_for(batch, model)
    found = []
    for request, sample in zip(requests, batch.samples.tolist(), strict=True):
        parts = request.given()
        given = Given(
            **{name: (part,) if name in ("classes", "layouts") else np.stack([part]) for name, part in parts.items()}
        )
        found.append(model._told(model.condition([request.prompt]), given, [sample], (SIDE, SIDE), Drawing()))
    joined = Condition.joined(found)
    for part in fields(Condition):
        one, other = getattr(joined, part.name), getattr(expected, part.name)
        assert (one is None) == (other is None), part.name
        if one is not None:
            # Resizing in the dataset goes over linear light or other filters; latents are stored in half precision.
            tolerance = 0.3 if part.name == "spatial" and model.card.conditioning.has_low_res else 5e-3
            torch.testing.assert_close(one.float(), other.float(), rtol=1e-2, atol=tolerance, msg=part.name)


def test_it_is_drawn_and_what_lacks_or_is_idle_is_refused_by_name(
    told: tuple[TextToImage, LatentBatch, Condition],
) -> None:
    model, batch, _ = told
    requests = requests_for(batch, model)
    pictures = draw(model, requests)
    assert [picture.shape for picture in pictures] == [(SIDE, SIDE, 3)] * ROWS
    for request, picture in zip(requests, pictures, strict=True):
        if request.mask is not None:
            assert (picture[~request.mask] == request.picture[~request.mask]).all()
    needed = set(requests[0].given()) - {"pixels"}
    if needed:
        with pytest.raises(ValueError, match=r"this model is told .*(classes|layouts|maps|small|masks)"):
            draw(model, [Request(prompt="", drawing=DRAWING)])
    idle = {"classes": (0,), "layouts": ((),)}
    name = next(name for name in idle if name not in needed)
    with pytest.raises(ValueError, match=f"this model is not told {name}|this model is told"):
        model.generate([""], seeds=[0], given=Given(**{name: idle[name]}))


def test_a_table_names_classes_layouts_maps_and_small_pictures(
    told: tuple[TextToImage, LatentBatch, Condition],
) -> None:
    model, _, _ = told
    table = pd.DataFrame(
        {
            "prompt": ["a", "b"],
            "class_id": [2, None],
            "layout": [[[1, 0.0, 0.1, 0.5, 0.6]], None],
            "semantic_map": [np.zeros((4, 4), np.uint8), None],
            "small": [np.zeros((8, 8, 3), np.uint8), None],
        }
    )
    first, second = requests_of(table, {}, model.card)
    assert (first.class_id, first.layout) == (2, ((1, 0.0, 0.1, 0.5, 0.6),))
    assert set(first.given()) == {"classes", "layouts", "maps", "small"}
    assert second.given() == {}


def test_the_job_draws_by_what_the_model_is_told(
    told: tuple[TextToImage, LatentBatch, Condition], folder: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, batch, _ = told
    name = request.node.callspec.params["told"]
    first = requests_for(batch, model)[0]
    places = {}
    numbers = None if first.semantic_map is None else first.semantic_map.astype(np.uint8)
    shown = {
        "picture": first.picture,
        "mask": None if first.mask is None else np.where(first.mask, 255, 0).astype(np.uint8),
        "semantic_map": numbers,
        "small": first.small,
    }
    for part, pixels in shown.items():
        if pixels is not None:
            Image.fromarray(pixels).save(tmp_path / f"{part}.png")
            places[part] = str(tmp_path / f"{part}.png")
    if first.class_id is not None:
        places["classes"] = (first.class_id,)
    if first.layout is not None:
        places["layouts"] = ("; ".join(" ".join(map(str, box)) for box in first.layout),)
    config = SampleConfig(
        root=str(tmp_path / "drawn"),
        record=str(tmp_path / "record"),
        model=str(folder / f"drawing {name}" / "model"),
        prompts=(first.prompt,),
        guidance=(2.0,),
        sampler=DRAWING.sampler,
        is_separate=True,
        **places,
    )
    (path,) = sample_worker(config, alone(), ignore, lambda: False)["pictures"]
    (expected,) = draw(model, [replace(first, guidance=2.0)], batch_size=1)
    assert (np.asarray(Image.open(path)) == expected).all()


def test_a_layout_that_is_none_is_refused_as_it_was_said(folder: Path, tmp_path: Path) -> None:
    given = {"root": str(tmp_path), "record": str(tmp_path), "model": "", "prompts": ("a", "b")}
    with pytest.raises(ValueError, match="classes are one for each of the 2 prompts, got 1: give as many --prompts"):
        SampleConfig(**given, classes=(1,))
    with pytest.raises(ValueError, match="interpolate knows no way between classes or layouts"):
        SampleConfig(**given, layouts=("1 0 0 1 1",) * 4, task=SampleTask.INTERPOLATE)
    with pytest.raises(ValueError, match="a layout is 'CLASS LEFT TOP RIGHT BOTTOM; ...', all numbers, got '1 a b'"):
        boxes_in("1 a b")


@pytest.mark.parametrize(
    "box, reason",
    [
        ((1, 0.5, 0.1, 0.4, 0.6), "1 0.5 0.1 0.4 0.6, has no room between left and right"),
        ((1, 0.0, 0.1, 0.4), "has 4 numbers"),
        ((1, 0.0, 0.1, 1.6, 0.6), "has sides that are no shares of the picture, from 0 to 1"),
        ((1, -0.1, 0.1, 0.6, 0.6), "has sides that are no shares"),
        ((1.5, 0.0, 0.1, 0.6, 0.6), "has no class that is a whole number"),
        ((-1, 0.0, 0.1, 0.6, 0.6), "has no class that is a whole number"),
    ],
)
def test_a_box_that_is_none_is_refused_with_its_place_and_reason(box: tuple[float, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=f"box 2, .*{reason}"):
        layout_from([(1, 0.0, 0.0, 1.0, 1.0), box])


def test_boxes_of_an_unknown_class_or_too_many_are_refused(folder: Path) -> None:
    config = training(folder, "boxes", 16)
    config = replace(config, root=str(folder / "few"), record=str(folder / "few record"))
    run(config)
    model = load_text_to_image(config.model_folder, torch.device("cpu"))
    box = (2, 0.1, 0.1, 0.6, 0.9)
    for boxes, reason in (
        ((box, (3, *box[1:])), "numbers below 3 .* a box's class has 3"),
        ((box,) * 3, "reads 2 boxes"),
    ):
        with pytest.raises(ValueError, match=reason):
            model.generate([""], seeds=[0], given=Given(layouts=(boxes,)), drawing=DRAWING)
    with pytest.raises(ValueError, match="told layouts, which must be given .*: jobs.sample --layouts"):
        model.generate([""], seeds=[0], drawing=DRAWING)


def test_a_map_is_read_from_numbers_or_a_picture_of_them() -> None:
    numbers = np.array([[0, 3], [255, 7]], np.uint8)
    palette = Image.fromarray(numbers)
    palette = palette.convert("P")
    palette.putpalette([value for number in range(256) for value in (255 - number, 0, number)])
    palette.putdata(numbers.flatten().tolist())
    for given in (Image.fromarray(numbers), palette):
        assert map_from(given).tolist() == [[0, 3], [-1, 7]]
    assert map_from(numbers.astype(np.int32) - 1).tolist() == [[-1, 2], [254, 6]]
    with pytest.raises(ValueError, match=r"integer of \(rows, columns\), got float64"):
        map_from(np.zeros((2, 2)))


def test_as_many_are_needed_of_each_and_classes_must_be_known(folder: Path) -> None:
    with pytest.raises(ValueError, match="as many are needed of each: got 2 classes, 1 layouts"):
        Given(classes=(0, 1), layouts=((),))
    config = training(folder, "class", 16)
    config = replace(config, root=str(folder / "known"), record=str(folder / "known record"))
    run(config)
    model = load_text_to_image(config.model_folder, torch.device("cpu"))
    assert TOLD["class"] == model.card.conditioning
    with pytest.raises(ValueError, match="a class has 3"):
        model.generate([""], seeds=[0], given=Given(classes=(3,)), drawing=DRAWING)
    none = model.generate([""], seeds=[0], given=Given(classes=(-1,)), drawing=DRAWING)
    assert none.shape == (1, SIDE, SIDE, 3)
