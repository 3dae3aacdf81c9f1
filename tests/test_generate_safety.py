"""Laws of filters and watermarks where a file of prompts is drawn: counted reasons, no key, no row lost by mistake."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldm.safety import SafetyConfig
from ldm.watermark import detect
from pipeline.generate_config import GenerateConfig
from pipeline.generate_plan import plan_generate
from pipeline.images import decode_pixels
from pipeline.store.manifest import claim_root
from tests.small_datasets import contents, lines_of_dataset, rows_of
from tests.test_generate import drawn, model
from tests.tiny_model import PROMPTS, SIZE, draw_missing, generate_config, root_of, write_lines, write_table

__all__ = ["drawn", "model"]  # fixtures: a tiny model, and ten prompts that it drew


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
    assert refused["status"] == "bad_size"
    assert "a watermark needs at least 64 x 64 px" in refused["detail"]
    assert not [name for name, content in contents(root_of(config)).items() if b"a secret key" in content]


def no_answer(*_: object) -> None:
    """A filter that forgot to return."""


def fails(*_: object) -> str:
    """A filter with a bug."""
    raise ValueError("of the filter's own")


@pytest.mark.parametrize(
    "filters, message",
    [
        ({"prompt_filter": f"{__name__}:no_answer"}, "prompt_filter must return the reason as text"),
        ({"picture_filter": f"{__name__}:no_answer"}, "picture_filter must return the reason as text"),
        ({"picture_filter": f"{__name__}:fails"}, "of the filter's own"),
    ],
)
def test_a_filter_that_does_not_answer_fails_the_job_and_refuses_no_row(
    model: Path, tmp_path: Path, filters: dict[str, str], message: str
) -> None:
    file = write_lines(tmp_path / "prompts.txt", PROMPTS)
    config = replace(generate_config(model, file, tmp_path / "generated"), safety=SafetyConfig(**filters))
    with pytest.raises(ValueError, match=message):
        draw_missing(plan_generate(config))
    assert not list(root_of(config).glob("train/*.tar"))
