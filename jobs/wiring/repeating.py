"""Repeating a run from its page at MLflow alone: its configuration in new folders, and what is not as it was then.

Order: `repeated` gives the configuration that the run was started with → flags override it → `announce_repetition`
says where it goes, and names what may make the numbers differ: the code, the packages, the data.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from jobs.session import is_main_process
from jobs.wiring.provenance import Provenance, provenance
from ldm.config import Config
from ldm.training.page import CHANGES_FILE, ENVIRONMENT_FILE, DataInput, RunPage

ConfigT = TypeVar("ConfigT", bound=Config)
RECORDED = {"root", "record", "tracking"}
MAX_NAMED = 8
"""So many packages are named one by one."""


def repeated(start: ConfigT, run_id: str, uri: str) -> tuple[ConfigT, RunPage]:
    """Return the configuration of a run with folders of its own, and the run's page.

    The folders are the run's with the same ending each time, so that a repetition which was interrupted goes on when
    the same command is started again.

    Args:
        start: a recipe's configuration of the same job: its type, and where MLflow is if `uri` is empty.
        run_id: the run, or one of its attempts.
        uri: MLflow tracking URI.

    Raises:
        ValueError: if the job records no such runs, or MLflow does not have it or does not answer.
    """
    there: Any = start
    if not {field.name for field in fields(start)} >= RECORDED:
        raise ValueError("--from-run is for jobs that record a run in MLflow; this one does not")
    where: str = uri or there.tracking.uri
    if not where:
        raise ValueError("--from-run needs to know where the run is: give --tracking.uri")
    page = _page(where, run_id)
    try:
        saved: Any = type(start).from_yaml(page.config)
    except ValueError as error:
        raise ValueError(f"run {run_id} at {where} is not one of this job's, or of another version: {error}") from error
    ending = f"-repeat-{run_id[:8]}"
    root, record = saved.root.rstrip("/") + ending, saved.record and saved.record.rstrip("/") + ending
    return replace(saved, root=root, record=record, tracking=replace(saved.tracking, uri=where)), page


def announce_repetition(page: RunPage | None, root: str, inputs: Sequence[DataInput]) -> None:
    """Print where a run is repeated and what is not as it was when it was made; nothing for one that repeats none."""
    if page is None or not is_main_process():
        return
    print(f"repeats   run {page.run_id}: {root}")
    for difference in differences(page, provenance(), inputs):
        print(f"warning: run {page.run_id[:8]} may not be repeated exactly: {difference}", file=sys.stderr)


def differences(page: RunPage, now: Provenance, inputs: Sequence[DataInput]) -> list[str]:
    """Return a sentence for each thing that was another one then: commit, changes, packages, data."""
    return [*_code_differences(page, now), *_package_differences(page, now), *_data_differences(page, inputs)]


def _page(uri: str, run_id: str) -> RunPage:
    # Optional: a machine without MLflow has no runs to repeat.
    from ldm.training.tracked_page import read_page

    try:
        return read_page(uri, run_id)
    except OSError as error:
        raise ValueError(f"{error}: --from-run reads the run's page there; say where by --tracking.uri") from error


def _code_differences(page: RunPage, now: Provenance) -> list[str]:
    found = []
    for name in ("code_commit", "code_package"):
        then, here = page.tags.get(name, ""), now.tags.get(name, "")
        if then != here:
            found.append(f"its {name.replace('_', ' ')} is {then or 'not known'}, here it is {here or 'not known'}")
    then, here = page.tags.get("code_changes_digest", ""), now.tags.get("code_changes_digest", "")
    if then and then != here:
        found.append(f"it was made with changes that were not committed and are not here: {CHANGES_FILE} of its files")
    elif then != here:
        found.append("here are changes that were not committed, and it was made without")
    return found


def _package_differences(page: RunPage, now: Provenance) -> list[str]:
    then = _versions(page.environment)
    here = _versions(now.files[ENVIRONMENT_FILE].decode())
    if not then:
        return [f"its page has no {ENVIRONMENT_FILE}, so its packages are not known"]
    other = [name for name in sorted({*then, *here}, key=str.lower) if then.get(name) != here.get(name)]
    if not other:
        return []
    named = [f"{name} {then.get(name, 'absent')} then, {here.get(name, 'absent')} here" for name in other[:MAX_NAMED]]
    more = f", and {len(other) - MAX_NAMED} more" if len(other) > MAX_NAMED else ""
    return [f"{len(other)} packages differ: {'; '.join(named)}{more}"]


def _data_differences(page: RunPage, inputs: Sequence[DataInput]) -> list[str]:
    found = []
    for given in inputs:
        then = page.digest_of_input.get(given.name, "")
        if not then:
            found.append(f"its page does not name its {given.name}")
        elif not given.digest.startswith(then):
            found.append(f"its {given.name} had the digest {then}, the one at {given.uri} has {given.digest}")
    return found


def _versions(environment: str) -> dict[str, str]:
    """Return names to versions of what `installed_packages` listed, Python's own among them."""
    pairs = (line.removeprefix("# ").partition("==") for line in environment.splitlines())
    return {name: version for name, is_pair, version in pairs if is_pair}
