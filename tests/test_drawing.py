"""Laws of drawing with a trained model: sizes, pictures to begin with, masks, requests of many kinds, repeated PNGs."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image as PILImage

from jobs.command_line import from_command_line
from jobs.wiring.sample import SampleConfig, sample_worker
from ldm.drawing import Drawing, Given, images_of, pixels_of
from ldm.registry import requests_of
from ldm.requests import Request, draw, fitted, fitted_mask, mask_from, picture_from
from ldm.samplers.guidance import GuidanceForm
from ldm.samplers.sample import SamplerConfig
from ldm.text_to_image import TextToImage, load_text_to_image
from ldm.training.local_launch import ignore
from ldm.training.loop import Progress
from tests.ranks import alone
from tests.tiny_latents import write_latents
from tests.tiny_training import run, tiny_config

SAMPLER = SamplerConfig(num_steps=4)
DRAWING = Drawing(sampler=SAMPLER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained for a few steps."""
    made = tmp_path_factory.mktemp("drawing")
    write_latents(made)
    run(tiny_config(made, "run", total_samples=32))
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> TextToImage:
    """The model, its denoiser moved to where words matter: so short a training leaves them next to nothing to say."""
    loaded = load_text_to_image(str(folder / "run" / "model"), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for weight in loaded._unet.parameters():
        weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return loaded


def picture_of(height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def config_of(folder: Path, root: Path, **more: object) -> SampleConfig:
    given = {"prompts": ("red", "a blue square"), "guidance": (1.0, 3.0), "sampler": SAMPLER, **more}
    return SampleConfig(root=str(root), record=str(folder / "record"), model=str(folder / "run" / "model"), **given)


def drawn(config: SampleConfig, report=ignore) -> list[Path]:
    return [Path(path) for path in sample_worker(config, alone(), report, lambda: False)["pictures"]]


def test_a_larger_size_than_trained_is_drawn_and_one_that_is_no_multiple_is_refused_with_the_nearest(
    model: TextToImage,
) -> None:
    assert (model.trained_size, model.multiple) == ((16, 16), 4)
    large = model.generate(["red"], seeds=[0], drawing=replace(DRAWING, height=24, width=40))
    assert large.shape == (1, 24, 40, 3)
    with pytest.raises(ValueError, match=r"multiples of 4 px, got 22 x 41 px; the nearest is 24 x 40 px"):
        model.generate(["red"], seeds=[0], drawing=replace(DRAWING, height=22, width=41))


def test_pixels_outside_the_mask_come_back_untouched_and_those_within_are_drawn(model: TextToImage) -> None:
    pictures = np.stack([picture_of(seed=1), picture_of(seed=2)])
    masks = np.zeros((2, 16, 16), bool)
    masks[0, 3:9, 5:7], masks[1, :, 8:] = True, True
    for strength in (0.5, 1.0):
        found = model.generate(
            ["red", "blue"],
            seeds=[1, 2],
            drawing=replace(DRAWING, strength=strength),
            given=Given(pixels=pictures, masks=masks),
        )
        assert (found[~masks] == pictures[~masks]).all()
        assert (found[masks] != pictures[masks]).mean() > 0.9


def test_a_weak_drawing_stays_with_the_picture_and_a_strong_one_leaves_it(model: TextToImage) -> None:
    picture = picture_of()
    with torch.no_grad():
        network = model._autoencoder
        clean = model.card.space.scaled_mode(network.encode(images_of(picture[None], torch.device("cpu"))))
        rebuilt = pixels_of(network.decode(model.card.space.unscaled(clean)))[0].astype(float)
    steps = replace(DRAWING, sampler=SamplerConfig(num_steps=50))
    distances = []
    for strength in (0.02, 0.3, 0.98):
        drawing = replace(steps, strength=strength)
        found = model.generate(["red"], seeds=[3], drawing=drawing, given=Given(pixels=picture[None]))[0]
        distances.append(np.abs(found - rebuilt).mean())
    assert distances[0] < distances[1] < distances[2]


def test_negative_prompts_lead_away_and_the_empty_one_is_what_is_led_away_from_without(model: TextToImage) -> None:
    plain = model.generate(["red", "blue"], seeds=[1, 2], guidance=[3.0, 3.0], drawing=DRAWING)
    same = model.generate(
        ["red", "blue"], seeds=[1, 2], guidance=[3.0, 3.0], negative_prompts=["", ""], drawing=DRAWING
    )
    assert (plain == same).all()
    led = model.generate(
        ["red", "blue"], seeds=[1, 2], guidance=[3.0, 3.0], negative_prompts=["a grey square", ""], drawing=DRAWING
    )
    assert (led[0] != plain[0]).any()
    assert np.abs(led[1].astype(int) - plain[1].astype(int)).max() <= 1


def test_guidance_forms_reach_the_drawing(model: TextToImage) -> None:
    plain = model.generate(["red"], seeds=[1], guidance=[5.0], drawing=DRAWING)
    never = replace(DRAWING, form=GuidanceForm(lowest_noise=1e6))
    assert (
        model.generate(["red"], seeds=[1], guidance=[5.0], drawing=never)
        == model.generate(["red"], seeds=[1], guidance=[1.0], drawing=DRAWING)
    ).all()
    for form in (GuidanceForm(rescale=0.9), GuidanceForm(threshold_quantile=0.9, threshold_floor=0.2)):
        assert (model.generate(["red"], seeds=[1], guidance=[5.0], drawing=replace(DRAWING, form=form)) != plain).any()


def test_the_same_batch_with_other_neighbours_gives_the_same_bits(model: TextToImage) -> None:
    one = model.generate(["red", "blue", "grey"], seeds=[7, 8, 9], drawing=DRAWING)
    other = model.generate(["white", "green", "red"], seeds=[1, 2, 7], guidance=[3.0] * 3, drawing=DRAWING)
    same = model.generate(["red", "x", "y"], seeds=[7, 3, 4], guidance=[3.0] * 3, drawing=DRAWING)
    assert model.card.guidance == 3.0
    assert (one[0] == same[0]).all()
    assert (one[0] == other[2]).all(), "an image does not depend on its place in the batch"


@pytest.mark.parametrize(
    "more, message",
    [
        ({"seeds": [1]}, "as there are prompts, 2: got 1 seeds"),
        ({"guidance": [1.0]}, "got 1 guidance"),
        ({"negative_prompts": ["a", "b", "c"]}, "got 3 negative_prompts"),
        ({"given": Given(pixels=picture_of()[None])}, "got 1 pixels"),
        ({"drawing": Drawing(strength=0.5)}, "strength 0.5 is of a picture to begin with, and none is given"),
        ({"given": Given(pixels=np.stack([picture_of()] * 2))}, "at strength 1 nothing of the picture is looked at"),
        ({"given": Given(classes=(1, 2))}, "this model is not told classes: it was trained without"),
        (
            {"given": Given(pixels=np.stack([picture_of(20, 16)] * 2)), "drawing": Drawing(height=16, strength=0.5)},
            "resize",
        ),
    ],
)
def test_what_does_not_fit_the_prompts_is_refused_with_both_numbers(model, more, message) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(["red", "blue"], **{"seeds": [1, 2], **more})


def test_masks_of_another_size_or_without_a_pixel_are_refused() -> None:
    with pytest.raises(ValueError, match=r"masks of shape \(1, 8, 16\) do not lie over pictures of .*\(1, 16, 16\)"):
        Given(pixels=picture_of()[None], masks=np.ones((1, 8, 16), bool))
    with pytest.raises(ValueError, match="no pixel that is to be drawn anew"):
        Given(pixels=picture_of()[None], masks=np.zeros((1, 16, 16), bool))
    with pytest.raises(ValueError, match="the mask of 'red' has 8 x 16 px, its picture 16 x 16 px"):
        Request(prompt="red", picture=picture_of(), mask=np.ones((8, 16), bool))
    with pytest.raises(ValueError, match="the mask of 'red' needs a picture"):
        Request(prompt="red", mask=np.ones((8, 16), bool))


def test_requests_of_many_kinds_come_back_in_their_order_and_those_of_a_kind_share_a_batch(
    model: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = replace(DRAWING, width=24)
    mask = np.zeros((16, 16), bool)
    mask[4:8, 4:8] = True
    requests = [
        Request(prompt="red", seed=1, drawing=DRAWING),
        Request(prompt="red", seed=1, drawing=wide),
        Request(prompt="blue", seed=2, drawing=DRAWING, guidance=1.0),
        Request(prompt="grey", seed=3, drawing=DRAWING, picture=picture_of(), mask=mask),
        Request(prompt="red", seed=4, drawing=wide, negative_prompt="blue"),
        Request(prompt="green", seed=5, drawing=DRAWING),
    ]
    batches: list[int] = []
    real = TextToImage.generate

    def generate(self: TextToImage, prompts: list[str], **more: object) -> np.ndarray:
        batches.append(len(prompts))
        return real(self, prompts, **more)

    monkeypatch.setattr(TextToImage, "generate", generate)
    done: list[int] = []
    found = draw(model, requests, batch_size=2, on_done=done.append)
    assert batches == [2, 1, 2, 1]
    assert done == [2, 3, 5, 6]
    assert [picture.shape for picture in found] == [(16, 24 if r.drawing == wide else 16, 3) for r in requests]
    for request, picture in zip(requests, found, strict=True):
        (by_itself,) = draw(model, [request])
        assert np.abs(by_itself.astype(int) - picture.astype(int)).max() <= 1
    assert (found[3][~mask] == picture_of()[~mask]).all()
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(model, [])


def png_of(image: PILImage.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_picture_comes_from_an_address_bytes_an_image_or_an_array_and_what_is_transparent_is_white(
    tmp_path: Path,
) -> None:
    image = PILImage.fromarray(picture_of(5, 7))
    (tmp_path / "a.png").write_bytes(png_of(image))
    for given in (str(tmp_path / "a.png"), png_of(image), image, picture_of(5, 7)):
        assert (picture_from(given) == picture_of(5, 7)).all()
    clear = image.convert("RGBA")
    clear.putpixel((2, 1), (0, 0, 0, 0))
    assert picture_from(clear)[1, 2].tolist() == [255, 255, 255]
    for wrong, message in (
        (b"no picture", "no picture that can be read"),
        (7, "an address, bytes, a PIL image or an array, got int"),
        (str(tmp_path / "none.png"), "none.png can't be read: FileNotFoundError"),
        (str(tmp_path), "can't be read: IsADirectoryError"),
        (np.zeros((4, 4)), r"uint8 of \(rows, columns, 3\), got float64 of \(4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            picture_from(wrong)
    grey = PILImage.fromarray(np.array([[0, 127], [128, 255]], np.uint8))
    assert mask_from(grey).tolist() == [[False, False], [True, True]]
    with pytest.raises(ValueError, match=r"bool of \(rows, columns\), got uint8"):
        mask_from(np.zeros((4, 4), np.uint8))


def test_a_fitted_picture_is_its_centre_and_its_mask_lies_over_it() -> None:
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, 10:30] = 255  # the square in the middle
    assert (fitted(picture, (10, 10)) > 230).all()
    mask = np.zeros((20, 40), bool)
    mask[:, :20] = True
    assert fitted_mask(mask, (10, 10))[:, :5].all()
    assert not fitted_mask(mask, (10, 10))[:, 5:].any()


def test_a_table_says_of_each_row_what_it_wants_and_empty_cells_have_defaults(model: TextToImage) -> None:
    card = model.card
    table = pd.DataFrame(
        {
            "prompt": ["red", "blue", "grey"],
            "seed": [5, math.nan, 6],
            "steps": [3, None, 9],
            "guidance": [math.nan, 2.0, math.nan],
            "height": [math.nan, 32, math.nan],
            "init_image": [None, None, png_of(PILImage.fromarray(picture_of()))],
            "strength": [math.nan, math.nan, 0.4],
        }
    )
    first, second, third = requests_of(table, {"seed": 40, "guidance": 7.0}, card)
    assert (first.seed, first.guidance, first.drawing.sampler.num_steps) == (5, 7.0, 3)
    assert (second.seed, second.guidance, second.drawing.height) == (41, 2.0, 32)
    assert second.drawing.sampler == card.sampler
    assert (third.drawing.strength, third.drawing.sampler.num_steps) == (0.4, 9)
    assert (third.picture == picture_of()).all()
    assert [request.seed for request in requests_of(["a", "b"], {"seed": 3}, card)] == [3, 4]
    assert [request.prompt for request in requests_of("one", {}, card)] == ["one"]
    assert requests_of(pd.DataFrame({"text": ["red"]}), {}, card)[0].prompt == "red"
    encoded = base64.b64encode(png_of(PILImage.fromarray(picture_of()))).decode()
    # What MLflow's server makes of JSON, by columns and by rows.
    for served in (
        {"prompt": ["red"], "seed": [7], "init_image": [encoded], "mask": [None]},
        [{"prompt": "red", "seed": 7, "init_image": f"data:image/png;base64,{encoded}", "mask": ""}],
    ):
        (request,) = requests_of(served, {}, card)
        assert (request.prompt, request.seed, request.mask) == ("red", 7, None)
        assert (request.picture == picture_of()).all()
    for wrong, message in (
        (pd.DataFrame({"text": ["a"], "seed": [1]}), "needs a column 'prompt'"),
        (pd.DataFrame({"prompt": ["a"], "sed": [1]}), r"unknown columns \['sed'\]; known are prompt, negative_prompt"),
        ([], "no prompts to draw"),
        (pd.DataFrame({"prompt": ["a", None]}), "a prompt is text, got nan"),
        (["a", 3], "a prompt is text, got 3"),
        ({"prompt": ["a"], "init_image": ["/etc/passwd"]}, "base64 of a PNG's or JPEG's bytes, no address"),
        ({"prompt": ["a"], "mask": ["http://169.254.169.254/"]}, "no address: got 'http"),
        ({"prompt": ["a"], "steps": [0]}, "num_steps must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            requests_of(wrong, {}, card)


@pytest.mark.parametrize("is_separate", [False, True])
def test_a_picture_is_repeated_by_what_stands_in_it(folder: Path, tmp_path: Path, is_separate: bool) -> None:
    config = config_of(
        folder,
        tmp_path / "first",
        prompts=("red 😀", "a blue square"),
        guidance=(0.00001, 3.0),
        is_separate=is_separate,
        negative_prompt="grey",
        form=GuidanceForm(lowest_noise=0.00002),
    )
    paths = drawn(config)
    assert len(paths) == (4 if is_separate else 1)
    assert [str(path) for path in paths] == config.picture_paths()
    for path in paths:
        asked = from_command_line(
            "sample", {"any": lambda _: config}, ["--repeat", str(path), "--root", str(tmp_path / "again")]
        )
        again = drawn(asked.config)
        assert [one.name for one in again] == [path.name]
        # A batch of four and one of one: what the processor rounds otherwise may show in the last bit.
        found, before = (np.asarray(PILImage.open(one)).astype(int) for one in (*again, path))
        assert np.abs(found - before).max() <= (1 if is_separate else 0)
    settings = json.loads(PILImage.open(paths[-1]).text["settings"])
    assert settings["prompts"] == (["a blue square"] if is_separate else ["red 😀", "a blue square"])
    assert settings["negative_prompt"] == "grey"
    assert not {"root", "record", "launch", "tracking"} & set(settings), "nothing of the machine goes with a picture"


def test_what_a_picture_was_drawn_with_must_be_there_to_repeat_it(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a.png", 1), ("b.png", 2)):
        PILImage.fromarray(picture_of(seed=seed)).save(tmp_path / name)
    config = config_of(folder, tmp_path / "drawn", picture=str(tmp_path / "a.png"), strength=0.5)
    (path,) = drawn(config)
    assert config.picture_paths() == [str(path)]
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes())
    assert config.picture_paths() != [str(path)], "another picture under the same name is another request"
    asked = from_command_line("sample", {"any": lambda _: config}, ["--repeat", str(path)]).config
    with pytest.raises(ValueError, match=r"a.png lies another picture than .*--file-digests takes what is there"):
        drawn(asked)
    with pytest.raises(ValueError, match="lies another model than the one that is asked for, 0000"):
        replace(config, model_digest="0" * 64).identified()
    with pytest.raises(ValueError, match=r"none.png can't be read: FileNotFoundError"):
        replace(config, picture=str(tmp_path / "none.png")).identified()


def test_a_picture_without_settings_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.png").write_bytes(png_of(PILImage.fromarray(picture_of())))
    config = config_of(folder, tmp_path)
    with pytest.raises(SystemExit) as stop:
        from_command_line("sample", {"any": lambda _: config}, ["--repeat", str(tmp_path / "plain.png")])
    assert stop.value.code == 2


def test_the_job_begins_with_a_picture_and_keeps_what_its_mask_keeps(folder: Path, tmp_path: Path) -> None:
    picture = picture_of(32, 32)
    PILImage.fromarray(picture).save(tmp_path / "picture.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    PILImage.fromarray(mask).save(tmp_path / "mask.png")
    config = config_of(
        folder,
        tmp_path / "drawn",
        picture=str(tmp_path / "picture.png"),
        mask=str(tmp_path / "mask.png"),
        height=32,
        width=32,
        is_separate=True,
    )
    for path in drawn(config):
        found = np.asarray(PILImage.open(path))
        assert (found[16:] == picture[16:]).all()
        assert (found[:16] != picture[:16]).mean() > 0.9
    PILImage.fromarray(mask[:8]).save(tmp_path / "low.png")
    with pytest.raises(ValueError, match="the mask has 32 x 8 px, the picture 32 x 32 px"):
        drawn(replace(config, mask=str(tmp_path / "low.png")))


def test_progress_tells_images_and_steps_a_second_and_prompts_that_are_cut(folder: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    drawn(config_of(folder, tmp_path, prompts=("red", "so many words " * 20), guidance=(1.0,)), told.append)
    (notice,) = [progress.notice for progress in told if progress.notice]
    assert notice.startswith(
        "1 of the prompts is longer than the 16 tokens that the model reads, and cut there: 'so many"
    )
    steps = [progress for progress in told if progress.total]
    assert [progress.done for progress in steps] == [0, 1, 1, 2]
    assert all(progress.metrics["steps_per_second"] > 0 for progress in steps)
    # Whatever the clock says, both are of the same time.
    ratios = [progress.metrics["images_per_second"] / progress.metrics["steps_per_second"] for progress in steps]
    assert ratios == pytest.approx([0.5, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mask": "m.png"}, "a mask needs a picture that it lies over"),
        ({"strength": 0.5}, "strength 0.5 is of a picture to begin with"),
        ({"picture": "p.png"}, "at strength 1 nothing of the picture is looked at"),
        ({"strength": 1.5}, r"strength must lie in \(0, 1\]"),
        ({"prompts": ()}, "at least one prompt"),
        ({"height": -8}, "can't be negative"),
    ],
)
def test_a_request_that_says_too_little_or_nonsense_is_refused(folder, tmp_path, wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(folder, tmp_path, **wrong)
