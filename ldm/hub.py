"""Names at the hub, and files of a repository there, fetched once a machine.

    org/name[@revision][/inside]        the revision may come last too; `hf://` before it says that no folder is meant

Files lie where `huggingface_hub` keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

HUB_SCHEME = "hf://"
LOCAL_ONLY = ("/", "./", "../", "~")
"""What a path begins with that can't be a name at the hub."""
_HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<early>[^/@]+))?(/(?P<inside>[^@]+?))?/?(@(?P<late>[^@]+))?"
)


class NotAtTheHubError(ValueError):
    """The hub has no such repository or revision, or does not answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubName:
    """What a name at the hub says.

    Attributes:
        repository: org/name.
        revision: branch, tag or commit; None for the default branch.
        inside: a path in the repository; empty is its root.
    """

    repository: str
    revision: str | None = None
    inside: str = ""


def hub_name(where: str) -> HubName:
    """Return the parts of a name, without `hf://`.

    Raises:
        ValueError: if it is none.
    """
    parts = _HUB_NAME.fullmatch(where)
    if parts is None:
        raise ValueError(f"a name at the hub is org/name[@revision][/inside], got {where!r}")
    revision = unquote(parts["early"] or parts["late"] or "") or None
    return HubName(repository=parts["name"], revision=revision, inside=parts["inside"] or "")


def may_be_at_the_hub(where: str) -> bool:
    """Say whether a path that is not here may be a name at the hub.

    Below a folder that is here, a name is a slip of the pen; hf:// says that the hub is meant.
    """
    is_below_a_folder = Path(Path(where).expanduser().parts[0]).is_dir() if where else False
    return not (where.startswith(LOCAL_ONLY) or is_below_a_folder or not _HUB_NAME.fullmatch(where))


def fetched(name: HubName, patterns: Sequence[str]) -> Path:
    """Return the local folder of a repository with those of its files that match the patterns.

    Raises:
        NotAtTheHubError: if the hub gave nothing, saying why.
    """
    try:
        return Path(snapshot_download(name.repository, revision=name.revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        why = str(error).strip().partition("\n")[0]
        at = f" at {name.revision}" if name.revision else ""
        raise NotAtTheHubError(f"the hub gave no repository {name.repository}{at}: {why}") from error
