"""Laws of filters and marks around drawing: what is asked, what is refused, what is handed out, what a PNG says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from jobs.command_line import from_command_line
from jobs.detect import _detect
from jobs.wiring.sample import SampleConfig, sample_worker
from ldm.safety import Safety, SafetyConfig, key_digest, key_in
from ldm.samplers.sample import SamplerConfig
from ldm.text_to_image import load_text_to_image
from ldm.training.local_launch import LaunchConfig, Where, ignore
from ldm.training.loop import Progress
from ldm.training.tracking_config import TrackingConfig
from ldm.watermark import detect
from tests.image_bytes import natural
from tests.ranks import alone
from tests.tiny_latents import write_latents
from tests.tiny_training import run, tiny_config

HERE = "tests.test_safety"
KEY = "a key that nobody guesses"
HOUSE = Path(__file__).parents[1]

NO_FUNCTION = 7
asked: list[tuple[np.ndarray, str]] = []
"""What the picture filter below was asked."""


def no_knives(prompt: str) -> str:
    return "shows a weapon" if "knife" in prompt else ""


def no_red(pixels: np.ndarray, prompt: str) -> str:
    asked.append((pixels.copy(), prompt))
    pixels[:] = 0  # a filter's own doing, which must reach no picture
    return "is too red" if prompt.startswith("red") else ""


def says_nothing(*_: object) -> None:
    """No answer is no reason: it must say so."""


@pytest.fixture(autouse=True)
def nothing_asked_yet() -> None:
    asked.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained for a few steps."""
    made = tmp_path_factory.mktemp("safety")
    write_latents(made)
    run(tiny_config(made, "run", total_samples=16))
    return made


def config_of(folder: Path, root: Path, safety: SafetyConfig | None = None, **more: object) -> SampleConfig:
    given = {
        "root": str(root),
        "record": str(folder / "record"),
        "model": str(folder / "run" / "model"),
        "prompts": ("red", "a blue square"),
        "guidance": (1.0,),
        "sampler": SamplerConfig(num_steps=2),
        "height": 64,
        "width": 72,
        "safety": safety or SafetyConfig(),
        "launch": LaunchConfig(where=Where.HERE),
        "tracking": TrackingConfig(uri=""),
    }
    return SampleConfig(**{**given, **more})


def drawn(config: SampleConfig, report=ignore) -> list[Path]:
    return [Path(path) for path in sample_worker(config, alone(), report, lambda: False)["pictures"]]


def pixels_in(path: Path) -> np.ndarray:
    return np.asarray(PILImage.open(path).convert("RGB"))


def pictures(count: int) -> np.ndarray:
    return np.stack([np.asarray(natural(64, 64, seed)) for seed in range(count)])


def test_every_prompt_is_asked_about_and_without_a_filter_none_is_refused() -> None:
    prompts = ["a knife", "a spoon", "knife and fork"]
    found = Safety(SafetyConfig(prompt_filter=f"{HERE}:no_knives")).refused(prompts)
    assert found == ["shows a weapon", "", "shows a weapon"]
    assert Safety(SafetyConfig()).refused(prompts) == ["", "", ""]


def test_pictures_are_asked_about_unmarked_and_handed_out_marked_but_for_refused_ones_which_are_grey() -> None:
    given, prompts = pictures(3), ["blue", "red heart", "green"]
    kept = given.copy()
    safety = Safety(SafetyConfig(picture_filter=f"{HERE}:no_red", watermark=KEY))
    found, reasons = safety.finished(given, prompts)
    assert reasons == ["", "is too red", ""]
    assert [prompt for _, prompt in asked] == prompts
    assert all((seen == one).all() for (seen, _), one in zip(asked, kept, strict=True))
    assert (given == kept).all()
    assert (found[1] == 128).all()
    assert [detect(one, KEY).is_marked for one in found] == [True, False, True]
    for number in (0, 2):
        alone_found, _ = safety.finished(given[number : number + 1], prompts[number : number + 1])
        assert (alone_found[0] == found[number]).all()


def test_without_anything_asked_for_pictures_stay_as_they_are() -> None:
    given = pictures(2)
    found, reasons = Safety(SafetyConfig()).finished(given, ["a", "b"])
    assert (found == given).all()
    assert reasons == ["", ""]
    Safety(SafetyConfig()).check_size(8, 8)
    with pytest.raises(ValueError, match="at least 64 x 64 px, got 64 x 32 px"):
        Safety(SafetyConfig(watermark=KEY)).check_size(64, 32)


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_module:f", "prompt_filter 'no_such_module:f' can't be loaded: No module named 'no_such_module'"),
        (f"{HERE}:no_such_function", "the module tests.test_safety has no no_such_function"),
        (f"{HERE}:NO_FUNCTION", "is no function but int"),
        (HERE, "prompt_filter is MODULE:FUNCTION, got 'tests.test_safety'"),
        ("/etc/filter.py:f", "prompt_filter is MODULE:FUNCTION"),
        (".relative:f", "prompt_filter is MODULE:FUNCTION"),
    ],
)
def test_a_filter_that_is_none_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Safety(SafetyConfig(prompt_filter=name))


def test_a_filter_that_answers_no_text_is_refused() -> None:
    name = f"{HERE}:says_nothing"
    with pytest.raises(ValueError, match=r"prompt_filter must return the reason as text, or .* for none, got None"):
        Safety(SafetyConfig(prompt_filter=name)).refused(["a"])
    with pytest.raises(ValueError, match="picture_filter must return the reason as text"):
        Safety(SafetyConfig(picture_filter=name)).finished(pictures(1), ["a"])


def test_a_key_comes_from_a_file_too_and_a_key_that_another_digest_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key.txt").write_text(f"{KEY}\n")
    config = SafetyConfig(watermark_file=str(tmp_path / "key.txt"))
    assert config.identified() == SafetyConfig(watermark=KEY, watermark_digest=key_digest(KEY))
    assert config.identified().identified() == config.identified()
    assert config.identified().without_key() == SafetyConfig(watermark_digest=key_digest(KEY))
    (found,), _ = Safety(config).finished(pictures(1), ["a"])
    assert detect(found, KEY).is_marked
    with pytest.raises(ValueError, match=f"asks for the watermark of the key {key_digest(KEY)}, and no picture holds"):
        Safety(SafetyConfig(watermark_digest=key_digest(KEY)))
    with pytest.raises(ValueError, match=rf"given is {key_digest('x')}, the one that is asked for {key_digest(KEY)}"):
        Safety(SafetyConfig(watermark="x", watermark_digest=key_digest(KEY)))
    with pytest.raises(ValueError, match="give watermark or watermark_file"):
        SafetyConfig(watermark=KEY, watermark_file="key.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    for name, message in (
        ("empty.txt", "empty.txt is empty"),
        ("binary", "UnicodeDecodeError"),
        ("none", "FileNotFound"),
    ):
        with pytest.raises(ValueError, match=message):
            key_in(str(tmp_path / name))


def test_a_request_without_filters_and_marks_has_the_name_it_always_had(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path)
    assert "safety" not in config.to_dict()
    marked = replace(config, safety=SafetyConfig(watermark=KEY))
    other = replace(config, safety=SafetyConfig(watermark="another"))
    assert len({*config.picture_paths(), *marked.picture_paths(), *other.picture_paths()}) == 3


@pytest.mark.parametrize("is_separate", [False, True])
def test_drawn_pictures_carry_the_mark_and_never_the_key_and_are_repeated_with_it(
    folder: Path, tmp_path: Path, is_separate: bool
) -> None:
    prompts = ("a blue square",)  # one, for a batch of as many is the same to the bit
    config = config_of(
        folder, tmp_path / "first", SafetyConfig(watermark=KEY), prompts=prompts, is_separate=is_separate
    )
    (path,) = drawn(config)
    assert detect(pixels_in(path), KEY).is_marked
    assert not detect(pixels_in(path), "another").is_marked
    assert KEY.encode() not in path.read_bytes()
    assert KEY not in json.dumps(PILImage.open(path).text)
    settings = json.loads(PILImage.open(path).text["settings"])["safety"]
    assert settings["watermark_digest"] == key_digest(KEY)
    words = ["--repeat", str(path), "--root", str(tmp_path / "again")]
    (tmp_path / "key.txt").write_text(KEY)
    for key in (["--safety.watermark", KEY], ["--safety.watermark-file", str(tmp_path / "key.txt")]):
        (again,) = drawn(from_command_line("sample", {"any": lambda _: config}, [*words, *key]).config)
        assert again.name == path.name
        assert again.read_bytes() == path.read_bytes()
        again.unlink()
    with pytest.raises(ValueError, match="no picture holds a key: give it"):
        drawn(from_command_line("sample", {"any": lambda _: config}, words).config)
    with pytest.raises(ValueError, match="the one that is asked for"):
        drawn(from_command_line("sample", {"any": lambda _: config}, [*words, "--safety.watermark", "b"]).config)
    without = from_command_line("sample", {"any": lambda _: config}, [*words, "--safety.watermark-digest", ""]).config
    (bare,) = drawn(without)
    assert bare.name != path.name
    assert not detect(pixels_in(bare), KEY).is_marked


def test_a_prompt_that_is_refused_stops_before_the_model_is_loaded_and_all_are_named(
    folder: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "model"
    empty.mkdir()
    shutil.copy(folder / "run" / "model" / "model.json", empty)  # weights would be missed
    safety = SafetyConfig(prompt_filter=f"{HERE}:no_knives")
    prompts = ("a knife", "a spoon", "knife " * 50)
    with pytest.raises(ValueError, match="prompts must not be drawn") as refusal:
        drawn(config_of(folder, tmp_path, safety, model=str(empty), prompts=prompts))
    said = str(refusal.value)
    assert said.startswith(
        "2 of the 3 prompts must not be drawn, says the filter: 'a knife' (shows a weapon); 'knife kn"
    )
    assert len(said) < 250
    assert "spoon" not in said


@pytest.mark.parametrize("is_separate", [False, True])
def test_a_refused_picture_is_a_grey_cell_or_no_file_and_is_told(
    folder: Path, tmp_path: Path, is_separate: bool
) -> None:
    told: list[Progress] = []
    safety = SafetyConfig(picture_filter=f"{HERE}:no_red")
    config = config_of(folder, tmp_path, safety, is_separate=is_separate)
    paths = drawn(config, told.append)
    (notice,) = [progress.notice for progress in told if progress.notice]
    what = "left out" if is_separate else "grey"
    assert notice == f"pictures that the filter refuses are {what}: 'red' (is too red)"
    plain = [pixels_in(path) for path in drawn(replace(config, safety=SafetyConfig()))]
    if is_separate:
        assert [str(path) for path in paths] == config.picture_paths()[1:]
        assert not Path(config.picture_paths()[0]).exists()
        assert (pixels_in(paths[0]) == plain[1]).all()
        return
    (grid,) = [pixels_in(path) for path in paths]
    is_grey = (grid == 128).all(2)
    assert is_grey.sum() >= 0.9 * 128 * 114
    assert (is_grey & (plain[0] == 128).all(2)).sum() < 100
    assert (grid[160:] == plain[0][160:]).all(), "the row of the other prompt is as it was"


def test_what_a_filter_is_shown_is_what_the_model_drew(folder: Path, tmp_path: Path) -> None:
    safety = SafetyConfig(picture_filter=f"{HERE}:no_red", watermark=KEY)
    config = config_of(folder, tmp_path, safety)
    drawn(config)
    model = load_text_to_image(config.model, torch.device("cpu"))
    expected = model.generate(config.prompts, seeds=[0, 1], guidance=[1.0, 1.0], drawing=config.drawing)
    assert [prompt for _, prompt in asked] == list(config.prompts)
    assert (np.stack([seen for seen, _ in asked]) == expected).all()


def test_pictures_too_small_for_the_mark_are_refused_before_they_are_drawn_and_a_grid_of_them_is_not(
    folder: Path, tmp_path: Path
) -> None:
    config = config_of(folder, tmp_path, SafetyConfig(watermark=KEY), height=0, width=0)
    drawing: list[Progress] = []
    with pytest.raises(ValueError, match="at least 64 x 64 px, got 16 x 16 px"):
        drawn(replace(config, is_separate=True), drawing.append)
    assert not drawing
    (grid,) = drawn(config)
    assert detect(pixels_in(grid), KEY).is_marked


def run_job(*words: str, at: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    environment = {"PYTHONPATH": str(HOUSE), "PATH": "", "HOME": str(at), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True, check=False)


def test_the_jobs_draw_with_a_filter_of_the_folder_they_start_in_and_find_the_mark(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def pictures(pixels, prompt):\n    return 'red!' if prompt == 'red' else ''\n")
    (tmp_path / "key.txt").write_text(KEY)
    config = config_of(folder, tmp_path / "drawn", is_separate=True)
    (tmp_path / "sample.yaml").write_text(config.to_yaml())
    safety = ["--safety.picture-filter", "mine:pictures", "--safety.watermark-file", "key.txt"]
    done = run_job("jobs.sample", "--config", "sample.yaml", *safety, at=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "drawn").glob("*.png")
    assert f"picture   {path}" in done.stdout
    assert "refused   1 of 2 pictures, by the filter" in done.stdout
    assert "'red' (red!)" in done.stdout
    found = run_job("jobs.detect", str(path), "--key-file", "key.txt", at=tmp_path)
    assert (found.returncode, found.stdout.split()[-1]) == (0, "marked")


def exit_code(*pictures: object, **options: object) -> object:
    with pytest.raises(SystemExit) as stop:
        _detect(tuple(map(str, pictures)), **options)
    return stop.value.code


def test_the_detector_says_of_each_picture_and_by_its_exit_code_whether_all_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = pictures(1)
    (found,), _ = Safety(SafetyConfig(watermark=KEY)).finished(given, ["a"])
    plain, marked, cut = (tmp_path / f"{name}.png" for name in ("plain", "marked", "cut"))
    for path, pixels in ((plain, given[0]), (marked, found), (cut, found[2:, 3:])):
        PILImage.fromarray(pixels).save(path)
    assert exit_code(marked, key=KEY) == 0
    capsys.readouterr()
    assert exit_code(plain, marked, key=KEY) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert "not marked (p must be below 1e-06)" in first
    assert second.endswith("  marked")
    assert exit_code(cut, key=KEY) == 1
    assert exit_code(cut, key=KEY, is_crop=True) == 0


def test_the_detector_refuses_what_it_can_not_look_at(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for words, options, message in (
        (["a.png"], {}, "one key are needed"),
        (["a.png"], {"key": KEY, "key_file": "key.txt"}, "one key are needed"),
        ([], {"key": KEY}, "pictures and one key are needed"),
        ([str(tmp_path / "text.png")], {"key": KEY}, "text.png can't be read: UnidentifiedImageError"),
        ([str(tmp_path / "none.png")], {"key": KEY}, "none.png can't be read: FileNotFoundError"),
    ):
        with pytest.raises(ValueError, match=message):
            _detect(tuple(words), **options)
