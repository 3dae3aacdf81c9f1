"""Named tensors on disk (safetensors), checked against a network and digested."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor, nn

from ldm.storage import read_bytes, write_bytes

MAX_LISTED = 8


def save_weights(weights: Mapping[str, Tensor], path: str) -> None:
    """Publish tensors as one safetensors file, atomically; the same tensors give the same bytes."""
    plain = {name: _plain(weights[name]) for name in sorted(weights)}
    write_bytes(path, safetensors.torch.save(plain, metadata={"format": "pt"}))


def load_weights(path: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged or no safetensors file.
    """
    try:
        return safetensors.torch.load(read_bytes(path))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def check_weights(network: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Refuse tensors that are not exactly those of a network.

    Raises:
        ValueError: listing missing, unexpected and misshapen names.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
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
        raise ValueError(f"{origin} does not hold the weights of this {type(network).__name__}: {'; '.join(found)}")


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
