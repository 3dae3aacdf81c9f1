"""Laws of the tasks of drawing: tiles, outpainting, the way between two prompts and seeds, and what each task needs."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import Tensor

from jobs.command_line import from_command_line
from jobs.wiring.picture_grid import LABEL_WIDTH, grid_picture
from jobs.wiring.picture_settings import repeated_here, settings_of
from jobs.wiring.sample import SampleConfig
from jobs.wiring.sample_tasks import SampleTask, with_task
from ldm.drawing import Given
from ldm.registry import requests_of
from ldm.request_table import fitted_pictures
from ldm.requests import draw, outpainted
from ldm.safety import SafetyConfig
from ldm.samplers.sample import initial_noise, step_noise
from ldm.samplers.tasks import Between, seeded_noise
from ldm.samplers.tiles import tiled_network
from ldm.text_to_image import TextToImage
from ldm.types import Condition
from ldm.watermark import detect
from tests.test_drawing import DRAWING, SAMPLER, config_of, drawn, folder, model, picture_of, png_of

__all__ = ["folder", "model"]  # fixtures: a small trained model

SHAPE = (4, 16, 16)


def local(noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """A network whose positions see only themselves, and what lies beside them."""
    beside = 0 if condition.spatial is None else condition.spatial.mean(dim=1, keepdim=True)
    shown = 0 if condition.semantic_map is None else condition.semantic_map[:, None, 1::2, 1::2]
    return noisy * timestep[:, None, None, None] + beside + shown


@pytest.mark.parametrize("height, width, tile", [(16, 16, 8), (8, 24, 8), (20, 12, 8), (16, 16, 16), (7, 31, 6)])
def test_tiles_of_a_network_that_sees_points_are_the_whole(height: int, width: int, tile: int) -> None:
    torch.manual_seed(0)
    noisy, time = torch.randn(2, 4, height, width, dtype=torch.float64), torch.tensor([3.0, 0.5], dtype=torch.float64)
    condition = Condition(
        spatial=torch.randn(2, 3, height, width, dtype=torch.float64),
        semantic_map=torch.randint(-1, 9, (2, 2 * height, 2 * width)),
    )
    found = tiled_network(local, tile)(noisy, time, condition)
    torch.testing.assert_close(found, local(noisy, time, condition), rtol=0, atol=1e-12)


def test_no_tile_is_larger_than_asked_and_each_sees_all_words() -> None:
    seen: list[tuple[int, ...]] = []

    def network(noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        assert condition.states is states
        seen.append(tuple(noisy.shape))
        return noisy

    states = torch.randn(1, 5, 3)
    tiled_network(network, 8)(torch.randn(1, 4, 24, 20), torch.zeros(1), Condition(states=states))
    assert len(seen) == 4 * 3  # at least two positions are shared
    assert set(seen) == {(1, 4, 8, 8)}


def test_a_picture_in_tiles_is_of_the_size_asked_and_of_one_tile_is_the_plain_one(model: TextToImage) -> None:
    sizes: list[tuple[int, ...]] = []
    hook = model._unet.register_forward_hook(lambda _, inputs, __: sizes.append(tuple(inputs[0].shape[-2:])))
    try:
        large = model.generate(["red"], seeds=[0], drawing=replace(DRAWING, height=40, width=24, tile=16))
    finally:
        hook.remove()
    assert large.shape == (1, 40, 24, 3)
    assert set(sizes) == {(8, 8)}  # the autoencoder halves
    plain = model.generate(["red"], seeds=[0], drawing=DRAWING)
    assert (model.generate(["red"], seeds=[0], drawing=replace(DRAWING, tile=16)) == plain).all()
    for tile in (4, 10):
        with pytest.raises(ValueError, match=f"a side of 8 px at least, in steps of 4, got {tile}"):
            model.generate(["red"], seeds=[0], drawing=replace(DRAWING, tile=tile))


def test_an_outpainted_picture_stays_to_the_pixel_and_what_is_around_it_is_drawn(model: TextToImage) -> None:
    picture = picture_of(seed=4)
    canvas, room = outpainted(picture, (8, 0, 16, 4))
    assert canvas.shape == (20, 40, 3)
    assert (~room).sum() == 16 * 16
    found = model.generate(["red"], seeds=[0], drawing=DRAWING, given=Given(pixels=canvas[None], masks=room[None]))[0]
    assert (found[:16, 8:24] == picture).all()
    assert (found[room] != canvas[room]).mean() > 0.9
    for margins in ((0, 0, 0, 0), (4, -4, 0, 0)):
        with pytest.raises(ValueError, match="one at least above 0: got"):
            outpainted(picture, margins)


def test_a_grid_has_a_column_of_names_only_where_a_row_has_one() -> None:
    images = np.stack([picture_of(seed=seed) for seed in range(4)])
    named, plain = (grid_picture(images, labels, (1.0, 2.0)) for labels in (("a", ""), ("", "")))
    assert named.width - plain.width == LABEL_WIDTH
    assert (np.asarray(named)[:, LABEL_WIDTH:] == np.asarray(plain)).all()


def test_between_two_seeds_lie_noises_of_their_length_and_the_ends_are_theirs() -> None:
    seeds = [5, Between(5, 9, 0.0), Between(5, 9, 0.5), Between(5, 9, 1.0), 9]
    noise, draw = seeded_noise(seeds, SHAPE)
    one, other = (initial_noise(0, [seed], SHAPE)[0] for seed in (5, 9))
    for row, end in ((0, one), (1, one), (3, other), (4, other)):
        torch.testing.assert_close(noise[row], end, rtol=0, atol=1e-6)
    assert float(noise[2].norm()) == pytest.approx(float((one.norm() + other.norm()) / 2), rel=0.02)
    middle = torch.nn.functional.cosine_similarity(noise[2].flatten(), one.flatten(), dim=0)
    assert float(middle) == pytest.approx(0.5**0.5, abs=0.05)
    steps = draw(3)
    torch.testing.assert_close(steps[3], step_noise(0, [9], SHAPE)(3)[0], rtol=0, atol=1e-6)
    assert (seeded_noise([5, 9], SHAPE)[0] == initial_noise(0, [5, 9], SHAPE)).all()
    with pytest.raises(ValueError, match=r"lies in \[0, 1\], got 1.5"):
        Between(1, 2, 1.5)


def test_the_way_between_two_prompts_begins_and_ends_with_their_own_pictures(model: TextToImage) -> None:
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    ways = [Between("red", "a blue square", share) for share in shares]
    seeds = [Between(1, 2, share) for share in shares]
    found = model.generate(ways, seeds=seeds, guidance=[3.0] * 5, drawing=DRAWING).astype(int)
    plain = model.generate(["red", "a blue square"], seeds=[1, 2], guidance=[3.0] * 2, drawing=DRAWING).astype(int)
    assert np.abs(found[0] - plain[0]).max() <= 1
    assert np.abs(found[-1] - plain[1]).max() <= 1
    whole = np.abs(found[0] - found[-1]).mean()
    assert all(0 < np.abs(one - other).mean() < whole for one, other in zip(found, found[1:], strict=False))


def test_a_served_table_asks_for_places_on_a_way_and_for_margins(model: TextToImage) -> None:
    picture = picture_of()
    encoded = base64.b64encode(png_of(PILImage.fromarray(picture))).decode()
    table = {
        "prompt": ["red", "red", "red"],
        "seed": [1, 1, 4],
        "steps": [SAMPLER.num_steps] * 3,
        "guidance": [3.0] * 3,
        "to_prompt": ["a blue square", None, None],
        "to_seed": [2, 2, None],
        "share": [0.5, 1, None],
        "init_image": [None, None, encoded],
        "margins": [None, None, [0, 0, 8, 0]],
    }
    requests = requests_of(table, {}, model.card)
    both, seed_only, wider = draw(model, requests)
    ways = [Between("red", "a blue square", 0.5)], [Between(1, 2, 0.5)]
    drawing = replace(DRAWING, sampler=SAMPLER)
    assert (both == model.generate(ways[0], seeds=ways[1], guidance=[3.0], drawing=drawing)[0]).all()
    last = model.generate(["red"], seeds=[2], guidance=[3.0], drawing=drawing)[0].astype(int)
    assert np.abs(seed_only - last).max() <= 1
    assert wider.shape == (picture.shape[0], picture.shape[1] + 8, 3)
    assert (wider[:, : picture.shape[1]] == picture).all()
    for wrong, message in (
        ({"prompt": ["red"], "share": [0.5]}, "lies on a way if it is said where that leads"),
        ({"prompt": ["red"], "to_seed": [3]}, "got to_prompt None, to_seed 3, share None"),
        ({"prompt": ["red"], "to_seed": [3], "share": [1.5]}, r"a share of the way lies in \[0, 1\], got 1.5"),
        ({"prompt": ["red"], "to_seed": [-3], "share": [0.5]}, "a seed lies in"),
        ({"prompt": ["red"], "init_image": [encoded], "margins": [[10**12, 0, 0, 0]]}, "none above 16,384"),
        ({"prompt": ["red"], "margins": [[0, 0, 8, 0]]}, "margins are drawn around an init_image"),
        ({"prompt": ["red"], "init_image": [encoded], "margins": [8]}, "margins are pixels at left, top, right"),
        ({"prompt": ["red"], "init_image": [encoded], "margins": [[0, 0, 0, 0]]}, "one at least above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            requests_of(wrong, {}, model.card)


def test_a_map_lies_over_the_margins_too_and_a_mask_over_its_picture() -> None:
    given = {"init_image": picture_of(), "mask": np.ones((16, 16), bool), "semantic_map": np.zeros((16, 24), np.int64)}
    cut = fitted_pictures(given, (8, 8), (8, 12))
    assert {name: array.shape[:2] for name, array in cut.items()} == {
        "init_image": (8, 8),
        "mask": (8, 8),
        "semantic_map": (8, 12),
    }


@pytest.mark.parametrize("is_separate", [False, True])
def test_the_job_interpolates_and_each_picture_is_repeated_by_its_own_settings(
    folder: Path, tmp_path: Path, is_separate: bool
) -> None:
    config = config_of(
        folder, tmp_path, task=SampleTask.INTERPOLATE, shares=(0.0, 0.5), guidance=(2.0,), is_separate=is_separate
    )
    paths = drawn(config)
    assert len(set(paths)) == (2 if is_separate else 1)
    for path in paths:
        read = from_command_line(
            "sample",
            {"tiny": lambda home: config_of(folder, tmp_path)},
            ["--repeat", str(path), "--root", str(tmp_path / "again")],
        ).config
        assert read.task is SampleTask.INTERPOLATE
        (again,) = drawn(read)
        tolerance = 0 if not is_separate else 1  # another number in the batch
        assert np.abs(pixels_at(again) - pixels_at(path)).max() <= tolerance


def pixels_at(path: Path) -> np.ndarray:
    return np.asarray(PILImage.open(path)).astype(int)


def outpainting(folder: Path, tmp_path: Path, **more: object) -> SampleConfig:
    """Return the request of one small picture with more around it."""
    PILImage.fromarray(picture_of(seed=7)).save(tmp_path / "a.png")
    begun = {"task": SampleTask.OUTPAINT, "picture": str(tmp_path / "a.png"), "guidance": (1.0,), "prompts": ("red",)}
    return config_of(folder, tmp_path, **begun, is_separate=True, **more)


def test_the_job_outpaints(folder: Path, tmp_path: Path) -> None:
    config = outpainting(folder, tmp_path, margins=(0, 8, 8, 0))
    (path,) = drawn(config)
    assert pixels_at(path).shape == (24, 24, 3)
    assert (pixels_at(path)[8:, :16] == picture_of(seed=7)).all()


@pytest.mark.parametrize(
    "task, more, message",
    [
        (SampleTask.VARY, {}, "vary needs --picture"),
        (SampleTask.VARY, {"picture": "a.png"}, "nothing of the picture is looked at"),
        (SampleTask.INPAINT, {"picture": "a.png"}, "inpaint needs --mask"),
        (SampleTask.OUTPAINT, {"picture": "a.png"}, "outpaint needs --margins"),
        (SampleTask.OUTPAINT, {"picture": "a.png", "margins": (1, 0, 0, 0), "mask": "m.png"}, "takes no --mask"),
        (SampleTask.DRAW, {"margins": (1, 0, 0, 0)}, "python -m jobs.sample outpaint"),
        (SampleTask.UPSCALE, {}, "upscale needs --small"),
        (SampleTask.VARY, {"picture": "a.png", "strength": 0.5, "small": "b.png"}, "vary takes no --small"),
        (SampleTask.INTERPOLATE, {"prompts": ("a",)}, "two in all"),
        (SampleTask.INTERPOLATE, {"shares": ()}, "interpolate needs --shares"),
    ],
)
def test_a_task_without_what_it_needs_is_refused_by_the_option(
    task: SampleTask, more: dict[str, object], message: str
) -> None:
    given = {"prompts": ("red", "blue"), "sampler": SAMPLER, "root": "r", "record": "c", "model": "m", **more}
    with pytest.raises(ValueError, match=message):
        SampleConfig(task=task, **given)


def test_a_task_stands_before_the_recipe_or_is_an_option() -> None:
    assert with_task(["inpaint", "folder", "--seed", "3"]) == ["folder", "--seed", "3", "--task", "inpaint"]
    assert with_task(["folder", "--task", "vary"]) == ["folder", "--task", "vary"]
    assert with_task([]) == []


def test_a_small_picture_of_another_shape_than_the_drawing_is_refused(model: TextToImage) -> None:
    told = replace(model.card.conditioning, has_low_res=True)
    model.card, card = replace(model.card, conditioning=told), model.card
    try:
        with pytest.raises(ValueError, match="of 4 x 8 px has another shape than a drawing of 16 x 16 px"):
            model.generate(["a"], seeds=[0], given=Given(small=np.zeros((1, 4, 8, 3), np.uint8)))
    finally:
        model.card = card


def test_maps_of_another_size_than_the_drawing_are_refused(model: TextToImage) -> None:
    told = replace(model.card.conditioning, map_classes=3)
    model.card, card = replace(model.card, conditioning=told), model.card
    try:
        given = Given(
            pixels=picture_of(24, 16)[None], masks=np.ones((1, 24, 16), bool), maps=np.zeros((1, 16, 16), int)
        )
        with pytest.raises(ValueError, match="maps of 16 x 16 px do not lie over a drawing of 24 x 16 px"):
            model.generate(["a"], seeds=[0], given=given)
    finally:
        model.card = card


def no_filter(prompt: str) -> str:
    """Must never be asked."""
    raise AssertionError("a stranger's picture named code to run")


def test_a_picture_from_a_stranger_names_no_code_to_run_and_no_file_to_read(folder: Path, tmp_path: Path) -> None:
    recipe = config_of(folder, tmp_path)
    evil = {
        "type": "SafetyConfig",
        "prompt_filter": f"{__name__}:no_filter",
        "picture_filter": "os:system",
        "watermark": "",
        "watermark_file": "/etc/hostname",
        "watermark_digest": "",
    }
    read = repeated_here(recipe, {**settings_of(recipe), "safety": evil})
    assert read.safety == SafetyConfig()
    assert drawn(read)
    own = SafetyConfig(prompt_filter=f"{__name__}:let_all_through")
    assert repeated_here(replace(recipe, safety=own), {**settings_of(recipe), "safety": evil}).safety == own


def let_all_through(prompt: str) -> str:
    """A filter of the recipe's own."""
    return ""


def test_an_outpainted_picture_is_large_enough_for_the_mark_if_its_canvas_is(folder: Path, tmp_path: Path) -> None:
    config = outpainting(folder, tmp_path, margins=(0, 0, 48, 48), safety=SafetyConfig(watermark="key"))
    (path,) = drawn(config)
    assert detect(pixels_at(path).astype(np.uint8), "key").is_marked
