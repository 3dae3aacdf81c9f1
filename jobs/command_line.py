"""The one command line of every job: a recipe gives the whole config, flags override any field of it.

    python -m jobs.NAME [RECIPE] [--home DIR | --config FILE | --from-run RUN_ID] [--dry-run] [--any.field value ...]

Order: the recipe (a function of the home folder), a saved YAML file or a run's page at MLflow gives the whole config →
flags override single fields, `--optim.lr 3e-4` → what a person can fix comes out as one line with exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Generic, TypeVar

import tyro
import yaml

from jobs.session import SUBMITTED_JOB
from jobs.wiring.picture_settings import is_png, is_png_name, repeated_here, settings_in
from jobs.wiring.repeating import repeated
from ldm import storage
from ldm.config import Config
from ldm.training.page import RunPage

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=Config)

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130
MARKERS = (tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues)


@dataclass(frozen=True, kw_only=True)
class Invocation(Generic[ConfigT]):
    """What a person asked for.

    Attributes:
        config: the whole config, with every override applied.
        recipe: name of the recipe it came from; with `--config` and no recipe, the default one, which gave the type.
        dry_run: say what would be done, and do nothing.
        page: of the run that `--from-run` repeats; None without it.
    """

    config: ConfigT
    recipe: str
    dry_run: bool
    page: RunPage | None = None


@dataclass(frozen=True, kw_only=True)
class _Line(Generic[ConfigT]):
    """One parsed command line; the docstrings of its fields are their help."""

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE]")]
    """Named run to start from; it comes first."""
    home: str
    """Folder or URL that the recipe puts everything under."""
    saved_config: Annotated[str | None, tyro.conf.arg(name="config", aliases=("--repeat",), metavar="FILE")]
    """YAML file of a whole config, as saved with every run, in place of a recipe; or a picture, whose settings take the
    place of all but folders and machines. Flags still override fields."""
    from_run: Annotated[str | None, tyro.conf.arg(metavar="RUN_ID")]
    """Run at MLflow (--tracking.uri) whose whole config is taken, in folders of its own; flags still override."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff]
    """Say what would be done and what is already there, and make nothing."""
    config: Annotated[ConfigT, tyro.conf.arg(name="")]


def from_command_line(
    job: str, recipes: Mapping[str, Callable[[str], ConfigT]], argv: Sequence[str] | None = None
) -> Invocation[ConfigT]:
    """Return what the command line asks for, or explain it and exit with code 2.

    Args:
        job: the job's name in `python -m jobs.NAME`.
        recipes: names to functions of a home folder that return the job's whole config; the first is the default.
        argv: the arguments after the job's name; `sys.argv[1:]` if None.
    """
    with report_errors():
        return _parse(job, recipes, list(sys.argv[1:] if argv is None else argv))


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn what a person can fix into one clear line on stderr; also a decorator, `@report_errors()`.

    A ValueError exits with code 2 (its traceback is logged at DEBUG), Ctrl-C with 130; anything else is a fault of
    the program and keeps its traceback.
    """
    try:
        yield
    except ValueError as error:
        logger.debug("refused", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except KeyboardInterrupt:
        print("stopped; start the same command again to go on", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _parse(job: str, recipes: Mapping[str, Callable[[str], ConfigT]], argv: list[str]) -> Invocation[ConfigT]:
    name = argv[0] if argv and not argv[0].startswith("-") else next(iter(recipes))
    if name not in recipes:
        raise ValueError(_unknown_recipe(job, name, recipes))
    given = _common_options(argv)
    home = placed(given.home or f"runs/{name}")
    start = recipes[name](home)
    start, page = _start(start, given)
    _check_names_are_free(type(start))
    default = _Line(
        recipe=name, home=home, saved_config=given.config, from_run=given.from_run, dry_run=False, config=start
    )
    line = _read(_Line[type(start)], default, argv, f"python -m jobs.{job}", _description(start, recipes))  # type: ignore[misc]
    if line.recipe != name:
        raise ValueError(f"the recipe comes first: python -m jobs.{job} {line.recipe} ...")
    return Invocation(config=line.config, recipe=name, dry_run=line.dry_run, page=page)


def _start(recipe: ConfigT, given: argparse.Namespace) -> tuple[ConfigT, RunPage | None]:
    """Return the config that flags override, and the page of the run that it is taken from."""
    if given.config and given.home and not is_png_name(given.config):
        raise ValueError("--home is for a recipe; the paths of a saved --config stand in the file: give one of the two")
    if given.from_run and (given.config or given.home):
        raise ValueError("--from-run brings its own config and paths: give it without --config and --home")
    if given.config:
        return _load(recipe, given.config), None
    return repeated(recipe, given.from_run, given.tracking_uri or "") if given.from_run else (recipe, None)


def placed(home: str) -> str:
    """Return a home folder that means the same to every process: URLs as they are, local paths absolute.

    A job that was submitted to a Ray cluster runs in a copy of the code that is thrown away, so a relative path then
    counts from the user's own folder.
    """
    if not storage.is_local(home):
        return home
    base = Path.home() if os.environ.get(SUBMITTED_JOB) else Path.cwd()
    return str(base / Path(home).expanduser())


def kept_here(home: str) -> str:
    """Return the folder for what stays on this machine: the home itself, or for a URL a local one of its own."""
    if storage.is_local(home):
        return home
    return placed("runs/" + home.partition("://")[2].strip("/").replace("/", "-"))


def _common_options(argv: list[str]) -> argparse.Namespace:
    """Read what decides the defaults of everything else; tyro then reads, checks and explains the whole line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--home", nargs="?")
    parser.add_argument("--config", "--repeat", nargs="?")
    parser.add_argument("--from-run", "--from_run", nargs="?")
    parser.add_argument("--tracking.uri", nargs="?", dest="tracking_uri")
    return parser.parse_known_args(argv)[0]


def _load(recipe: ConfigT, path: str) -> ConfigT:
    try:
        content = storage.read_bytes(path)
        if is_png(content):
            return repeated_here(recipe, settings_in(content))
        return type(recipe).from_yaml(content.decode())
    except OSError as error:
        raise ValueError(f"there is no config file {path}") from error
    except (yaml.YAMLError, ValueError) as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path}: {error}") from error


def _read(kind: Any, default: _Line[ConfigT], argv: list[str], prog: str, description: str) -> _Line[ConfigT]:
    """Parse without a sound first: a config that refuses its values is reported by us, the rest by tyro's own boxes."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return tyro.cli(kind, default=default, args=argv, prog=prog, config=MARKERS)
    except SystemExit as stop:
        refusal = _refusal_behind(stop)
        if refusal is not None:
            raise refusal from None
    return tyro.cli(kind, default=default, args=argv, prog=prog, config=MARKERS, description=description)


def _refusal_behind(stop: SystemExit) -> ValueError | None:
    """Return the ValueError of a config's `__post_init__` that made tyro give up, named after its class."""
    cause: BaseException | None = stop
    while cause is not None:
        refusing = _refusing_config(cause.__traceback__)
        if isinstance(cause, ValueError) and refusing is not None:
            return ValueError(f"{refusing}: {cause}")
        cause = cause.__cause__ or cause.__context__
    return None


def _refusing_config(trace: TracebackType | None) -> str | None:
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if trace.tb_frame.f_code.co_name == "__post_init__" and isinstance(owner, Config):
            return type(owner).__name__
        trace = trace.tb_next
    return None


def _check_names_are_free(config: type[Config]) -> None:
    ours = {"recipe", "home", "config", "from_run", "dry_run"}
    clash = sorted(ours & {field.name for field in dataclasses.fields(config)})
    if clash:
        raise TypeError(f"{config.__name__} may not have the fields {clash} at its top: every job has such an option")


def _description(config: Config, recipes: Mapping[str, Callable[[str], Config]]) -> str:
    width = max(map(len, recipes))
    lines = [f"  {name:{width}}  {_first_line(recipe)}" for name, recipe in recipes.items()]
    return "\n".join(
        [_first_line(type(config)), "", f"recipes (the first is the default: {next(iter(recipes))}):", *lines]
    )


def _first_line(documented: object) -> str:
    described = documented.func if isinstance(documented, partial) else documented
    return (inspect.getdoc(described) or "").partition("\n")[0]


def _unknown_recipe(job: str, name: str, recipes: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, recipes, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"jobs.{job} has no recipe {name!r}{hint} It has: {', '.join(recipes)}"
