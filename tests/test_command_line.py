"""Laws of jobs/command_line.py: recipes, overrides, saved configs, and refusals of one line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import pytest
import ray

from jobs.command_line import Invocation, from_command_line, kept_here, placed, report_errors
from jobs.session import ray_session
from ldm.config import Config


class Kind(StrEnum):
    ADAMW = "adamw"
    SGD = "sgd"


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim(Config):
    lr: float = 1e-4
    """Learning rate at the plateau."""
    kind: Kind = Kind.ADAMW
    """Rule that moves the weights."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Emoji(Config):
    rows_per_shard: int = 512
    """Rows in one tar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder(Config):
    path: str
    """Where the images lie."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run(Config):
    """Train a model on rows."""

    source: Emoji | Folder
    """Where the rows come from."""
    optim: Optim = Optim()
    """How the weights move."""
    multipliers: tuple[int, ...] = (1, 2)
    """Channel multipliers, from the top."""
    num_heads: int | None = None
    """Attention heads; None for one every 64 channels."""
    output: str
    """Where the result goes."""


def emoji(home: str) -> Run:
    """Emoji drawings on a laptop.

    The rest of the docstring is not shown.
    """
    return Run(source=Emoji(), output=f"{home}/out")


def laion(home: str) -> Run:
    """Photographs on a cluster."""
    return Run(source=Folder(path="s3://bucket/laion"), optim=Optim(lr=3e-5), output=f"{home}/out")


RECIPES = {"emoji": emoji, "laion": laion}


def parse(*argv: str) -> Invocation[Run]:
    return from_command_line("train", RECIPES, argv)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_no_argument_is_the_first_recipe_under_its_own_home() -> None:
    assert parse() == Invocation(config=emoji(f"{Path.cwd()}/runs/emoji"), recipe="emoji", dry_run=False)


def test_a_recipe_is_picked_by_name_and_its_home_by_option() -> None:
    assert parse("laion").config == laion(f"{Path.cwd()}/runs/laion")
    assert parse("laion", "--home", "s3://b/x").config == laion("s3://b/x")
    assert parse("--home=/x", "--dry-run") == Invocation(config=emoji("/x"), recipe="emoji", dry_run=True)


def test_flags_override_single_fields_and_leave_the_rest() -> None:
    argv = ("--optim.lr", "3e-3", "--optim.kind", "sgd", "--multipliers", "1", "2", "4", "--num-heads", "8")
    expected = replace(
        emoji(f"{Path.cwd()}/runs/emoji"), optim=Optim(lr=3e-3, kind=Kind.SGD), multipliers=(1, 2, 4), num_heads=8
    )
    assert parse(*argv).config == expected


@pytest.mark.parametrize("flag", ["--source.rows-per-shard", "--source.rows_per_shard"])
def test_hyphen_and_underscore_are_one(flag: str) -> None:
    assert parse(flag, "7").config.source == Emoji(rows_per_shard=7)


def test_a_union_keeps_the_type_that_the_recipe_chose(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("laion", "--source.path", "/data").config.source == Folder(path="/data")
    assert "--source.path" in refusal(capsys, "emoji", "--source.path", "/data")


def test_a_saved_config_comes_back_and_flags_still_override(tmp_path: Path) -> None:
    saved = replace(laion("/x"), num_heads=4)
    (tmp_path / "run.yaml").write_text(saved.to_yaml())
    assert parse("--config", str(tmp_path / "run.yaml")).config == saved
    assert parse("--config", str(tmp_path / "run.yaml"), "--num-heads", "None").config == laion("/x")


def test_help_lists_every_field_option_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for expected in (
        "python -m jobs.train",
        "Train a model on rows.",
        "emoji Emoji drawings on a laptop.",
        "laion Photographs on a cluster.",
        "--home",
        "--config FILE",
        "--dry-run",
        "--optim.lr FLOAT Learning rate at the plateau. (default: 0.0001)",
        "--optim.kind {adamw,sgd} Rule that moves the weights. (default: adamw)",
        "--source.rows-per-shard INT Rows in one tar. (default: 512)",
        "Channel multipliers, from the top. (default: 1 2)",
        "Where the result goes. (default:",
    ):
        assert expected in text
    assert "The rest of the docstring" not in text


@pytest.mark.parametrize(
    "argv, line",
    [
        (["emojis"], "error: jobs.train has no recipe 'emojis'; did you mean 'emoji'? It has: emoji, laion"),
        (["zzz"], "error: jobs.train has no recipe 'zzz'. It has: emoji, laion"),
        (["--dry-run", "laion"], "error: the recipe comes first: python -m jobs.train laion ..."),
        (["--optim.lr", "-1"], "error: Optim: lr must be positive, got -1.0"),
        (["--config", "nowhere.yaml"], "error: there is no config file nowhere.yaml"),
        (
            ["--home", "/x", "--config", "run.yaml"],
            "error: --home is for a recipe; the paths of a saved --config stand",
        ),
    ],
)
def test_a_mistake_is_refused_in_one_line(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = refusal(capsys, *argv)
    assert printed.startswith(line)
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "content, expected",
    [
        ("source: {type: Emoji}\nouput: x", "Run has no field 'ouput'; did you mean 'output'?"),
        ("source: {type: Emoji}\noutput: x\noptim: {lr: -1.0}", "lr must be positive, got -1.0"),
        ("a: [", "while parsing a flow"),
    ],
)
def test_a_saved_config_that_does_not_fit_is_refused_by_file_and_place(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    printed = refusal(capsys, "--config", str(path))
    assert printed.startswith(f"error: {path}: {expected}")


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--optim.lrr", "3"], "--optim.lr FLOAT"),
        (["--num-heads", "many"], "--num-heads"),
        (["--optim.kind", "lion"], "'adamw', 'sgd'"),
        (["--home"], "--home"),
        (["emoji", "laion"], "laion"),
    ],
)
def test_an_unknown_flag_or_wrong_type_is_refused_with_what_was_expected(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in " ".join(refusal(capsys, *argv).split())


def test_a_recipe_that_refuses_its_home_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def picky(home: str) -> Run:
        raise ValueError(f"home must be an s3:// folder, got {home}")

    with pytest.raises(SystemExit, match="2"):
        from_command_line("train", {"picky": picky}, [])
    assert capsys.readouterr().err == f"error: home must be an s3:// folder, got {Path.cwd()}/runs/picky\n"


def test_a_config_whose_field_hides_an_option_is_a_fault_of_the_program() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Clash(Config):
        home: str

    with pytest.raises(TypeError, match=r"Clash may not have the fields \['home'\]"):
        from_command_line("train", {"clash": lambda home: Clash(home=home)}, [])


@pytest.mark.parametrize(
    "raised, code, printed",
    [
        ("ValueError('expected 3, got 4')", 2, "error: expected 3, got 4\n"),
        ("KeyboardInterrupt()", 130, "stopped; start the same command again to go on\n"),
    ],
)
def test_a_main_that_stops_says_why_in_one_line(raised: str, code: int, printed: str) -> None:
    program = f"from jobs.command_line import report_errors\n@report_errors()\ndef main():\n    raise {raised}\nmain()"
    done = run_program(program)
    assert (done.returncode, done.stderr) == (code, printed)


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), report_errors():
        1 / 0  # noqa: B018


def run_program(program: str) -> subprocess.CompletedProcess[str]:
    folder = Path(__file__).parents[1]
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)


def test_a_home_is_absolute_a_url_stays_and_a_submitted_job_counts_from_the_users_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert placed("runs/x") == str(Path.cwd() / "runs" / "x")
    assert placed("s3://bucket/x") == "s3://bucket/x"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert placed("runs/x") == str(tmp_path / "runs" / "x")
    assert placed("/data/x") == "/data/x"


def test_what_stays_on_this_machine_has_a_folder_of_its_own_for_every_home() -> None:
    assert kept_here("/data/x") == "/data/x"
    there = [kept_here(home) for home in ("s3://bucket/one", "s3://bucket/two", "s3://other/one")]
    assert len({*there}) == 3
    assert all(Path(folder).parent == Path.cwd() / "runs" for folder in there)


def test_a_machine_too_busy_to_start_ray_is_told_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def too_slow(**_: object) -> None:
        starts.append(1)
        raise RuntimeError("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", too_slow)
    with pytest.raises(ValueError, match="too busy to start Ray, which gave up twice"), ray_session():
        pass
    assert len(starts) == 2
