"""FLOPs of a network's forward and backward pass, counted by running the real network without data or memory.

PyTorch's counter knows matrix products, convolutions and attention; norms and activations, a percent of a UNet, are
left out, as is usual for an MFU. A multiplication and an addition are two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def counted_flops(build: Callable[[], nn.Module], loss_of: Callable[[nn.Module], Tensor]) -> float:
    """Return the FLOPs of a forward and backward pass; no random number of this process's is drawn for it.

    Args:
        build: makes the network; what it has not made itself is moved there, so such a part is for this use alone.
        loss_of: makes its inputs, runs the network on them and returns what backward begins at.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = build().to("meta")
        with _Counter() as counter:
            torch.autograd.backward(loss_of(network))
    return float(counter.flops)


class _Counter(TorchDispatchMode):
    """Adds up what PyTorch's formulas say of each operation.

    PyTorch's own counter tells modules apart as well, by hooks that a gradient of a gradient (R1) does not go through.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        return made
