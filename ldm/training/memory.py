"""How much memory a rank needs, before a training takes it: a sum for each moment of a step, and the largest of them.

    forward     activations come, under stage 3 beside weights that came flat
    backward    gradients come while activations go
    reduction   gradients lie in buckets, beside the copy that goes through the network
    update      gradients of the rank's share, beside the copy that the optimizer reads
    gathering   weights come from all ranks, on a CPU through a copy of gloo's

Every term is an allocation of PyTorch 2.15's DistributedDataParallel or DeepSpeed 0.19's `stage_1_and_2.py` and
`stage3.py`. What an allocator holds beyond what is asked of it, and what a process takes before its network, are none.

Letters: N weights, n a rank's share of them, w ranks, B elements of a bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from ldm.training.activations import Pass
from ldm.training.zero_config import is_on_host, read_zero_file, stage_of

FP32 = 4
MOMENTS = 8
"""Two of Adam's for each weight, of four bytes."""
STAGE_0_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once where nothing is sharded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How an engine spreads a network over ranks.

    Attributes:
        name: how a person calls it.
        stage: of ZeRO; None for the local engine.
        bucket: elements of the bucket that gradients are reduced through.
        num_buckets: how many of them there are.
        max_gathered: elements that stage 3 holds whole at once.
        fetched: elements that stage 3 gathers at once.
        small: weights of at most so many elements stay whole under stage 3.
        has_optimizer_on_host: whether the optimizer and what it reads lie in the host's memory.
        has_weights_on_host: whether stage 3's shares of the weights do.
    """

    name: str
    stage: int | None = None
    bucket: int = 0
    num_buckets: int = 1
    max_gathered: int = 0
    fetched: int = 0
    small: int = 0
    has_optimizer_on_host: bool = False
    has_weights_on_host: bool = False


UNSHARDED = Sharding(name="local")
"""The local engine's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a step is like on one rank.

    Attributes:
        passed: one micro-batch's forward and backward.
        num_ranks: ranks that train together.
        num_micro_batches: micro-batches of a step.
        weight_bytes: of a weight as the network computes with it.
        num_averages: how many moving averages are kept.
        is_on_cpu: whether the device is the host; there a bucket takes only what is written to it, and gloo copies.
    """

    passed: Pass
    num_ranks: int
    num_micro_batches: int
    weight_bytes: int
    num_averages: int
    is_on_cpu: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that a rank holds at one moment.

    Attributes:
        moment: which one.
        weights: as the network computes with them, those that are gathered too.
        gradients: of weights.
        optimizer: float32 copy of the weights, where there is one, and moments.
        averages: moving averages.
        buffers: flat copies and buckets of what goes between ranks.
        activations: what forward and backward hold.
        host: all of these that lie in the host's memory in place of the device's.
    """

    moment: str = ""
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    averages: int = 0
    buffers: int = 0
    activations: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.buffers + self.activations

    @property
    def total(self) -> int:
        """Bytes on device and host together."""
        return self.device + self.host


def forecast(sharding: Sharding, step: Step) -> Memory:
    """Return what a rank holds at the moment of a step when that is most."""
    return max(_moments(sharding, step), key=lambda memory: memory.total)


def resting(sharding: Sharding, step: Step) -> Memory:
    """Return what a rank holds at every moment of a step, and so while it makes another network's."""
    moments = list(_moments(sharding, step))
    names = ("weights", "gradients", "optimizer", "averages", "buffers", "host")
    return Memory(moment="rest", **{name: min(getattr(moment, name) for moment in moments) for name in names})


def combined(one: Memory, other: Memory) -> Memory:
    """Return two networks' memory at a moment of the first's."""
    names = ("weights", "gradients", "optimizer", "averages", "buffers", "activations", "host")
    return replace(one, **{name: getattr(one, name) + getattr(other, name) for name in names})


def unit_of(largest: int) -> tuple[str, float]:
    """Return the unit in which a number of bytes is easily read, and how many bytes it has."""
    return ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)


def read_sharding(path: str) -> Sharding:
    """Return what a DeepSpeed file says of memory; what it leaves out has DeepSpeed's default."""
    file = read_zero_file(path)
    stage, settings = stage_of(file), file.get("zero_optimization", {})
    overlaps = settings.get("overlap_comm", stage == 3)
    return Sharding(
        name=Path(path).stem,
        stage=stage,
        bucket=int(settings.get("reduce_bucket_size", 5e8)),
        num_buckets=2 if overlaps and stage in (1, 2) else 1,
        # A weight stays whole from forward to backward if fewer elements than the distance are used between.
        max_gathered=min(
            int(settings.get("stage3_max_live_parameters", 1e9)),
            int(settings.get("stage3_max_reuse_distance", 1e9)) // 2,
        ),
        fetched=int(settings.get("stage3_prefetch_bucket_size", 5e7)),
        small=int(settings.get("stage3_param_persistence_threshold", 1e5)),
        has_optimizer_on_host=is_on_host(settings.get("offload_optimizer")),
        has_weights_on_host=is_on_host(settings.get("offload_param")),
    )


def _moments(sharding: Sharding, step: Step) -> Iterator[Memory]:
    match sharding.stage:
        case None:
            return _local(step)
        case 0:
            return _stage_0(step)
        case 3:
            return _stage_3(sharding, step)
        case _:
            return _stage_1_or_2(sharding, step)


def _local(step: Step) -> Iterator[Memory]:
    passed = step.passed
    size = passed.num_weights * FP32
    always = Memory(
        weights=size + passed.frozen_bytes,
        optimizer=passed.num_weights * MOMENTS,
        averages=size * step.num_averages,
        buffers=size if step.num_ranks > 1 else 0,
    )
    yield _backward(always, step, size)
    yield replace(always, moment="update", gradients=size)


def _stage_0(step: Step) -> Iterator[Memory]:
    passed = step.passed
    size = passed.num_weights * FP32
    always = Memory(
        weights=size + passed.frozen_bytes,
        optimizer=passed.num_weights * MOMENTS,
        averages=size * step.num_averages,
    )
    yield _backward(always, step, size)
    yield replace(always, moment="reduction", gradients=size, buffers=min(size, STAGE_0_BUCKET * FP32))
    yield replace(always, moment="update", gradients=size)


def _stage_1_or_2(sharding: Sharding, step: Step) -> Iterator[Memory]:
    passed, each = step.passed, step.weight_bytes
    num, size = passed.num_weights, passed.num_weights * each
    share = _aligned_share(num, step.num_ranks)
    own = _largest_share(passed.weight_numels, share) * each  # whole weights that lie in the share or cross its border
    copied = min(size, sharding.bucket * each) if step.num_ranks > 1 else 0
    bucket = sharding.num_buckets * sharding.bucket * each
    bucket = min(bucket, size) if step.is_on_cpu else bucket
    always = Memory(
        weights=size + passed.frozen_bytes,
        optimizer=share * (FP32 + MOMENTS),
        averages=share * FP32 * step.num_averages,
    )
    converted = share * (each if each == FP32 else each + FP32)
    if sharding.has_optimizer_on_host:
        largest = max(passed.weight_numels) * each
        several = own if step.num_micro_batches > 1 else 0
        held = share * (2 * FP32 + MOMENTS + each) + largest + several
        always = replace(always, optimizer=0, averages=0, buffers=largest, host=held + always.averages)
        own = converted = 0
    accumulated = 0
    if step.num_micro_batches > 1:
        accumulated = size if sharding.stage == 1 else own
    if step.num_ranks == 1 and not sharding.has_optimizer_on_host:  # nothing is sent: gradients stay with their weights
        kept = accumulated if sharding.stage == 2 else 0
        flattened = min(num, sharding.bucket) * each
        is_amid = sharding.stage == 2 and num > sharding.bucket  # buckets are reduced while there are activations
        backward = _backward(replace(always, gradients=kept), step, size)
        yield replace(backward, buffers=backward.buffers + flattened * is_amid)
        yield _with(always, "reduction", gradients=size + kept, buffers=flattened)
    elif num <= sharding.bucket:
        is_filled = step.is_on_cpu and step.num_micro_batches == 1
        filled = passed.peak_with_gradients_bytes - passed.peak_bytes if is_filled else bucket
        yield _with(always, "backward", buffers=filled, gradients=accumulated, activations=passed.peak_bytes)
        after = accumulated if sharding.stage == 2 else 0
        yield _with(always, "reduction", buffers=bucket + copied, gradients=after)
        yield _with(always, "reduction", buffers=bucket, gradients=after + own)
    else:  # buckets are reduced while there are activations
        gradients = accumulated + own
        yield _with(always, "backward", buffers=bucket + copied, gradients=gradients, activations=passed.peak_bytes)
    yield _with(always, "update", gradients=own + converted)
    if step.is_on_cpu and step.num_ranks > 1:
        yield _with(always, "gathering", buffers=size)


def _stage_3(sharding: Sharding, step: Step) -> Iterator[Memory]:
    passed, each = step.passed, step.weight_bytes
    num, size = passed.num_weights, passed.num_weights * each
    share = sum(-(-numel // step.num_ranks) for numel in passed.weight_numels)
    small = sum(numel for numel in passed.weight_numels if numel <= sharding.small)
    copied = min(size, sharding.bucket * each)
    bucket = copied if step.is_on_cpu else sharding.bucket * each
    always = Memory(
        weights=(share + small) * each + passed.frozen_bytes,
        gradients=share * each,
        optimizer=share * (FP32 + MOMENTS),
        averages=share * FP32 * step.num_averages,
        buffers=bucket,
    )
    converted = share * (each if each == FP32 else each + FP32)
    if sharding.has_optimizer_on_host:
        held = share * (2 * FP32 + MOMENTS + each) + always.averages
        always = replace(always, gradients=0, optimizer=0, averages=0, host=held)
        converted = 0
    if sharding.has_weights_on_host:
        always = replace(always, weights=always.weights - share * each, host=always.host + share * each)
    gathered = min(num - small, sharding.max_gathered) * each
    num_copies = 2 if step.is_on_cpu else 1
    copies = copied * num_copies
    # What came together lies flat, beside the weights that were cut out of it, until the last of these was used.
    fetched = min(num - small, sharding.fetched) * each
    yield _with(always, "gathering", weights=gathered, buffers=fetched * num_copies)
    yield _with(always, "forward", weights=gathered, buffers=fetched, activations=passed.peak_bytes)
    yield _with(always, "backward", weights=gathered, activations=passed.peak_bytes)
    if num <= sharding.bucket:
        yield _with(always, "reduction", buffers=copies)
    else:
        yield _with(always, "reduction", buffers=copies, weights=gathered, activations=passed.peak_bytes)
    yield _with(always, "update", gradients=converted)


def _backward(always: Memory, step: Step, gradients: int) -> Memory:
    """Return the moment of the most activations where gradients stay with their weights."""
    passed = step.passed
    if step.num_micro_batches == 1:
        gradients = passed.peak_with_gradients_bytes - passed.peak_bytes
    return _with(always, "backward", gradients=gradients, activations=passed.peak_bytes)


def _with(always: Memory, moment: str, **more: int) -> Memory:
    return replace(always, moment=moment, **{name: getattr(always, name) + value for name, value in more.items()})


def _aligned_share(num: int, num_ranks: int) -> int:
    """Return the elements of a rank's share: stages 1 and 2 fill up to a multiple of twice the ranks."""
    return -(-num // (2 * num_ranks)) * 2


def _largest_share(numels: tuple[int, ...], share: int) -> int:
    """Return the elements of whole weights that touch one rank's share, for the rank that has most of them."""
    ends = list(accumulate(numels))
    touched: dict[int, int] = {}
    for numel, end in zip(numels, ends, strict=True):
        for rank in range((end - numel) // share, (end - 1) // share + 1):
            touched[rank] = touched.get(rank, 0) + numel
    return max(touched.values())
