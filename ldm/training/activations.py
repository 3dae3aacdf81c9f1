"""What a forward and backward pass holds in memory, found by running the real network on tensors without data.

Order: the network is built of fake tensors → forward, where what autograd keeps is counted → backward, where every
storage that comes and goes is counted. Sizes are those of the CPU's kernels; what a kernel takes inside is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Loss = Callable[[nn.Module], Tensor]
"""Makes its inputs, runs the network on them and returns what backward begins at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What one micro-batch takes beside weights.

    Attributes:
        weight_numels: elements of each weight that is trained, in the network's order.
        frozen_bytes: weights that are not trained, and buffers.
        saved_bytes: what autograd keeps between forward and backward.
        peak_bytes: the most at any time, gradients dropped as soon as they are whole.
        peak_with_gradients_bytes: the most at any time, gradients kept.
    """

    weight_numels: tuple[int, ...]
    frozen_bytes: int
    saved_bytes: int
    peak_bytes: int
    peak_with_gradients_bytes: int

    @property
    def num_weights(self) -> int:
        """Elements of all weights that are trained."""
        return sum(self.weight_numels)


def traced(
    build: Callable[[], nn.Module], loss_of: Loss, *, weights: torch.dtype, autocast: torch.dtype | None
) -> Pass:
    """Return what a pass of a network takes; nothing is computed and no random number is drawn.

    Args:
        build: makes the network; what it has not made itself is replaced in it, so such a part is for this use alone.
        loss_of: one micro-batch's forward pass.
        weights: format of the weights.
        autocast: format that autocast computes in; None where there is no autocast.
    """
    with FakeTensorMode() as mode:
        network = build()
        _convert(network, mode, weights)
        trained = [weight for weight in network.parameters() if weight.requires_grad]
        own = [*network.parameters(), *network.buffers()]
        kept, alive = _Kept(own), _Alive(own)
        for weight in trained:
            weight.register_post_accumulate_grad_hook(alive.take_out_gradient)
        with alive:
            with saved_tensors_hooks(kept.pack, _unchanged), _autocast(autocast):
                loss = loss_of(network)
            torch.autograd.backward(loss)
        return Pass(
            weight_numels=tuple(weight.numel() for weight in trained),
            frozen_bytes=sum(_num_bytes(tensor) for tensor in own) - sum(_num_bytes(weight) for weight in trained),
            saved_bytes=kept.num_bytes,
            peak_bytes=alive.peak,
            peak_with_gradients_bytes=alive.peak_with_gradients,
        )


def _convert(network: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Do what `Module.to` can't do to fake tensors, and take over shapes of a part that was built elsewhere."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                made = mode.from_tensor(weight).detach().to(dtype)
                module._parameters[name] = nn.Parameter(made, weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                made = mode.from_tensor(buffer)
                module._buffers[name] = made.to(dtype) if made.is_floating_point() else made


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


class _Kept:
    """Counts the storages that autograd keeps, the network's own excluded, each once."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._seen = {_key(tensor) for tensor in own}
        self.num_bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        if _key(tensor) not in self._seen:
            self._seen.add(_key(tensor))
            self.num_bytes += tensor.untyped_storage().nbytes()
        return tensor


class _Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live; whole gradients apart from the rest."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = {_key(tensor) for tensor in own}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._now = 0
        self._gradients = 0
        self.peak = 0
        self.peak_with_gradients = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._take_in(tensor)
        return made

    def take_out_gradient(self, weight: Tensor) -> None:
        """Count a gradient that is whole among the gradients from now on."""
        assert weight.grad is not None
        self._gradients += weight.grad.untyped_storage().nbytes()

    def _take_in(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._own:
            return

        def forget(_: object) -> None:
            del self._alive[key]
            self._now -= num_bytes

        self._alive[key] = weakref.ref(storage, forget)
        self._now += num_bytes
        self.peak_with_gradients = max(self.peak_with_gradients, self._now)
        self.peak = max(self.peak, self._now - self._gradients)
