"""Laws of ldm/config.py: YAML and back, digests, refusals that name the place."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config import Config, added_later, digest_of


class Kind(StrEnum):
    ADAMW = "adamw"
    SGD = "sgd"


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim(Config):
    lr: float = 1e-4
    kind: Kind = Kind.ADAMW

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Emoji(Config):
    num_rows: int = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder(Config):
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Run(Config):
    source: Emoji | Folder
    optim: Optim = Optim()
    multipliers: tuple[int, ...] = (1, 2)
    span: tuple[float, str] = (0.5, "s")
    weights: Path | None = None
    num_heads: int | None = None
    mode: Literal["fast", "exact"] = "exact"
    levels: dict[str, float] | None = None
    is_on: bool = True


RUNS = st.builds(
    Run,
    source=st.one_of(st.builds(Emoji, num_rows=st.integers()), st.builds(Folder, path=st.text())),
    optim=st.builds(Optim, lr=st.floats(min_value=1e-300, allow_infinity=False), kind=st.sampled_from(Kind)),
    multipliers=st.lists(st.integers(), max_size=4).map(tuple),
    span=st.tuples(st.floats(allow_nan=False), st.text()),
    weights=st.none() | st.text("abc/", min_size=1).map(Path),
    num_heads=st.none() | st.integers(),
    mode=st.sampled_from(["fast", "exact"]),
    levels=st.none() | st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=3),
    is_on=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(RUNS)
def test_a_config_goes_to_yaml_and_back_with_its_digest(run: Run) -> None:
    again = Run.from_yaml(run.to_yaml())
    assert again == run
    assert again.digest() == run.digest()


@settings(max_examples=40, deadline=None)
@given(RUNS, RUNS)
def test_equal_digests_are_equal_configs(one: Run, other: Run) -> None:
    assert (one.digest() == other.digest()) == (one.to_dict() == other.to_dict())


def test_a_digest_is_the_same_in_another_process() -> None:
    content = {"b": [1, 2.5, None], "a": {"ü": True}}
    program = f"from ldm.config import digest_of; print(digest_of({content!r}))"
    folder = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest_of(content)


def test_the_digest_of_content_does_not_know_the_order_of_keys() -> None:
    assert digest_of({"b": [1, 2], "a": None}) == digest_of({"a": None, "b": [1, 2]})
    assert digest_of({"a": [1, 2]}) != digest_of({"a": [2, 1]})


def test_two_members_of_a_union_with_equal_fields_have_different_digests() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Other(Config):
        num_rows: int = 512

    assert Other().digest() != Emoji().digest()


def test_a_config_is_frozen_and_replaced_by_a_checked_one() -> None:
    optim = Optim()
    with pytest.raises(FrozenInstanceError):
        optim.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="lr must be positive, got -1"):
        replace(optim, lr=-1)


def test_flat_names_every_leaf_by_its_dotted_path() -> None:
    flat = Run(source=Folder(path="a")).flat()
    assert flat["optim.lr"] == "0.0001"
    assert flat["optim.kind"] == "adamw"
    assert flat["source.type"] == "Folder"
    assert flat["multipliers"] == "[1, 2]"
    assert flat["num_heads"] == "None"


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1, 2]", "a config file holds a mapping of fields, got list"),
        ("optim: {lr: 1.0}", "Run lacks the field 'source'"),
        ("source: {type: Emoji, num_row: 3}", r"Run\.source has no field 'num_row'; did you mean 'num_rows'"),
        ("source: {type: Emoji}\nzebra: 3", "Run has no field 'zebra'.* It has: source, optim"),
        ("source: {type: Parquet}", r"Run\.source\.type expects one of \['Emoji', 'Folder'\], got 'Parquet'"),
        ("source: {type: Emoji}\noptim: {lr: fast}", r"Run\.optim\.lr expects a number, got 'fast'"),
        ("source: {type: Emoji}\noptim: {lr: true}", r"Run\.optim\.lr expects a number, got True"),
        ("source: {type: Emoji}\noptim: {lr: -2.0}", "lr must be positive, got -2.0"),
        (
            "source: {type: Emoji}\noptim: {kind: lion}",
            r"Run\.optim\.kind expects one of \['adamw', 'sgd'\], got 'lion'",
        ),
        ("source: {type: Emoji}\noptim: {type: Run}", r"Run\.optim expects a Optim, the file holds a Run"),
        ("source: {type: Emoji}\nmultipliers: 3", r"Run\.multipliers expects a list, got 3"),
        ("source: {type: Emoji}\nmultipliers: [1, 2.5]", r"Run\.multipliers\[1\] expects a whole number, got 2\.5"),
        ("source: {type: Emoji}\nspan: [0.5]", r"Run\.span expects 2 items, got \[0\.5\]"),
        ("source: {type: Emoji}\nmode: slow", r"Run\.mode expects one of \['fast', 'exact'\], got 'slow'"),
        ("source: {type: Emoji}\nis_on: 1", r"Run\.is_on expects bool, got 1"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_the_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run.from_yaml(text)


def test_a_whole_number_is_welcome_where_a_number_is_asked_for() -> None:
    run = Run.from_yaml("source: {type: Emoji}\noptim: {lr: 1}")
    assert run.optim.lr == 1.0
    assert isinstance(run.optim.lr, float)
    assert run.digest() == Run(source=Emoji(), optim=Optim(lr=1.0)).digest()


def test_a_field_added_later_changes_no_digest_until_it_is_set() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Grown(Config):
        path: str
        depth: int | None = added_later(None)

    before = {"type": "Grown", "path": "a"}
    assert Grown(path="a").to_dict() == before
    assert Grown(path="a").digest() == digest_of(before)
    assert Grown(path="a", depth=0).to_dict() == before | {"depth": 0}
    assert Grown(path="a", depth=0).flat()["depth"] == "0"


def test_a_field_that_is_not_in_the_file_has_its_default() -> None:
    assert Run.from_yaml("source: {type: Emoji}") == Run(source=Emoji())
