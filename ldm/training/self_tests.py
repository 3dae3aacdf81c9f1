"""Self-tests at the start of every attempt: what is wrong with ranks, storage or memory is refused before it costs.

Order: same code, configuration and data → storage that all ranks share → all-reduce and broadcast, timed → memory
against the forecast; and around the first step: equal weights, other rows on every rank, equal weights again.
All ranks call each together and raise the same `ValueError`. No random number is drawn.
"""

from __future__ import annotations

import errno
import hashlib
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm import storage
from ldm.training.memory import Memory
from ldm.training.world import World

EXCHANGED_BYTES = 16 << 20
EXCHANGES = 4
WARNING_SHARE = 0.9
LOOKS = 3
"""A process that was killed may hold its memory for a moment: so often it is looked at before a refusal."""
SHOWN = 5
FULL = "has no room"
"""Nothing is wrong with such a place: checkpoints say how much room they need, and that the run goes on with it."""
GIGA = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a rank finds where it runs.

    Attributes:
        name: of the machine.
        device: what tells the rank's device from others of the machine; ranks that name the same one share it.
        free_device_bytes: what is free on the device; on a CPU as `free_host_bytes`.
        free_host_bytes: what is free in the machine's memory.
    """

    name: str
    device: str
    free_device_bytes: int
    free_host_bytes: int


class Rows(Protocol):
    """A batch that says which rows of the endless sequence it is made of."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the rows' keys."""
        ...

    @property
    def samples(self) -> Tensor:
        """Return the rows' positions in the endless sequence."""
        ...


@dataclass(kw_only=True)
class Findings:
    """What the tests of one attempt found, for the sentence that says that all is well.

    Attributes:
        num_ranks: ranks that were tested.
        seconds: what the tests took.
        all_reduce_gb_per_second: what a rank sent and received; 0 for a single rank.
        memory: the forecast beside what is free; empty where nothing was forecast.
        has_equal_weights: whether a step left the same whole weights on all ranks.
    """

    num_ranks: int
    seconds: float = 0.0
    all_reduce_gb_per_second: float = 0.0
    memory: str = ""
    has_equal_weights: bool = False

    def sentence(self) -> str:
        """Return what is shown to a person."""
        found = [f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}"]
        if self.num_ranks > 1:
            found += ["same code and data", "shared storage", f"all-reduce {self.all_reduce_gb_per_second:.1f} GB/s"]
            found += ["equal weights after a step"] if self.has_equal_weights else []
        else:
            found += ["storage that keeps what is written"]
        found += [self.memory] if self.memory else []
        return f"self-tests passed in {self.seconds:.1f} s: {', '.join(found)}"


def source_digest(folders: Sequence[Path]) -> str:
    """Return the sha256 of the names and contents of all Python files below the folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\n".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def check_same(world: World, facts: Mapping[str, str]) -> None:
    """Refuse ranks that do not run the same.

    Args:
        world: the group of processes.
        facts: what must be the same on all ranks, by name.

    Raises:
        ValueError: naming the ranks and what each of them has.
    """
    differences = _differences(world.gather(dict(facts)))
    if differences:
        raise ValueError(
            f"the ranks do not run the same training:\n  {_listed(differences)}\n"
            "Give all machines the same code, packages and command, and start again."
        )


def check_storage(world: World, root: str, machine: str) -> None:
    """Refuse a root that a rank can't write, or where it does not find what the main one wrote.

    Args:
        world: the group of processes.
        root: folder or URL of the run.
        machine: this rank's machine, for the message.

    Raises:
        ValueError: naming the ranks, their machines and roots, and what went wrong.
    """
    token = world.gather(uuid.uuid4().hex)[0]
    probes = [storage.join(root, f".self-test-{token}-{rank}") for rank in range(world.size)]
    own = probes[world.rank]
    try:
        problems = world.gather(_problem_of_writing(own, token))
        if FULL in problems:
            return
        if not problems[0]:
            seen = world.gather(_problem_of_reading(probes[0], token))
            problems = [first or second for first, second in zip(problems, seen, strict=True)]
    finally:
        removed = _problem_of_removing(own)
    problems = [first or second for first, second in zip(problems, world.gather(removed), strict=True)]
    places = world.gather(f"{root} on {machine}")
    if any(problems):
        listed = [f"rank {rank} ({places[rank]}) {problem}" for rank, problem in enumerate(problems) if problem]
        raise ValueError(
            f"not every rank can use the root; rank 0 has {places[0]}:\n  {_listed(listed)}\n"
            "Take a --root that every machine can write and sees alike: a network file system, or s3://."
        )


def _problem_of_writing(path: str, content: str) -> str:
    try:
        storage.write_text(path, content)
        found = storage.read_text(path)
    except storage.PLACE_ERRORS as error:
        return FULL if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else f"can't write there: {error}"
    return "" if found == content else f"reads back {found!r} where it wrote {content!r}"


def _problem_of_reading(path: str, content: str) -> str:
    try:
        found = storage.read_text(path)
    except FileNotFoundError:
        return "does not see the file that rank 0 wrote"
    except storage.PLACE_ERRORS as error:
        return f"can't read the file that rank 0 wrote: {error}"
    return "" if found == content else f"reads {found!r} where rank 0 wrote {content!r}"


def _problem_of_removing(path: str) -> str:
    try:
        storage.remove_file(path)
    except storage.PLACE_ERRORS as error:
        return f"can't delete there: {error}"
    return ""


def check_exchange(world: World, clock: Callable[[], float]) -> float:
    """Refuse a group whose all-reduce or broadcast gives wrong numbers; return what a rank moves, in GB/s.

    The figure counts what a ring sends from each rank: 2 (w - 1) / w of the tensor.

    Raises:
        ValueError: naming the ranks and the sums that they got.
    """
    if world.size == 1:
        return 0.0
    sent = torch.empty(EXCHANGED_BYTES // 4, device=world.device)
    seconds = []
    sums: Counter[str] = Counter()
    for _ in range(EXCHANGES):
        sent.fill_(world.rank + 1)
        _wait(world.device)
        world.barrier()
        started = clock()
        dist.all_reduce(sent)
        _wait(world.device)
        seconds.append(clock() - started)
        sums[f"{float(sent.min()):g} to {float(sent.max()):g}"] += 1
    sent.fill_(world.rank)
    dist.broadcast(sent, src=0)
    got = {
        "all-reduce of 1 to the number of ranks": ", ".join(sums),
        "broadcast of rank 0's 0": f"{float(sent.min()):g} to {float(sent.max()):g}",
    }
    right = world.size * (world.size + 1) // 2
    expected = dict(zip(got, (f"{right} to {right}", "0 to 0"), strict=True))
    every = world.gather(got)
    if any(found != expected for found in every):
        listed = [f"rank {rank}: {found}" for rank, found in enumerate(every) if found != expected]
        raise ValueError(
            f"ranks exchange wrong numbers, expected {expected}:\n  {_listed(listed)}\n"
            "Look at the network and at the versions of NCCL or gloo on these machines."
        )
    moved = 2 * (world.size - 1) / world.size * EXCHANGED_BYTES
    return moved / median(seconds[1:]) / GIGA


def check_memory(
    world: World,
    needed: Memory,
    look: Callable[[], Machine],
    advice: Callable[[], Sequence[str]],
    pause_seconds: float = 2.0,
) -> tuple[str, str]:
    """Refuse a training that is forecast not to fit; return its figures as words, and a warning where it hardly does.

    Args:
        world: the group of processes.
        needed: the forecast of a rank.
        look: returns what is free now.
        advice: returns what to change, the first that helps first.
        pause_seconds: between two looks, before a refusal.

    Raises:
        ValueError: naming the ranks, what they need and what they have.
    """
    for number in range(LOOKS):
        if number:
            time.sleep(pause_seconds)
        machine = look()
        shares = _shares(machine, world.gather(machine), needed, world.device.type)
        lacking = _short(world, shares, 1.0)
        if not lacking:
            break
    if lacking:
        raise ValueError(f"the training does not fit into memory:\n  {_listed(lacking)}\n{_in_order(advice())}")
    close = _short(world, shares, WARNING_SHARE)
    warning = f"memory will be short:\n  {_listed(close)}\n{_in_order(advice())}" if close else ""
    return ", ".join(_figures(*share) for share in shares), warning


def has_room(world: World, needed: Memory, machine: Machine) -> bool:
    """Say whether a training is forecast to fit well into what this rank found, the same answer on all ranks."""
    shares = _shares(machine, world.gather(machine), needed, world.device.type)
    return not _short(world, shares, WARNING_SHARE)


def _short(world: World, shares: Sequence[tuple[str, int, int]], of_free: float) -> list[str]:
    """Return a line for each rank that needs more than so much of what is free."""
    lacks = world.gather([_figures(*share) for share in shares if share[1] > of_free * share[2]])
    return [f"rank {rank}: {', '.join(lack)}" for rank, lack in enumerate(lacks) if lack]


def _in_order(advice: Sequence[str]) -> str:
    return "What helps, in order:\n  " + "\n  ".join(f"{number}. {way}" for number, way in enumerate(advice, start=1))


def _shares(machine: Machine, everywhere: Sequence[Machine], needed: Memory, device: str) -> list[tuple[str, int, int]]:
    """Return (what, bytes needed, bytes there) of each kind of memory that this rank needs."""
    beside = sum(other.name == machine.name for other in everywhere)
    on_host = machine.free_host_bytes // beside
    if device == "cpu":
        return [("", needed.total, on_host)]
    sharing = sum((other.name, other.device) == (machine.name, machine.device) for other in everywhere)
    on_device = ("", needed.device, machine.free_device_bytes // sharing)
    return [on_device, ("of the host ", needed.host, on_host)] if needed.host else [on_device]


def _figures(what: str, needed: int, there: int) -> str:
    digits = 1 if needed >= GIGA / 10 else 3
    return f"{needed / GIGA:.{digits}f} of {there / GIGA:.1f} GB {what}forecast a rank"


def weight_sums(networks: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return a checksum of each weight that this rank holds whole, by name: the sum of its bits as whole numbers.

    Under ZeRO-3 these are the small weights that stay with every rank; slices of the others can't be compared.
    """
    sums: dict[str, Tensor] = {}
    for name, network in networks.items():
        for part, weight in network.named_parameters():
            if weight.numel() and weight.numel() == getattr(weight, "ds_numel", weight.numel()):
                sums[f"{name}.{part}"] = _bits(weight.detach()).sum(dtype=torch.int64)
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}


def _bits(weight: Tensor) -> Tensor:
    widths = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return weight.view(widths[weight.element_size()])


def check_weights(world: World, sums: Mapping[str, int], when: str) -> None:
    """Refuse ranks whose weights differ.

    Args:
        world: the group of processes.
        sums: of `weight_sums`.
        when: for the message.

    Raises:
        ValueError: naming ranks, weights and checksums.
    """
    differences = _differences(world.gather({name: str(value) for name, value in sums.items()}))
    if differences:
        raise ValueError(
            f"{when} the ranks have other weights, so each would train a model of its own:\n  {_listed(differences)}\n"
            "Gradients must go through the engine's `wrapped` network. Machines whose processors round differently "
            "do this too: then --no-self-tests lets them."
        )


def check_rows(world: World, rows: Rows) -> None:
    """Refuse ranks that were given the same rows of the sequence.

    Raises:
        ValueError: naming the ranks, and a row that both have.
    """
    everywhere = world.gather(dict(zip(rows.samples.tolist(), rows.keys, strict=True)))
    ranks_of: defaultdict[int, list[int]] = defaultdict(list)
    for rank, given in enumerate(everywhere):
        for position in given:
            ranks_of[position].append(rank)
    shared = sorted(position for position, ranks in ranks_of.items() if len(ranks) > 1)
    if shared:
        first = ranks_of[shared[0]]
        keys = ", ".join(f"rank {rank} has {everywhere[rank][shared[0]]}" for rank in first)
        raise ValueError(
            f"{_ranks(first)} were given the same rows: {len(shared)} positions of the sequence, the first "
            f"{shared[0]} ({keys}). Every rank must read its own: give the loader its rank and the number of all"
        )


def _differences(everywhere: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a line for each name whose value is not the same on all ranks: the values, and the ranks of each."""
    lines = []
    for name in sorted({name for facts in everywhere for name in facts}):
        ranks_of: defaultdict[str, list[int]] = defaultdict(list)
        for rank, facts in enumerate(everywhere):
            ranks_of[facts.get(name, "nothing")].append(rank)
        if len(ranks_of) > 1:
            lines.append(f"{name}: " + "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in ranks_of.items()))
    return lines


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:SHOWN])) + (f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def _listed(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n  ".join([*lines[:SHOWN], *more])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
