"""Laws of drawing files of prompts: each row once, the same bytes however it is done, what is there left alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image as PILImage

from jobs.wiring.generate import draw_file
from jobs.wiring.sample import SampleConfig
from ldm.conditioning.text import TextTower, TowerOutput
from ldm.model_card import load_card
from ldm.model_sizes import model_sizes
from ldm.storage import remove_file
from ldm.text_to_image import TextToImage, load_text_to_image
from ldm.training.local_launch import LaunchConfig
from ldm.training.tracking_config import TrackingConfig
from pipeline import generate
from pipeline.generate_config import GenerateConfig
from pipeline.generate_plan import plan_generate, verify_generated
from pipeline.images import decode_pixels
from pipeline.ingest.transforms import ImageFormat
from pipeline.plan import missing
from pipeline.run import run
from pipeline.store.manifest import claim_root, commit_shard, load_manifest
from tests.small_datasets import facts_of, lines_of_dataset, rows_of
from tests.tiny_model import (
    DRAWING,
    PROMPTS,
    SIZE,
    draw_missing,
    drawn_file,
    generate_config,
    root_of,
    shard_files,
    write_lines,
    write_model,
    write_table,
)

BATCH = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model: Path) -> TextToImage:
    return load_text_to_image(str(model), torch.device("cpu"))


@pytest.fixture(scope="module")
def drawn(model: Path, tmp_path_factory: pytest.TempPathFactory) -> GenerateConfig:
    """Ten prompts in three tars, drawn in this process."""
    folder = tmp_path_factory.mktemp("drawn")
    config = generate_config(model, write_lines(folder / "prompts.txt", PROMPTS), folder / "generated")
    draw_missing(plan_generate(config))
    return config


def test_every_prompt_is_drawn_once_and_says_all_that_made_it(drawn: GenerateConfig) -> None:
    rows = rows_of(root_of(drawn))
    assert sorted(row["txt"].decode() for row in rows.values()) == sorted(PROMPTS)
    lines = lines_of_dataset(root_of(drawn))
    assert [line["caption"] for line in lines] == list(PROMPTS)
    assert [line["key"] for line in lines] == list(rows)
    for key, row in rows.items():
        facts = json.loads(row["json"])
        assert facts["prompt"] == row["txt"].decode()
        assert (facts["width"], facts["height"], facts["steps"], facts["guidance"]) == (SIZE, SIZE, 3, 3.0)
        assert facts["model"] == plan_generate(drawn).identity["model"]
        assert facts["sha256"] == hashlib.sha256(row["png"]).hexdigest()
        assert decode_pixels(row["png"]).shape == (SIZE, SIZE, 3), key
    seeds = [json.loads(row["json"])["seed"] for row in rows.values()]
    assert len(set(seeds)) == len(PROMPTS), "a prompt that comes again is another picture"
    assert verify_generated(drawn).problems == ()


def test_a_picture_is_that_of_its_row_alone_in_a_batch_of_the_same_shape(
    drawn: GenerateConfig, loaded: TextToImage
) -> None:
    for row in list(rows_of(root_of(drawn)).values())[::3]:
        facts = json.loads(row["json"])
        alone = loaded.generate(
            [facts["prompt"]] * facts["batch_rows"],
            seeds=[facts["seed"]] * facts["batch_rows"],
            guidance=[facts["guidance"]] * facts["batch_rows"],
            drawing=replace(DRAWING, height=facts["height"], width=facts["width"]),
        )
        assert (alone[0] == decode_pixels(row["png"])).all()


def test_a_prompt_is_encoded_by_itself_whatever_is_told_beside_it(
    loaded: TextToImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision hides most of what a batch's size does to the last bits, so its size is looked at too."""
    one = loaded.condition(["a red heart"]).states
    sizes: list[int] = []
    real = TextTower.output

    def watched(self: TextTower, tokens: torch.Tensor, *more: Any) -> TowerOutput:
        sizes.append(len(tokens))
        return real(self, tokens, *more)

    monkeypatch.setattr(TextTower, "output", watched)
    beside = loaded.condition(["a blue heart", "a grey heart", "a red heart", "a blue heart"]).states
    assert one is not None
    assert beside is not None
    assert torch.equal(one[0], beside[2])
    assert torch.equal(beside[0], beside[3])
    assert sizes == [1, 1, 1], "equal ones once"


def test_a_picture_is_the_same_whatever_is_in_the_file_before_and_behind_it(
    model: Path, drawn: GenerateConfig, tmp_path: Path
) -> None:
    others = write_lines(tmp_path / "others.txt", ("cold", "a blue square", "warm", "green and grey", "old", "grey"))
    config, _ = drawn_file(model, others, tmp_path / "generated")
    before, now = rows_of(root_of(drawn)), rows_of(root_of(config))
    assert {before[key]["txt"] for key in before.keys() & now.keys()} == {b"a blue square", b"green and grey", b"grey"}
    assert all(before[key] == now[key] for key in before.keys() & now.keys())


def test_resume_draws_only_what_is_missing_and_ends_with_the_same_bytes(
    model: Path, drawn: GenerateConfig, tmp_path: Path
) -> None:
    config = generate_config(model, drawn.prompts, tmp_path / "generated")
    plan = plan_generate(config)
    stage = plan.make_stage()
    assert [task.name for task in missing(plan)] == ["000000", "000001", "000002"]
    claim_root(plan.root, plan.kind, plan.identity)
    commit_shard(plan.root, stage(plan.tasks[1]))
    assert [task.name for task in missing(plan_generate(config))] == ["000000", "000002"]
    stage(plan.tasks[0])  # published and never committed: it does not exist
    assert [task.name for task in missing(plan_generate(config))] == ["000000", "000002"]
    draw_missing(plan_generate(config))
    assert shard_files(config) == shard_files(drawn)
    remove_file(f"{config.bulk.root}/train/000001.index")
    assert [task.name for task in missing(plan_generate(config))] == ["000001"]


def test_a_file_that_grows_leaves_what_is_drawn_and_never_draws_it_again(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "prompts.txt", PROMPTS[:6])
    config, _ = drawn_file(model, file, tmp_path / "generated")
    first = shard_files(config)
    write_lines(file, PROMPTS)
    assert [(task.name, task.num_rows) for task in missing(plan_generate(config))] == [("000002", 4)]
    draw_missing(plan_generate(config))
    now = shard_files(config)
    assert {name: now[name] for name in first} == first
    whole = rows_of(root_of(drawn_file(model, file, tmp_path / "at-once")[0]))
    assert rows_of(root_of(config)) == whole
    assert verify_generated(config).problems == ()


def test_other_prompts_do_not_take_the_place_of_what_is_drawn_unless_they_are_to(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "prompts.txt", PROMPTS)
    config, _ = drawn_file(model, file, tmp_path / "generated")
    write_lines(file, (*PROMPTS[:4], "another", *PROMPTS[5:7]))
    with pytest.raises(ValueError, match=r"2 of its 3 tars \(000001, 000002\)\. Rows can be added at the end"):
        plan_generate(config)
    replacing = replace(config, bulk=replace(config.bulk, replaces=True))
    plan = plan_generate(replacing)
    assert [task.name for task in missing(plan)] == ["000001"]
    draw_missing(plan)
    assert verify_generated(config).problems == ()
    assert "another" in {row["txt"].decode() for row in rows_of(root_of(config)).values()}
    assert not list(root_of(config).glob("train/000002*"))


def test_settings_that_make_other_pictures_are_refused_in_the_same_folder(drawn: GenerateConfig) -> None:
    with pytest.raises(ValueError, match=r"guidance is 3.0 there, 5.0 here"):
        verify_generated(replace(drawn, guidance=5.0))
    with pytest.raises(ValueError, match=r"now there lies"):
        plan_generate(replace(drawn, model_digest="0" * 64))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("num_actors", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_as_many_actors_as_there_are_give_the_same_bytes(
    model: Path, drawn: GenerateConfig, local_ray: None, tmp_path: Path, num_actors: int
) -> None:
    config = generate_config(model, drawn.prompts, tmp_path / "generated", num_actors=num_actors)
    report = run(plan_generate(config))
    assert (report.num_rows, report.num_shards, dict(report.counts)) == (10, 3, {"ok": 10})
    assert shard_files(config) == shard_files(drawn)
    assert run(plan_generate(config)).num_skipped == 3


def test_the_job_draws_a_file_and_shows_its_first_pictures(
    model: Path, drawn: GenerateConfig, local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lines(tmp_path / "prompts.txt", PROMPTS)
    config = SampleConfig(
        root=str(tmp_path),
        record=str(tmp_path / "record"),
        model=str(model),
        prompts=("not looked at",),
        prompts_from=str(file),
        guidance=(3.0,),
        sampler=DRAWING.sampler,
        bulk=replace(drawn.bulk, root=str(tmp_path / "generated")),
        launch=LaunchConfig(),
        tracking=TrackingConfig(uri=""),
    )
    assert draw_file(config, dry_run=True) == 0
    assert "rows     10" in capsys.readouterr().out
    assert not (tmp_path / "generated" / "train").exists()
    assert draw_file(config, dry_run=False) == 0
    printed = capsys.readouterr().out
    assert f"pictures  10 in 3 new shards, 0 shards already there: {tmp_path}/generated" in printed
    sheet = tmp_path / "generated" / "first_pictures.png"
    with PILImage.open(sheet) as image:
        assert image.size == (824, 344)
    assert shard_files(config.generate_config()) == shard_files(drawn)
    verifying = replace(config, bulk=replace(config.bulk, verify=True))
    assert draw_file(verifying, dry_run=False) == 0
    assert "verified  10 pictures in 3 shards" in capsys.readouterr().out
    tar = tmp_path / "generated" / "train" / "000001.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    assert draw_file(verifying, dry_run=False) == 1
    assert "000001.tar has sha256" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"guidance": (1.0, 3.0)}, r"give one, such as --guidance 3, got 1, 3"),
        ({"guidance": (3.0,), "picture": "a.png"}, r"picture are of a grid"),
    ],
)
def test_what_is_said_of_a_grid_is_refused_with_a_file(model, tmp_path, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        SampleConfig(
            root="r", record="", model=str(model), prompts=("a",), prompts_from=str(tmp_path / "p.txt"), **fields
        )


def test_rows_of_many_sizes_are_drawn_in_batches_of_about_as_many_pixels(
    model: Path, loaded: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": prompt, "height": 8 * (1 + number % 2), "width": 16} for number, prompt in enumerate(PROMPTS)]
    batches: list[tuple[int, int, int]] = []
    real = TextToImage.generate

    def watched(self: TextToImage, prompts: list[str], **more: Any) -> np.ndarray:
        batches.append((len(prompts), more["drawing"].height, more["drawing"].width))
        return real(self, prompts, **more)

    monkeypatch.setattr(TextToImage, "generate", watched)
    config, _ = drawn_file(
        model, write_table(tmp_path / "p.csv", rows), tmp_path / "generated", shard_rows=10, batch_size=BATCH
    )
    assert sorted(batches) == [(3, 16, 16), (3, 16, 16), (6, 8, 16)], "five of each, filled up to whole batches"
    found = rows_of(root_of(config))
    assert [row["txt"].decode() for row in found.values()] == list(PROMPTS)
    assert [decode_pixels(row["png"]).shape[0] for row in found.values()] == [8, 16] * 5


def test_rows_without_guidance_share_no_batch_with_guided_ones(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": prompt, "guidance": 1 + number % 2} for number, prompt in enumerate(PROMPTS[:6])]
    batches: list[list[float]] = []
    real = TextToImage.generate

    def watched(self: TextToImage, prompts: list[str], **more: Any) -> np.ndarray:
        batches.append(more["guidance"])
        return real(self, prompts, **more)

    monkeypatch.setattr(TextToImage, "generate", watched)
    config, _ = drawn_file(model, write_table(tmp_path / "p.csv", rows), tmp_path / "generated", shard_rows=6)
    assert sorted(batches) == [[1.0] * 3, [2.0] * 3]
    assert [fact["guidance"] for fact in facts_of(root_of(config)).values()] == [1.0, 2.0] * 3


def test_images_per_prompt_count_their_seeds_on_and_rows_that_do_too_keep_their_own_names(
    model: Path, tmp_path: Path
) -> None:
    file = write_table(tmp_path / "p.csv", ({"prompt": "red", "seed": 1}, {"prompt": "red", "seed": 2}))
    config, _ = drawn_file(model, file, tmp_path / "generated", images_per_prompt=2)
    rows = rows_of(root_of(config))
    facts = [json.loads(row["json"]) for row in rows.values()]
    assert [(fact["seed"], fact["image"]) for fact in facts] == [(1, 0), (2, 1), (2, 0), (3, 1)]
    assert len(rows) == 4
    pictures = [row["png"] for row in rows.values()]
    assert pictures[1] == pictures[2] != pictures[0]
    assert verify_generated(config).problems == ()


@pytest.mark.parametrize("image_format", list(ImageFormat))
def test_pictures_come_in_the_format_that_is_asked_for(model: Path, tmp_path: Path, image_format: ImageFormat) -> None:
    file = write_lines(tmp_path / "p.txt", ("red",))
    config, _ = drawn_file(model, file, tmp_path / "generated", image_format=image_format)
    (row,) = rows_of(root_of(config)).values()
    assert set(row) == {image_format.value, "txt", "json"}
    assert decode_pixels(row[image_format.value]).shape == (SIZE, SIZE, 3)


def test_sizes_read_from_configurations_are_those_of_the_loaded_model(model: Path, loaded: TextToImage) -> None:
    found = model_sizes(str(model), load_card(str(model)))
    assert (found.trained, found.multiple) == (loaded.trained_size, loaded.multiple)


def test_the_published_manifest_names_the_prompts_and_the_model(drawn: GenerateConfig) -> None:
    manifest = load_manifest(drawn.bulk.root)
    assert manifest.kind == "generated"
    assert manifest.summary["num_prompts"] == len(PROMPTS)
    assert generate.settings_digest(drawn) != generate.settings_digest(replace(drawn, seed=1))
