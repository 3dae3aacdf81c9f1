"""Named tensors on disk (safetensors; pickles of plain tensors are read too), checked against a network, digested."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from io import BytesIO

import safetensors.torch
import torch
from torch import Tensor, nn

from ldm.storage import exists, is_local, join, located, read_bytes, read_text, write_bytes

MAX_LISTED = 8
VARIANTS = ("", "fp32", "fp16", "bf16")
"""What tells files of one network's weights apart, the best first: the usual ones have no such part in their names."""
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def save_weights(weights: Mapping[str, Tensor], path: str) -> None:
    """Publish tensors as one safetensors file, atomically; the same tensors give the same bytes."""
    plain = {name: _plain(weights[name]) for name in sorted(weights)}
    write_bytes(path, safetensors.torch.save(plain, metadata={"format": "pt"}))


def load_weights(path: str, prefix: str = "") -> dict[str, Tensor]:
    """Return the named tensors of a file, on the CPU: safetensors, or a pickle that holds nothing but tensors.

    Args:
        path: local or anywhere fsspec reaches; of a local safetensors file only what is asked for is read.
        prefix: which names, if any begins with it; it is taken off them. Empty takes all.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged, of another kind, or a pickle that would run code.
    """
    if not path.endswith(PICKLE_SUFFIXES):
        return _from_safetensors(path, prefix)
    weights = _from_pickle(path)
    return {name.removeprefix(prefix): weights[name] for name in _chosen(weights, prefix)}


def safetensors_files(folder: str, stem: str) -> list[str]:
    """Return the files of a folder that hold one network's weights together; none if there are none.

    That is one file, or several that an index names; without either of them, those of a variant (`stem.fp16...`).

    Raises:
        ValueError: if an index names a file that is not there, or is none.
    """
    for variant in VARIANTS:
        dotted = f".{variant}" if variant else ""
        if exists(whole := join(folder, f"{stem}{dotted}.safetensors")):
            return [whole]
        if exists(index := join(folder, f"{stem}.safetensors.index{dotted}.json")):
            return _indexed(folder, index)
    return []


def _indexed(folder: str, index: str) -> list[str]:
    content = json.loads(read_text(index))
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
        raise ValueError(f"{index} must hold a weight_map")
    names = sorted(set(map(str, content["weight_map"].values())))
    if outside := [name for name in names if "/" in name or "\\" in name or name in ("", ".", "..")]:
        raise ValueError(f"{index} names files that do not lie beside it: {_listed(outside)}")
    files = [join(folder, name) for name in names]
    if missing := [path for path in files if not exists(path)]:
        raise ValueError(f"{index} names files that are not there: {_listed(missing)}")
    return files


def _from_safetensors(path: str, prefix: str) -> dict[str, Tensor]:
    try:
        if not is_local(path):
            weights = safetensors.torch.load(read_bytes(path))
            return {name.removeprefix(prefix): weights[name] for name in _chosen(weights, prefix)}
        with safetensors.safe_open(located(path)[1], framework="pt") as file:
            # Cloned, for they are views of the file, and that may be written over while they are in use.
            return {name.removeprefix(prefix): file.get_tensor(name).clone() for name in _chosen(file.keys(), prefix)}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _from_pickle(path: str) -> dict[str, Tensor]:
    """Return the tensors of a pickle, which may lie under `state_dict` as in a Lightning checkpoint."""
    try:
        source = located(path)[1] if is_local(path) else BytesIO(read_bytes(path))
        content = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be loaded as plain tensors, and other pickles may run any code: {_reason(error)}. "
            "If you trust it, load it once elsewhere and write its state dict with safetensors.torch.save_file"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} must hold named tensors, got {type(content).__name__}")
    if strangers := sorted(name for name, value in content.items() if not isinstance(value, Tensor)):
        raise ValueError(f"{path} must hold nothing but tensors, got others under {_listed(strangers)}")
    return dict(content)


def _chosen(names: Iterable[str], prefix: str) -> list[str]:
    known = list(names)
    return [name for name in known if name.startswith(prefix)] or known


def _reason(error: Exception) -> str:
    """Return what torch found, without its advice to load the file all the same."""
    found = re.search(r"WeightsUnpickler error:\s*(.+?)(?: was not an allowed|\. |\n|$)", str(error))
    return found[1] if found else str(error).strip().partition("\n")[0][:200] or type(error).__name__


def check_weights(network: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Refuse tensors that are not exactly those of a network.

    Raises:
        ValueError: listing missing, unexpected and misshapen names.
    """
    check_shapes(network.state_dict(), weights, origin, type(network).__name__)


def check_shapes(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor], origin: str, network_name: str) -> None:
    """Refuse tensors that have not exactly the names and shapes of others, which may lie on the meta device.

    Raises:
        ValueError: listing missing, unexpected and misshapen names.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    faults = {
        "missing": sorted(expected.keys() - given.keys()),
        "unexpected": sorted(given.keys() - expected.keys()),
        "misshapen": [
            f"{name} {given[name]}, expected {shape}"
            for name, shape in sorted(expected.items())
            if given.get(name, shape) != shape
        ],
    }
    found = [f"{len(names)} {fault}: {_listed(names)}" for fault, names in faults.items() if names]
    if found:
        raise ValueError(f"{origin} does not hold the weights of this {network_name}: {'; '.join(found)}")


def fill(network: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Give a network built on the meta device its weights, as float32.

    Raises:
        ValueError: listing missing, unexpected and misshapen names.
    """
    check_weights(network, weights, origin)
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)


def digest_of_weights(weights: Mapping[str, Tensor], config_digest: str) -> str:
    """Return the sha256 over the config's digest and every tensor's name, dtype, shape and bytes, by sorted name."""
    digest = hashlib.sha256(config_digest.encode())
    for name in sorted(weights):
        tensor = _plain(weights[name])
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
