"""Laws of drawing files of prompts: each row once, the same bytes however it is done, refused where it is wrong."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image as PILImage

from jobs.wiring.generate import draw_file
from jobs.wiring.sample import SampleConfig
from ldm.drawing import Drawing, Given
from ldm.model_card import load_card
from ldm.model_sizes import model_sizes
from ldm.safety import SafetyConfig
from ldm.samplers.sample import SamplerConfig
from ldm.storage import remove_file
from ldm.text_to_image import TextToImage, load_text_to_image
from ldm.training.local_launch import LaunchConfig
from ldm.training.tracking_config import TrackingConfig
from ldm.watermark import detect
from pipeline import generate
from pipeline.generate_config import GenerateConfig
from pipeline.generate_plan import cut_rows, plan_generate, verify_generated
from pipeline.images import decode_pixels
from pipeline.ingest.transforms import ImageFormat
from pipeline.plan import missing
from pipeline.prompts import PromptTable, repeats_of
from pipeline.run import run
from pipeline.store.manifest import Manifest, claim_root, commit_shard, load_manifest
from tests.small_datasets import contents, facts_of, lines_of_dataset, rows_of
from tests.tiny_model import DRAWING, SIZE, draw_missing, generate_config, write_lines, write_model

PROMPTS = ("red", "a blue square", "green", "red", "grey", "a white square", "blue", "red", "green and grey", "white")
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


def root_of(config: GenerateConfig) -> Path:
    return Path(config.bulk.root)


def shard_files(config: GenerateConfig) -> dict[str, bytes]:
    """Return everything but what speaks of all shards together."""
    return {name: content for name, content in contents(root_of(config)).items() if name.startswith("train/")}


def drawn_file(model: Path, file: Path, root: Path, **bulk: object) -> tuple[GenerateConfig, Manifest]:
    config = generate_config(model, file, root, **bulk)
    return config, draw_missing(plan_generate(config))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows, of which each may name other columns, in the format that the file's name says."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".parquet":
        table = pa.table({name: [row.get(name) for row in rows] for name in columns})
        pq.write_table(table, path, row_group_size=3)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def picture_of(seed: int = 0, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def png_of(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    PILImage.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


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


def test_a_prompt_says_the_same_to_the_denoiser_whatever_is_told_beside_it(loaded: TextToImage) -> None:
    one = loaded.condition(["a red heart"]).states
    for count in range(1, 8):
        words = ("blue", "green", "grey", "white", "cold", "warm", "old")[:count]
        beside = loaded.condition([f"a {word} heart" for word in (*words, "red")]).states
        assert torch.equal(one[0], beside[-1]), count


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


@pytest.mark.parametrize("num_actors", [1, 2])
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
        ({"guidance": (3.0,), "classes": (1,)}, r"classes are of a grid"),
        ({"guidance": (3.0,), "picture": "a.png"}, r"picture are of a grid"),
    ],
)
def test_what_is_said_of_a_grid_is_refused_with_a_file(model, tmp_path, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        SampleConfig(
            root="r", record="", model=str(model), prompts=("a",), prompts_from=str(tmp_path / "p.txt"), **fields
        )


ROWS = (
    {"prompt": "red", "seed": 7},
    {"prompt": 'a "blue", square', "guidance": 1.5, "steps": 2},
    {"prompt": "grün\u2028", "height": 8, "width": 24, "negative_prompt": "grey"},
    {"prompt": "red", "seed": 7},
    {"prompt": "white", "guidance": 1},
)


def test_one_table_gives_the_same_bytes_in_every_format(model: Path, tmp_path: Path) -> None:
    made = []
    for name in ("p.parquet", "p.csv", "p.tsv", "p.jsonl"):
        config, _ = drawn_file(model, write_table(tmp_path / name, ROWS), tmp_path / name.replace(".", "-"))
        made.append(shard_files(config))
    packed = tmp_path / "packed.csv.gz"
    packed.write_bytes(gzip.compress((tmp_path / "p.csv").read_bytes()))
    made.append(shard_files(drawn_file(model, packed, tmp_path / "packed")[0]))
    assert all(files == made[0] for files in made[1:])
    facts = list(facts_of(tmp_path / "p-csv").values())
    assert [(fact["seed"], fact["repeat"]) for fact in (facts[0], facts[3])] == [(7, 0), (7, 1)]
    assert [fact["guidance"] for fact in facts] == [3.0, 1.5, 3.0, 3.0, 1.0]
    assert (facts[2]["height"], facts[2]["width"], facts[2]["negative_prompt"]) == (8, 24, "grey")
    assert facts[1]["steps"] == 2


def test_plain_text_is_a_column_of_prompts_and_several_files_are_one(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write_lines(folder / "a.txt", ("red", "", "  ", "blue\r"))
    write_table(folder / "b.csv", ({"prompt": "green"}, {"prompt": "grey"}))
    write_table(folder / "c.parquet", ({"prompt": "white"}, {"prompt": "red"}))
    (folder / "_notes.txt").write_text("not a prompt")
    by_folder, manifest = drawn_file(model, folder, tmp_path / "folder")
    assert [line["caption"] for line in lines_of_dataset(root_of(by_folder))] == [
        *("red", "blue", "green", "grey", "white", "red")
    ]
    assert [shard.details["num_source_rows"] for shard in manifest.shards] == [4, 2]
    by_wildcard, _ = drawn_file(model, f"{folder}/[abc].*", tmp_path / "wildcard")
    one_file = write_lines(tmp_path / "one.txt", ("red", "blue", "green", "grey", "white", "red"))
    assert (
        shard_files(by_folder)
        == shard_files(by_wildcard)
        == shard_files(drawn_file(model, one_file, tmp_path / "1")[0])
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


def test_rows_that_can_not_be_drawn_are_counted_and_stop_nothing(model: Path, drawn: GenerateConfig, tmp_path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "picture.png").write_bytes(png_of(picture_of()))
    rows: list[dict[str, Any]] = [
        {"prompt": "red"},
        {"prompt": ""},
        {"prompt": "blue", "seed": "many"},
        {"prompt": "blue", "seed": -1},
        {"prompt": "blue", "steps": 0},
        {"prompt": "blue", "height": 18},
        {"prompt": "blue", "init_image": "broken.png", "strength": 0.5},
        {"prompt": "blue", "init_image": "missing.png", "strength": 0.5},
        {"prompt": "blue", "init_image": "../model/picture.png", "strength": 0.5},
        {"prompt": "blue", "init_image": "picture.png"},
        {"prompt": "blue", "class_id": 3},
        {"prompt": "a blue square"},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:6]) + "no JSON\n" + "\n")
    file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in rows[6:]))
    config, manifest = drawn_file(model, file, tmp_path / "generated", shard_rows=100)
    assert manifest.summary["counts"]["train"] == {
        **{"bad_cell": 3, "bad_picture": 3, "bad_size": 1, "broken_row": 1, "no_prompt": 1},
        **{"not_drawable": 2, "ok": 2},
    }
    lines = {line["status"]: line["detail"] for line in lines_of_dataset(root_of(config))}
    assert lines["bad_size"] == "rows and columns must be multiples of 4 px, got 18 x 16 px; the nearest is 16 x 16 px"
    assert "not told classes" in lines["not_drawable"]
    assert "stay below it" in lines["bad_picture"]
    before, now = rows_of(root_of(drawn)), rows_of(root_of(config))
    assert [row["txt"] for row in now.values()] == [b"red", b"a blue square"]
    assert all(before[key] == row for key, row in now.items()), "they are what they are among rows that can be drawn"
    assert verify_generated(config).problems == ()


def test_a_shard_of_nothing_but_refused_rows_is_a_shard(model: Path, tmp_path: Path) -> None:
    file = write_table(tmp_path / "p.csv", ({"prompt": "red", "height": 16}, *[{"prompt": "red", "height": 18}] * 7))
    config, manifest = drawn_file(model, file, tmp_path / "generated")
    assert [shard.num_rows for shard in manifest.shards] == [1, 0]
    assert missing(plan_generate(config)) == []
    assert verify_generated(config).problems == ()


def test_a_row_that_only_the_networks_refuse_costs_no_other_its_picture(
    model: Path, drawn: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TextToImage.condition

    def refusing(self: TextToImage, prompts: Sequence[str]) -> object:
        if "green" in prompts:
            raise ValueError("the towers make other numbers of tokens of 'green'")
        return real(self, prompts)

    monkeypatch.setattr(TextToImage, "condition", refusing)
    config, manifest = drawn_file(model, Path(drawn.prompts), tmp_path / "generated")
    assert manifest.summary["counts"]["train"] == {"not_drawable": 1, "ok": 9}
    now = rows_of(root_of(config))
    assert all(rows_of(root_of(drawn))[key] == row for key, row in now.items())


def test_rows_begin_with_pictures_beside_the_file_or_inside_it(
    model: Path, loaded: TextToImage, tmp_path: Path
) -> None:
    picture, mask = picture_of(1, 2 * SIZE), np.zeros((2 * SIZE, 2 * SIZE), np.uint8)
    mask[:SIZE] = 255
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "picture.png").write_bytes(png_of(picture))
    (tmp_path / "in" / "mask.png").write_bytes(png_of(mask))
    row = {"prompt": "red", "seed": 3, "strength": 0.7}
    named = write_table(tmp_path / "p.csv", [{**row, "init_image": "in/picture.png", "mask": "in/mask.png"}])
    held = write_table(
        tmp_path / "p.parquet", [{**row, "init_image": png_of(picture), "mask": {"bytes": png_of(mask), "path": "m"}}]
    )
    pictures = []
    for number, file in enumerate((named, held)):
        config, _ = drawn_file(model, file, tmp_path / str(number))
        (found,) = rows_of(root_of(config)).values()
        facts = json.loads(found["json"])
        pictures.append(decode_pixels(found["png"]))
        assert facts["pictures"]["init_image"]["address"] == ("in/picture.png", "")[number]
    assert (pictures[0] == pictures[1]).all()
    cut = np.asarray(PILImage.fromarray(picture).resize((SIZE, SIZE), PILImage.Resampling.LANCZOS))
    inside = np.zeros((SIZE, SIZE), bool)
    inside[: SIZE // 2] = True
    assert (pictures[0][~inside] == cut[~inside]).all()
    alone = loaded.generate(
        ["red"] * BATCH,
        seeds=[3] * BATCH,
        guidance=[3.0] * BATCH,
        drawing=replace(DRAWING, strength=0.7),
        given=Given(pixels=np.stack([cut] * BATCH), masks=np.stack([inside] * BATCH)),
    )
    assert (alone[0] == pictures[0]).all()


def test_columns_that_nobody_knows_are_refused_unless_they_are_carried(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "red", "guidence": 3, "id": "x1"}, {"prompt": "blue", "guidence": 4, "id": "x2"}]
    for name in ("p.csv", "p.parquet", "p.jsonl"):
        file = write_table(tmp_path / name, rows)
        with pytest.raises(ValueError, match=r"unknown columns \['guidence', 'id'\].*--bulk.carry guidence id"):
            plan_generate(generate_config(model, file, tmp_path / "generated"))
        with pytest.raises(ValueError, match=r"unknown columns \['guidence'\]"):
            plan_generate(generate_config(model, file, tmp_path / "generated", carry=("id",)))
        with pytest.raises(ValueError, match=r"no columns \['name'\] to carry"):
            plan_generate(generate_config(model, file, tmp_path / "generated", carry=("id", "guidence", "name")))
    late = write_table(tmp_path / "late.jsonl", [*[{"prompt": "red"}] * 300, {"prompt": "blue", "sede": 1}])
    with pytest.raises(ValueError, match=r"unknown columns \['sede'\]"):
        plan_generate(generate_config(model, late, tmp_path / "generated"))
    file = write_table(tmp_path / "known.csv", [{"prompt": "red", "id": "x1"}, {"prompt": "red", "id": "x2"}])
    config, _ = drawn_file(model, file, tmp_path / "generated", carry=("id",))
    facts = facts_of(root_of(config)).values()
    assert [fact["carried"] for fact in facts] == [{"id": "x1"}, {"id": "x2"}]
    assert len({fact["seed"] for fact in facts}) == 2, "rows that say other things have other noise"


@pytest.mark.parametrize(
    "rows, fields, message",
    [
        ([{"text": "red"}], {}, r"unknown columns \['text'\]"),
        ([{"seed": 1}], {}, r"no column 'prompt', it has \['seed'\]: --bulk.prompt-column"),
        ([{"prompt": ""}, {"prompt": " "}], {}, r"none of the 2 rows .* can be drawn: no_prompt 2"),
        ([{"prompt": "red", "class_id": 1}], {}, r"the model is not told class_id, and every row"),
        ([{"prompt": "red"}], {"drawing": Drawing(sampler=SamplerConfig(num_steps=2), width=18)}, r"multiples of 4 px"),
    ],
)
def test_what_concerns_all_rows_is_refused_before_any_work(model, tmp_path, rows, fields, message) -> None:
    config = generate_config(model, write_table(tmp_path / "p.csv", rows), tmp_path / "generated")
    with pytest.raises(ValueError, match=message):
        plan_generate(replace(config, **fields))
    assert not (tmp_path / "generated").exists()


def test_no_file_is_refused_with_the_formats(model: Path, tmp_path: Path) -> None:
    for address in (tmp_path / "none.csv", tmp_path / "*.csv"):
        with pytest.raises(ValueError, match=r"there is no file of prompts at .*\.parquet, \.csv"):
            plan_generate(generate_config(model, address, tmp_path / "generated"))
    with pytest.raises(ValueError, match="there are no prompts in"):
        plan_generate(generate_config(model, write_lines(tmp_path / "p.txt", ()), tmp_path / "generated"))


def test_a_file_that_changes_while_it_is_drawn_fails_its_shards(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "p.txt", PROMPTS)
    plan = plan_generate(generate_config(model, file, tmp_path / "generated"))
    stage = plan.make_stage()
    write_lines(file, [*PROMPTS[:2], "other", *PROMPTS[3:]])
    with pytest.raises(ValueError, match="no longer the file|not those that were planned"):
        stage(plan.tasks[0])


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


@pytest.mark.parametrize(
    "num_rows, kept, ranges",
    [
        (10, {}, [(0, 4), (4, 8), (8, 10)]),
        (10, {0: (0, 4), 1: (4, 6)}, [(0, 4), (4, 6), (6, 10)]),
        (10, {2: (6, 10)}, [(0, 4), (4, 6), (6, 10)]),
        (12, {1: (4, 6), 2: (6, 10)}, [(0, 4), (4, 6), (6, 10), (10, 12)]),
        (3, {0: (0, 4)}, [(0, 3)]),
    ],
)
def test_rows_are_cut_around_ranges_that_stay(num_rows, kept, ranges) -> None:
    assert cut_rows(num_rows, 4, kept) == ranges


def test_repeats_count_equal_rows_before_each() -> None:
    letters = np.frombuffer(b"abacabadx", "V1")
    assert repeats_of(letters).tolist() == [0, 0, 1, 0, 2, 1, 3, 0, 0]


def test_any_range_of_rows_is_read_as_it_stands_in_the_whole(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write_table(folder / "a.parquet", [{"prompt": f"p{number}"} for number in range(7)])
    write_lines(folder / "b.txt", [f"line {number}" for number in range(5)])
    write_table(folder / "c.csv", [{"prompt": f"{number}\nof two lines"} for number in range(4)])
    table = PromptTable()
    survey = table.survey(str(folder))
    whole = [row.digest for row in table.rows(survey.pieces(0, survey.num_rows))]
    assert len(whole) == survey.num_rows == 16
    for start in range(16):
        for stop in range(start + 1, 17):
            assert [row.digest for row in table.rows(survey.pieces(start, stop))] == whole[start:stop]


def test_the_published_manifest_names_the_prompts_and_the_model(drawn: GenerateConfig) -> None:
    manifest = load_manifest(drawn.bulk.root)
    assert manifest.kind == "generated"
    assert manifest.summary["num_prompts"] == len(PROMPTS)
    assert generate.settings_digest(drawn) != generate.settings_digest(replace(drawn, seed=1))


def no_squares(prompt: str) -> str:
    """A filter of prompts."""
    return "squares are private" if "square" in prompt else ""


def no_red(pixels: np.ndarray, prompt: str) -> str:
    """A filter of pictures."""
    assert pixels.shape == (SIZE, SIZE, 3)
    return "too red" if prompt == "red" else ""


def test_filters_refuse_rows_under_their_reasons_and_leave_all_others_as_they_are(
    model: Path, drawn: GenerateConfig, tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "prompts.txt", PROMPTS)
    safety = SafetyConfig(prompt_filter=f"{__name__}:no_squares", picture_filter=f"{__name__}:no_red")
    config = replace(generate_config(model, file, tmp_path / "generated"), safety=safety)
    draw_missing(plan_generate(config))
    statuses = {line["caption"]: (line["status"], line["detail"]) for line in lines_of_dataset(root_of(config))}
    assert statuses["a blue square"] == ("refused_prompt", "squares are private")
    assert statuses["red"] == ("refused_picture", "too red")
    assert statuses["green"] == ("ok", "")
    kept = {row["txt"]: row["png"] for row in rows_of(root_of(config)).values()}
    assert set(kept) == {prompt.encode() for prompt in PROMPTS if "square" not in prompt and prompt != "red"}
    plain = {json.loads(row["json"])["row"]: row["png"] for row in rows_of(root_of(drawn)).values()}
    for row in rows_of(root_of(config)).values():
        assert plain[json.loads(row["json"])["row"]] == row["png"]  # with as many in the batch
    with pytest.raises(ValueError, match="safety"):
        plan = plan_generate(replace(config, safety=SafetyConfig()))
        claim_root(plan.root, plan.kind, plan.identity)


def test_a_watermarked_file_never_names_its_key(model: Path, tmp_path: Path) -> None:
    file = write_table(tmp_path / "prompts.csv", [{"prompt": "red", "height": 64, "width": 64}, {"prompt": "blue"}])
    safety = SafetyConfig(watermark="a secret key").identified()
    config = replace(generate_config(model, file, tmp_path / "generated"), safety=safety)
    draw_missing(plan_generate(config))
    (row,) = rows_of(root_of(config)).values()
    assert detect(decode_pixels(row["png"]), "a secret key").is_marked
    assert not detect(decode_pixels(row["png"]), "another key").is_marked
    (refused,) = [line for line in lines_of_dataset(root_of(config)) if line["status"] != "ok"]
    assert "a watermark needs at least 64 x 64 px" in refused["detail"]
    assert not [name for name, content in contents(root_of(config)).items() if b"a secret key" in content]
