"""The code and the packages that a run is made with, so that it can be repeated."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path

from jobs.session import PROJECT, code_version
from ldm.training.page import CHANGES_FILE, ENVIRONMENT_FILE

MAX_CHANGES_BYTES = 2 << 20
"""So much of the changes is kept; more are data that were committed by mistake."""
UNTRACKED = "# not committed and not in here: "
CUT = "# cut here: {left:,} more bytes of changes were not kept, so this can't be applied\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What a run is made with.

    Attributes:
        tags: commit, digests of packages and uncommitted changes; what a run's page is compared by.
        files: names to contents: the packages, and the changes where there are any.
    """

    tags: dict[str, str]
    files: dict[str, bytes]


def provenance() -> Provenance:
    """Return the code and packages of this process."""
    packages, changes = installed_packages().encode(), uncommitted_changes(PROJECT)
    tags = {**code_version(), "environment_digest": sha256(packages).hexdigest()}
    files = {ENVIRONMENT_FILE: packages}
    if not changes:
        return Provenance(tags=tags, files=files)
    return Provenance(
        tags={**tags, "code_changes_digest": sha256(changes).hexdigest()},
        files={**files, CHANGES_FILE: cut(changes)},
    )


def installed_packages() -> str:
    """Return every installed package as `name==version`, one a line, as pip's own list has it, below Python's."""
    version_of: dict[str, str] = {}
    for package in distributions():
        version_of.setdefault(package.metadata["Name"], package.version)  # the first on the path is what is imported
    lines = [f"{name}=={version_of[name]}" for name in sorted(version_of, key=str.lower)]
    return "\n".join([f"# python=={platform.python_version()}", f"# {platform.platform()}", *lines, ""])


def uncommitted_changes(code: Path) -> bytes:
    """Return what `git apply` makes of the commit what lies in a folder, and the names of files git does not know.

    Empty where nothing has changed, or the folder is not git's.
    """
    try:
        changes = _git(code, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--no-textconv")
        unknown = _git(code, "ls-files", "--others", "--exclude-standard").decode(errors="replace").splitlines()
    except (OSError, subprocess.SubprocessError):
        return b""
    return "".join(f"{UNTRACKED}{name}\n" for name in unknown).encode() + changes


def cut(changes: bytes, max_bytes: int = MAX_CHANGES_BYTES) -> bytes:
    """Return changes of bearable size; what was left out is said at the end."""
    left = len(changes) - max_bytes
    return changes if left <= 0 else changes[:max_bytes] + b"\n" + CUT.format(left=left).encode()


def _git(folder: Path, *words: str) -> bytes:
    return subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, timeout=20).stdout
