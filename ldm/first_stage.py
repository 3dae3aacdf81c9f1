"""The autoencoder of a model by its address, whatever kind of address that is.

    shipped:small_f4                    one that comes with this project (`SHIPPED` lists them), trained on drawings
    FOLDER or URL                       diffusers' layout (ours), or the root of a pipeline or model with vae/ or vqvae/
    FILE or URL .safetensors .ckpt .pt  a checkpoint in the layout of CompVis, its YAML beside it if there is one
    org/name[@revision][/inside]        either of them at the hub; hf://org/name too; a local folder of that name wins
    models:/NAME/1  models:/NAME@alias  the autoencoder of a model that this project registered in MLflow;
    runs:/RUN_ID/text_to_image          the same by its run

Order: MLflow's pointer → hub → a copy on this machine → layout → network. Files from the hub lie where
`huggingface_hub` keeps them, those from other URLs in its folder of assets (`HF_HOME/assets/ldm`): each is fetched once
a machine and state, and old ones stay until a person deletes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import cached_assets_path

from ldm import autoencoder as autoencoder_package
from ldm import storage
from ldm.autoencoder.model import Autoencoder
from ldm.hub import HUB_SCHEME, HubName, NotAtTheHubError, fetched, hub_name, may_be_at_the_hub
from ldm.interop import compvis, diffusers
from ldm.interop.weights import PICKLE_SUFFIXES

EVALUATION_FILE = "evaluation.json"
"""Beside an autoencoder's weights: what its training measured on held-out rows at the end."""
MLFLOW_SCHEMES = ("models:/", "runs:/")
SHIPPED_SCHEME = "shipped:"
SHIPPED = ("small_f4", "small_f8")
"""The autoencoders that come with this project; the README.md in each one's folder is its model card."""
CHECKPOINT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
SUBFOLDERS = ("", "vae", "vqvae")
"""Where in a folder an autoencoder in diffusers' layout may lie; pipelines from before 2022's end say vqvae."""
_MAX_LISTED = 8


class NoAutoencoderError(FileNotFoundError, ValueError):
    """Nothing lies at an address; a ValueError too, since a person can fix it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where an autoencoder was found.

    Attributes:
        path: folder in the layout of diffusers, or checkpoint in that of CompVis.
        config: for a checkpoint the YAML beside it; empty where there is none, and for a folder.
    """

    path: str
    config: str = ""

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is one file in the layout of CompVis."""
        return _is_checkpoint(self.path)


def load_autoencoder(where: str) -> Autoencoder:
    """Return the autoencoder of an address (see the module), KL or VQ, as float32 on the CPU.

    Raises:
        NoAutoencoderError: if nothing is there, naming what was looked for.
        ValueError: if what is there is no autoencoder that ours can be, a pickle that would run code, damaged, or not
            what MLflow's pointer says.
    """
    if where.startswith(MLFLOW_SCHEMES):
        return _pointed_autoencoder(where)
    place = find_autoencoder(where)
    if place.is_checkpoint:
        config = storage.read_text(place.config) if place.config else ""
        return compvis.load_autoencoder(_on_this_machine(place.path), config, origin=place.path)
    weights_path = diffusers.weights_path(place.path)
    if not storage.exists(weights_path):
        raise NoAutoencoderError(f"{place.path} has no weights beside its config.json: expected {weights_path}")
    config_path = _on_this_machine(storage.join(place.path, diffusers.CONFIG_NAME))
    return diffusers.load_autoencoder_files(config_path, _on_this_machine(weights_path), origin=place.path)


def settled_address(where: str, tracking_uri: str = "") -> str:
    """Return an address that means the same autoencoder to every worker, also when an alias moves meanwhile.

    Addresses at MLflow become that of the folder which their pointer names; others are returned as they are.

    Args:
        where: any address of an autoencoder.
        tracking_uri: the MLflow server; empty is what `MLFLOW_TRACKING_URI` says.

    Raises:
        ValueError: if MLflow has no such model of ours.
    """
    return _resolved(where, tracking_uri)[0] if where.startswith(MLFLOW_SCHEMES) else where


def evaluation_of(where: str) -> dict[str, Any] | None:
    """Return what an autoencoder's training wrote at its end; None where nothing lies beside its weights.

    Checkpoints in the layout of CompVis have none: several may lie in one folder.

    Raises:
        NoAutoencoderError: if there is no autoencoder.
        ValueError: if the file holds no mapping.
    """
    place = find_autoencoder(settled_address(where))
    path = storage.join(place.path, EVALUATION_FILE)
    if place.is_checkpoint or not storage.exists(path):
        return None
    content = json.loads(storage.read_text(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(content).__name__}")
    return content


def find_autoencoder(where: str) -> Place:
    """Return where the autoencoder of an address lies that is not at MLflow; from the hub it is fetched.

    Raises:
        NoAutoencoderError: if nothing is there, naming what was looked for and what there is.
        ValueError: if the address is empty.
    """
    if not where:
        kinds = "folder, file, URL, hub name, models:/NAME/1 or shipped:NAME"
        raise ValueError(f"the autoencoder's address is empty; give a {kinds}")
    if where.startswith(HUB_SCHEME):
        return _at_the_hub(where.removeprefix(HUB_SCHEME))
    if where.startswith(SHIPPED_SCHEME):
        return _shipped(where.removeprefix(SHIPPED_SCHEME))
    local = Path(where).expanduser()
    if "://" in where:
        return _place(where)
    if local.exists():
        return _place(str(local))
    if not may_be_at_the_hub(where):
        raise NoAutoencoderError(f"there is no autoencoder at {where}: no such file or folder")
    return _at_the_hub(where)


def _shipped(name: str) -> Place:
    if name not in SHIPPED:
        raise NoAutoencoderError(f"there is no shipped autoencoder {name!r}; there are {', '.join(SHIPPED)}")
    return Place(path=str(Path(autoencoder_package.__file__).parent / "shipped" / name))


def _place(where: str, named: str = "") -> Place:
    """Return what lies at a path or URL; errors name it as a person did, where that was otherwise."""
    named = named or where
    if _is_checkpoint(where):
        if not storage.exists(where):
            raise NoAutoencoderError(f"there is no autoencoder at {named}: no such file")
        return Place(path=where, config=_yaml_beside(where))
    for subfolder in SUBFOLDERS:
        folder = storage.join(where, subfolder) if subfolder else where.rstrip("/")
        if storage.exists(storage.join(folder, diffusers.CONFIG_NAME)):
            return Place(path=folder)
    wanted = ", ".join(f"{subfolder}/config.json".lstrip("/") for subfolder in SUBFOLDERS)
    there = _there(where) if named == where else "and that repository has none; a checkpoint is named by its file"
    raise NoAutoencoderError(f"there is no autoencoder at {named}: expected one of {wanted} in it, {there}")


def _there(folder: str) -> str:
    """Say what a folder holds, to whom looked for something else there."""
    if folder.startswith(storage.WEB):
        return "and this server has none of them, or did not answer"
    names = storage.list_names(folder)
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    checkpoints = " (a checkpoint is named by its file)" if any(map(_is_checkpoint, names)) else ""
    return f"got {', '.join(names[:_MAX_LISTED]) or 'nothing'}{more}{checkpoints}"


def _yaml_beside(checkpoint: str) -> str:
    """Return where the YAML of a checkpoint lies: of the same name, else the folder's; empty where there is none."""
    return next((path for path in _yaml_candidates(checkpoint) if storage.exists(path)), "")


def _yaml_candidates(checkpoint: str) -> list[str]:
    url, query = checkpoint.partition("?")[::2] if "://" in checkpoint else (checkpoint, "")
    folder, slash, name = url.rpartition("/")
    stem = name.rpartition(".")[0]
    names = (f"{stem}.yaml", "config.yaml", "project.yaml")
    return [f"{folder}{slash}{other}{'?' if query else ''}{query}" for other in names]


def _is_checkpoint(where: str) -> bool:
    return (urlsplit(where).path if "://" in where else where).endswith(CHECKPOINT_SUFFIXES)


def _on_this_machine(path: str) -> str:
    if storage.is_local(path):
        return path
    return storage.local_copy(path, str(cached_assets_path("ldm", "autoencoders")))


def _at_the_hub(where: str) -> Place:
    """Fetch what is needed of a repository, safetensors before pickles, and return where it lies here."""
    name = hub_name(where)
    inside = name.inside
    if _is_checkpoint(inside):
        folder = _snapshot(where, name, [inside, *_yaml_candidates(inside)])
    else:
        folders = [f"{inside}/{subfolder}".strip("/") for subfolder in SUBFOLDERS]
        small = [diffusers.CONFIG_NAME, EVALUATION_FILE]
        folder = _snapshot(where, name, _in_each(folders, [*small, diffusers.WEIGHTS_NAME]))
        if not any((folder / sub / diffusers.WEIGHTS_NAME).exists() for sub in folders):
            folder = _snapshot(where, name, _in_each(folders, [*small, diffusers.PICKLE_NAME]))
    return _place(str(folder / inside), where)


def _in_each(folders: Sequence[str], names: Sequence[str]) -> list[str]:
    return [f"{folder}/{name}".lstrip("/") for folder in folders for name in names]


def _snapshot(where: str, name: HubName, patterns: Sequence[str]) -> Path:
    try:
        return fetched(name, patterns)
    except NotAtTheHubError as error:
        raise NoAutoencoderError(f"there is no autoencoder at {where}: no such folder here, and {error}") from error


def _pointed_autoencoder(where: str) -> Autoencoder:
    folder, digest = _resolved(where, "")
    model = load_autoencoder(folder)
    found = diffusers.weights_digest(model.state_dict(), model.config)
    if found != digest:
        raise ValueError(f"{where} was registered with autoencoder {digest}, in {folder} lies {found}")
    return model


def _resolved(where: str, tracking_uri: str) -> tuple[str, str]:
    """Return folder and digest of the autoencoder that a pointer at MLflow names."""
    # Optional: without MLflow every other kind of address still works.
    try:
        from ldm.registry import pointed_autoencoder
    except ImportError as error:
        raise ValueError(f"{where} needs MLflow, which is not installed: pip install mlflow") from error
    pointed = pointed_autoencoder(where, tracking_uri)
    return pointed.folder, pointed.digest
