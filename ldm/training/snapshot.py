"""What a process saves of a run: the contents of its files, written at once, or copied first so that training goes on.

A copy keeps all that a file's bytes depend on: order, types, and which tensors share a storage.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One part of a run's state at one moment, as far as this process writes it.

    Attributes:
        files: contents by name: plain data and tensors, which are live ones except in a copy. Empty where another
            process writes all of it.
    """

    files: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the files into a folder, which is made if need be; pieces of one storage are written once."""
        for name, content in self.files.items():
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(content, folder / name)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Room:
    """Memory for one storage.

    Attributes:
        memory: uint8, shape (bytes,).
        is_locked: whether its pages stay where a GPU finds them.
    """

    memory: Tensor
    is_locked: bool

    @classmethod
    def made_for(cls, storage: torch.UntypedStorage) -> _Room:
        is_locked = storage.device.type == "cuda"
        return cls(memory=torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=is_locked), is_locked=is_locked)

    def fits(self, storage: torch.UntypedStorage) -> bool:
        return self.memory.numel() == storage.nbytes() and self.is_locked == (storage.device.type == "cuda")


class HostMemory:
    """The host's memory that states are copied to, one after the other: what is taken once is used again."""

    def __init__(self) -> None:
        self._rooms: list[_Room] = []

    @torch.no_grad()
    def copied(self, snapshots: Mapping[str, Snapshot]) -> dict[str, Snapshot]:
        """Return copies of snapshots; the next call writes over them."""
        copying = _Copying(iter(self._rooms))
        copies = {part: Snapshot(files=copying.copied(snapshot.files)) for part, snapshot in snapshots.items()}
        self._rooms = copying.rooms
        copying.wait()
        return copies


class _Copying:
    """One copy in the making.

    Args:
        free: rooms of an earlier copy, used again where a storage of the same size comes at the same place.
    """

    def __init__(self, free: Iterator[_Room]) -> None:
        self._free = free
        self._taken: dict[int, tuple[torch.UntypedStorage, _Room]] = {}

    @property
    def rooms(self) -> list[_Room]:
        return [room for _, room in self._taken.values()]

    def copied(self, content: Any) -> Any:
        match content:
            case Tensor():
                room = self._room_of(content.untyped_storage())
                view = torch.empty(0, dtype=content.dtype)
                place = (content.storage_offset(), content.size(), content.stride())
                return view.set_(room.memory.untyped_storage(), *place)
            case dict():
                same = copy.copy(content)  # with the attributes of a module's state, which are saved too
                same.update({name: self.copied(item) for name, item in content.items()})
                return same
            case list() | tuple():
                return type(content)(map(self.copied, content))
            case _:
                return content

    def _room_of(self, storage: torch.UntypedStorage) -> _Room:
        key = storage._cdata  # by which torch knows a storage when it saves
        if key not in self._taken:
            free = next(self._free, None)
            room = free if free is not None and free.fits(storage) else _Room.made_for(storage)
            room.memory.copy_(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), non_blocking=True)
            self._taken[key] = (storage, room)
        return self._taken[key][1]

    def wait(self) -> None:
        for device in {storage.device for storage, _ in self._taken.values() if storage.device.type == "cuda"}:
            torch.cuda.synchronize(device)
