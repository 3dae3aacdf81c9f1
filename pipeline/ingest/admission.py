"""Which downloads may go on now: connections in all, connections a host, and bytes in memory.

A download passes three gates in this order: its host's, that of all connections, that of memory. Who waits at a gate is
let through in the order of rows. Memory is given back only when the consumer has taken the row, and the consumer takes
rows in order: so the row that it wants next, the head, passes the gate of memory even when that is exhausted, and then
the other two as well, lest it wait for one that waits for memory. At any time there is at most one such row.
"""

from __future__ import annotations

import asyncio
from heapq import heappop, heappush

START_BYTES = 1 << 18
"""Memory a download takes to begin with: most pictures and a socket's buffers fit."""


class Gate:
    """A number of units that rows take and give back."""

    def __init__(self, num_units: int) -> None:
        self.num_free = num_units
        self.waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    def take_now(self, num_units: int) -> bool:
        """Take the units if they are free and nobody waits; return whether they were taken."""
        if self.waiting or self.num_free < num_units:
            return False
        self.num_free -= num_units
        return True

    def queue(self, order: int, num_units: int, future: asyncio.Future[None]) -> None:
        """Let a row wait; its future is done when it has the units."""
        heappush(self.waiting, (order, num_units, future))

    def give(self, num_units: int) -> None:
        """Give units back and let through who fits now."""
        self.num_free += num_units
        while self.waiting and (self.waiting[0][2].done() or self.waiting[0][1] <= self.num_free):
            self._let_first_through()

    def let_through(self, order: int) -> None:
        """Let row `order` through if it is the first to wait, whatever is free."""
        while self.waiting and self.waiting[0][2].done():
            heappop(self.waiting)
        if self.waiting and self.waiting[0][0] == order:
            self._let_first_through()

    def _let_first_through(self) -> None:
        _, num_units, future = heappop(self.waiting)
        if not future.done():
            self.num_free -= num_units
            future.set_result(None)


class Admission:
    """The gates of one pass over rows; lives in the event loop's thread."""

    def __init__(self, num_connections: int, num_connections_per_host: int, max_bytes: int) -> None:
        self.connections = Gate(num_connections)
        self.memory = Gate(max_bytes)
        self.num_connections_per_host = num_connections_per_host
        self.hosts: dict[str, Gate] = {}
        self.head = 0
        self.gate_of_waiting: dict[int, Gate] = {}

    def advance(self, head: int) -> None:
        """Learn which row the consumer wants next."""
        self.head = head
        self._help_head()

    async def pass_gate(self, gate: Gate, order: int, num_units: int) -> None:
        """Wait until row `order` has the units."""
        if gate.take_now(num_units):
            return
        future = asyncio.get_running_loop().create_future()
        gate.queue(order, num_units, future)
        self.gate_of_waiting[order] = gate
        self._help_head()
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                gate.give(num_units)
            raise
        finally:
            del self.gate_of_waiting[order]

    def _help_head(self) -> None:
        gate = self.gate_of_waiting.get(self.head)
        if gate is not None and (gate is self.memory or self.memory.waiting):
            gate.let_through(self.head)


class Turn:
    """One row's way through the gates, and its clock, which stands still while the row waits for others."""

    def __init__(self, admission: Admission, order: int) -> None:
        self.admission = admission
        self.order = order
        self.loop_seconds = asyncio.get_running_loop().time
        self.waited_seconds = 0.0
        self.held_bytes = 0
        self.host = ""

    def seconds(self) -> float:
        """Return the time on the row's clock."""
        return self.loop_seconds() - self.waited_seconds

    async def enter(self, host: str) -> None:
        """Wait for a connection to `host` and memory to begin with; `leave` gives them back."""
        admission = self.admission
        gate = admission.hosts.get(host)
        if gate is None:
            gate = admission.hosts[host] = Gate(admission.num_connections_per_host)
        began = self.loop_seconds()
        await admission.pass_gate(gate, self.order, 1)
        try:
            await admission.pass_gate(admission.connections, self.order, 1)
        except asyncio.CancelledError:
            self._leave_host(host, gate)
            raise
        self.host = host
        await self._take_memory(START_BYTES)
        self.waited_seconds += self.loop_seconds() - began

    async def grow(self, num_bytes: int) -> None:
        """Wait until the row may hold `num_bytes` in all."""
        if num_bytes > self.held_bytes:
            began = self.loop_seconds()
            await self._take_memory(num_bytes - self.held_bytes)
            self.waited_seconds += self.loop_seconds() - began

    def leave(self, num_kept_bytes: int = 0) -> None:
        """Give the connection back, and the memory beyond the bytes that the consumer will be given."""
        self.admission.memory.give(self.held_bytes - num_kept_bytes)
        self.held_bytes = num_kept_bytes
        if self.host:
            self.admission.connections.give(1)
            self._leave_host(self.host, self.admission.hosts[self.host])
            self.host = ""

    def is_last_of_host(self) -> bool:
        """Return whether no other row waits for a connection to this row's host."""
        return not self.admission.hosts[self.host].waiting

    async def _take_memory(self, num_bytes: int) -> None:
        await self.admission.pass_gate(self.admission.memory, self.order, num_bytes)
        self.held_bytes += num_bytes

    def _leave_host(self, host: str, gate: Gate) -> None:
        gate.give(1)
        if gate.num_free == self.admission.num_connections_per_host and not gate.waiting:
            del self.admission.hosts[host]
