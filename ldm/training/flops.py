"""FLOPs of a network's forward and backward pass, counted by running the real network without data or memory.

PyTorch's counter knows matrix products, convolutions and attention; norms and activations, a percent of a UNet, are
left out, as is usual for an MFU. A multiplication and an addition are two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def counted_flops(build: Callable[[], nn.Module], loss_of: Callable[[nn.Module], Tensor]) -> float:
    """Return the FLOPs of a forward and backward pass; no random number of this process's is drawn for it.

    Args:
        build: makes the network; what it has not made itself is moved there, so such a part is for this use alone.
        loss_of: makes its inputs, runs the network on them and returns what backward begins at.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = build().to("meta")
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(loss_of(network))
    return float(counter.get_total_flops())
