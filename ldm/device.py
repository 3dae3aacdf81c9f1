"""How tensors come to the device that computes: without the host's waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device.

    To a GPU it goes from pinned memory, in the order of the stream: from other memory the copy would wait for all that
    the GPU has yet to do, and the host with it.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
