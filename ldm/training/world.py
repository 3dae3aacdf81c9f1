"""The group of processes that train one model: who I am, how many we are, where my tensors live."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """One process's place in the group.

    Attributes:
        rank: my number, from 0.
        size: how many processes train together.
        device: where my tensors live.
        hosts: the same processes, exchanging through their CPUs what is not to wait for a GPU; None where the device is
            a CPU.
    """

    rank: int
    size: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Say whether I am the one that writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier(group=self.hosts)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of `values` over all processes; the same on each."""
        if self.size == 1:
            return values
        total = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / self.size

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes, the same on each.

        Gradients flow back from every process's use of the sum, as often as they are taken.
        """
        if self.size == 1:
            return values
        total: Tensor = _Total.apply(values)
        return total

    def any(self, flag: bool) -> bool:
        """Say whether the flag is up on at least one process; the same answer on each."""
        if self.size == 1:
            return flag
        raised = torch.tensor(float(flag))
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.hosts)
        return bool(raised.item())

    def gather(self, item: Any) -> list[Any]:
        """Return every process's picklable `item`, in rank order."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.hosts)
        return items


class _Total(torch.autograd.Function):
    """Sum over processes; its gradient is the sum of their gradients (torch's own is deprecated and has no heir)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total: Tensor = _Total.apply(gradients[0])
        return total


def hosts_of(size: int, device: torch.device) -> dist.ProcessGroup | None:
    """Return the group of a world's hosts, where its processes compute on GPUs; all of them call it together."""
    if size == 1 or device.type != "cuda":
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every process is in it
    return group


def join_alone(device: torch.device) -> None:
    """Join a process group of this process alone, if none is joined yet: for what can't do without one."""
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, and left out of what it exports
        dist.init_process_group(_backend_of(device), store=store, rank=0, world_size=1)


def _backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


@contextmanager
def process_group(rank: int, size: int, device: torch.device) -> Iterator[World]:
    """Yield the world of this process, joining a process group by torchrun's environment if none is joined yet.

    A group that was joined within the block is left at its end.
    """
    was_joined = dist.is_initialized()
    if size > 1 and not was_joined:
        dist.init_process_group(_backend_of(device), rank=rank, world_size=size)
    try:
        yield World(rank=rank, size=size, device=device, hosts=hosts_of(size, device))
    finally:
        if dist.is_initialized() and not was_joined:
            dist.destroy_process_group()
