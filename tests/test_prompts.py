"""Laws of files of prompts: what a row says in any format, why one is not drawn, and what is refused before work."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from ldm.drawing import Drawing, Given
from ldm.samplers.sample import SamplerConfig
from ldm.samplers.tasks import Between
from ldm.text_to_image import TextToImage
from pipeline.generate_config import GenerateConfig
from pipeline.generate_plan import cut_rows, plan_generate, verify_generated
from pipeline.images import decode_pixels
from pipeline.plan import missing
from pipeline.prompts import PromptTable, repeats_of
from tests.small_datasets import facts_of, lines_of_dataset, rows_of
from tests.test_generate import drawn, loaded, model
from tests.tiny_model import (
    DRAWING,
    PROMPTS,
    SIZE,
    drawn_file,
    generate_config,
    picture_of,
    png_of,
    root_of,
    shard_files,
    write_lines,
    write_table,
)

BATCH = 3
__all__ = ["drawn", "loaded", "model"]  # fixtures: a tiny model, and ten prompts that it drew

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


def test_rows_that_can_not_be_drawn_are_counted_and_stop_nothing(model: Path, drawn: GenerateConfig, tmp_path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "picture.png").write_bytes(png_of(picture_of()))
    content = bytearray(png_of(picture_of()))
    content[content.index(b"IDAT") + 1] = 0x01  # a chunk of no name: Pillow calls that a syntax error
    (tmp_path / "damaged.png").write_bytes(content)
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
        {"prompt": "blue", "layout": 5},
        {"prompt": "blue", "layout": [[1, "x", 0, 1, 1]]},
        {"prompt": "blue", "layout": [[1, None, 0, 1, 1]]},
        {"prompt": "blue", "layout": "[5]"},
        {"prompt": "blue", "layout": "inf 0 0 1 1"},
        {"prompt": "blue", "guidance": int("9" * 401)},
        {"prompt": "blue", "height": int("4" * 401)},
        {"prompt": "blue", "height": 1_000_000_000},
        {"prompt": "blue", "init_image": "damaged.png", "strength": 0.5},
        {"prompt": "a blue square"},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:6]) + "no JSON\n" + "\n")
    file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in rows[6:]))
    config, manifest = drawn_file(model, file, tmp_path / "generated", shard_rows=100)
    assert manifest.summary["counts"]["train"] == {
        **{"bad_cell": 9, "bad_picture": 4, "bad_size": 3, "broken_row": 1, "no_prompt": 1},
        **{"not_drawable": 2, "ok": 2},
    }
    lines = {(line["status"], line["detail"]) for line in lines_of_dataset(root_of(config))}
    nearest = "rows and columns must be multiples of 4 px, got 18 x 16 px; the nearest is 16 x 16 px"
    assert ("bad_size", nearest) in lines
    for status, said in (
        ("bad_size", "pixels are drawn"),
        ("not_drawable", "not told classes"),
        ("bad_picture", "stay below it"),
        ("bad_picture", "no picture that can be read"),
        ("bad_cell", "a layout is boxes of five numbers each"),
    ):
        assert any(found == status and said in detail for found, detail in lines), said
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


def test_rows_ask_for_places_on_a_way_and_for_margins_around_a_picture(
    model: Path, loaded: TextToImage, tmp_path: Path
) -> None:
    picture = picture_of(2)
    (tmp_path / "picture.png").write_bytes(png_of(picture))
    way = {"prompt": "red", "seed": 3, "to_prompt": "a blue square", "to_seed": 9}
    wider = {"prompt": "red", "seed": 4, "init_image": "picture.png", "margins": "4 0 8 4"}
    unmeant = {**way, "share": 2.0}, way, {"prompt": "red", "margins": "0 0 8 0"}, {**wider, "margins": "8"}
    file = write_table(tmp_path / "p.csv", [{**way, "share": 0.25}, wider, *unmeant])
    config, manifest = drawn_file(model, file, tmp_path / "generated", images_per_prompt=2)
    assert manifest.summary["counts"]["train"] == {"ok": 4, "not_drawable": 2, "bad_cell": 6}
    drawn = {key: decode_pixels(row["png"]) for key, row in rows_of(root_of(config)).items()}
    found = {(row["image"], row["width"]): (row, drawn[key]) for key, row in facts_of(root_of(config)).items()}
    for number in (0, 1):
        row, pixels = found[number, SIZE]
        assert (row["to_prompt"], row["to_seed"], row["share"]) == ("a blue square", 9 + number, 0.25)
        alone = loaded.generate(
            [Between("red", "a blue square", 0.25)] * BATCH,
            seeds=[Between(3 + number, 9 + number, 0.25)] * BATCH,
            guidance=[3.0] * BATCH,
            drawing=DRAWING,
        )
        assert (pixels == alone[0]).all()
        assert "25% from red to a blue square" in {line["caption"] for line in lines_of_dataset(root_of(config))}
        _, whole = found[number, SIZE + 12]
        assert whole.shape == (SIZE + 4, SIZE + 12, 3)
        assert (whole[:SIZE, 4 : 4 + SIZE] == picture).all()


def test_rows_with_more_words_than_are_read_are_counted(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "red"}, {"prompt": "red " * 200}, {"prompt": "red", "negative_prompt": "blue " * 200}]
    _, manifest = drawn_file(model, write_table(tmp_path / "p.jsonl", rows), tmp_path / "generated")
    assert manifest.summary["num_cut_prompts"] == 2
    assert manifest.summary["counts"]["train"] == {"ok": 3}


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


@pytest.mark.parametrize("columns", [("caption", "prompt"), ("prompt", "caption")])
def test_what_is_drawn_is_the_named_column_whatever_another_is_called(
    model: Path, tmp_path: Path, columns: tuple[str, str]
) -> None:
    said = {"caption": "red", "prompt": "a blue square"}
    file = write_table(tmp_path / "p.csv", [{name: said[name] for name in columns}])
    config, _ = drawn_file(
        model, file, tmp_path / "generated", prompt_column="caption", carry=("prompt", "caption"), shard_rows=4
    )
    (row,) = rows_of(root_of(config)).values()
    assert row["txt"] == b"red"
    assert json.loads(row["json"])["carried"] == said


def test_half_a_character_is_drawn_as_what_can_be_written(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a\\ud800b", "negative_prompt": "\\udc00"}\n')
    config, manifest = drawn_file(model, file, tmp_path / "generated")
    assert manifest.summary["counts"]["train"] == {"ok": 1}


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(model: Path, tmp_path: Path) -> None:
    config, manifest = drawn_file(model, write_lines(tmp_path / "my[1].txt", ["red"]), tmp_path / "generated")
    assert manifest.summary["counts"]["train"] == {"ok": 1}
